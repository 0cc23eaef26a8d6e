import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tinyvit.sam.mask_ops import (
    components,
    largest_component,
    remove_small_regions,
    stability_score,
)

IMAGE = """
..........
.#####..#.
.#.###....
.#####.##.
.###.#.##.
.#####....
.........#
"""


def make(text):
    return np.array([[letter == "#" for letter in line] for line in text.split()])


def test_holes():
    filled, is_changed = remove_small_regions(make(IMAGE), 2, "holes")
    assert is_changed
    assert filled[2, 2] and filled[4, 4]
    assert filled.sum() == make(IMAGE).sum() + 2


def test_islands():
    left, is_changed = remove_small_regions(make(IMAGE), 4, "islands")
    assert is_changed
    assert not left[1, 8] and not left[6, 9]
    assert left[3:5, 7:9].all() and left[1:6, 1].all()


def test_the_largest_island_stays():
    left, is_changed = remove_small_regions(make(IMAGE), 1000, "islands")
    assert is_changed
    assert left[1:6, 1].all() and not left[:, 6:].any()


def test_corners_connect():
    diagonal = np.eye(5, dtype=bool)
    left, is_changed = remove_small_regions(diagonal, 5, "islands")
    assert left is diagonal and not is_changed


@pytest.mark.parametrize("mode", ["holes", "islands"])
@pytest.mark.parametrize("value", [False, True])
def test_constant_masks(mode, value):
    mask = np.full((3, 4), value)
    result, is_changed = remove_small_regions(mask, 5, mode)
    assert result is mask and not is_changed


def test_the_mask_given_is_not_changed():
    mask = make(IMAGE)
    remove_small_regions(mask, 4, "islands")
    assert np.array_equal(mask, make(IMAGE))


def test_wrong_input():
    with pytest.raises(ValueError, match=r"mode must be one of .*, came 'hole'"):
        remove_small_regions(make(IMAGE), 4, "hole")
    with pytest.raises(ValueError, match=r"a mask \[H, W\] of bool; came \[3\] of uint8"):
        remove_small_regions(np.zeros(3, np.uint8), 4, "holes")
    with pytest.raises(ValueError, match=r"wanted logits \[..., H, W\]; came \[3\]"):
        stability_score(torch.zeros(3), 0.0, 1.0)


def test_parts_are_numbered_in_reading_order():
    labels, areas = components(make(IMAGE))
    assert (labels.dtype, areas.dtype) == (np.int32, np.int64)
    assert areas.tolist() == [23, 1, 4, 1]
    assert [labels[1, 1], labels[1, 8], labels[3, 7], labels[6, 9]] == [1, 2, 3, 4]
    assert np.array_equal(labels > 0, make(IMAGE))


def test_the_largest_part():
    largest = largest_component(make(IMAGE))
    assert largest.sum() == 23 and largest[1, 1]
    equal = np.array([[True, False, True]])
    assert largest_component(equal).tolist() == [[True, False, False]]
    for mask in (np.zeros((3, 2), bool), np.ones((1, 1), bool)):
        assert np.array_equal(largest_component(mask), mask)


def flood(mask):
    """Parts found one pixel after another, as sets."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    parts = []
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            row, column = edge.pop()
            part.add((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
        parts.append(part)
    return sorted(parts, key=min)


masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


@given(masks, st.integers(0, 12))
def test_against_flooding(mask, bound):
    assert components(mask)[1].tolist() == [len(part) for part in flood(mask)]
    filled, has_filled = remove_small_regions(mask, bound, "holes")
    wanted = mask.copy()
    for hole in flood(~mask):
        if len(hole) < bound:
            wanted[tuple(np.array(list(hole)).T)] = True
    assert np.array_equal(filled, wanted)
    assert has_filled == (not np.array_equal(filled, mask))
    left, _ = remove_small_regions(mask, bound, "islands")
    parts = flood(mask)
    kept = [part for part in parts if len(part) >= bound] or sorted(parts, key=len)[-1:]
    assert left.sum() == sum(len(part) for part in kept)
    assert not (left & ~mask).any()


def test_an_only_island_that_is_small_stays():
    mask = np.eye(3, dtype=bool)
    left, is_changed = remove_small_regions(mask, 9, "islands")
    assert is_changed  # so segment-anything counts it
    assert np.array_equal(left, mask)


def test_a_small_corner_of_what_is_not_mask_is_a_hole():
    mask = np.ones((5, 6), bool)
    mask[0, 0] = False
    assert remove_small_regions(mask, 2, "holes")[0].all()


class TestStability:
    def test_values(self):
        logits = torch.tensor([[[2.0, 0.5], [-0.5, -3.0]], [[2.0, 2.0], [1.5, -1.0]]])
        assert stability_score(logits, 0.0, 1.0).tolist() == [pytest.approx(1 / 3), 1.0]
        assert stability_score(logits[None], 1.0, 0.0).tolist() == [[1.0, 1.0]]
        assert stability_score(logits[:0], 0.0, 1.0).shape == (0,)

    def test_no_pixels_fail_every_bound(self):
        score = stability_score(torch.full((1, 2, 2), -9.0), 0.0, 1.0)
        assert score.isnan().all()
        assert not (score >= 0).any()

    def test_wide_masks_do_not_overflow(self):
        logits = torch.ones(1, 40_000)  # more than 16 bits count
        assert stability_score(logits, 0.0, 0.5).item() == 1.0
