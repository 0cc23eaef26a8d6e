"""Boxes, holes and islands, run lengths: against plain loops and pycocotools."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from tinyvit.images import mask_ops as rle
from tinyvit.images.mask_ops import components, remove_small_regions

masks = arrays(
    np.bool_,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    fill=st.nothing(),
)
numbers = st.lists(st.integers(0, 2**31), max_size=20)


def of_coco(mask):
    made = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(made["size"]), "counts": made["counts"].decode()}


def blob(height, width, seed=0):
    """A disc with a hole, that touches the edges of the image."""
    rows, columns = np.mgrid[:height, :width]
    square = (2 * rows / height - 1) ** 2 + (2 * columns / width - 1.2) ** 2
    return (square < 1.1) & (square > 0.05 * seed)


class TestAgainstCoco:
    @given(masks)
    def test_text_numbers_and_back(self, mask):
        text, plain = rle.encode(mask), rle.encode(mask, compressed=False)
        assert text == of_coco(mask)
        packed = coco.frPyObjects({**plain}, *mask.shape)  # it changes what it gets
        assert packed["counts"].decode() == text["counts"]
        assert rle.decompress(text["counts"]).tolist() == plain["counts"]
        for one in (text, plain, {**text, "counts": text["counts"].encode()}):
            found = rle.decode(one)
            assert found.dtype == np.bool_
            np.testing.assert_array_equal(found, mask)
            assert rle.area(one) == mask.sum() == coco.area(of_coco(mask))
            assert rle.to_box(one) == tuple(coco.toBbox(of_coco(mask)))

    @pytest.mark.parametrize("seed", range(3))
    def test_a_larger_mask(self, seed):
        mask = blob(301, 217, seed)
        noise = np.random.default_rng(seed).random(mask.shape) < 0.5
        for one in (mask, noise, mask & noise, mask[::-1].T, np.asfortranarray(mask)):
            assert rle.encode(one) == of_coco(one)
            np.testing.assert_array_equal(rle.decode(rle.encode(one)), one)

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3)])
    @pytest.mark.parametrize("value", [False, True])
    def test_empty_and_full(self, size, value):
        mask = np.full(size, value)
        assert rle.encode(mask) == of_coco(mask)
        pixels = size[0] * size[1]
        assert rle.encode(mask, compressed=False)["counts"] == ([0, pixels] if value else [pixels])
        np.testing.assert_array_equal(rle.decode(rle.encode(mask)), mask)
        assert rle.to_box(rle.encode(mask)) == ((0, 0, size[1], size[0]) if value else (0, 0, 0, 0))

    def test_a_large_image(self):
        mask = np.zeros((6000, 8000), bool)
        mask[5990:, 10:300] = mask[:4, 11:301] = True  # runs that go on in the next column
        made = rle.encode(mask)
        assert made == of_coco(mask)
        assert rle.to_box(made) == (10, 0, 291, 6000)
        np.testing.assert_array_equal(rle.decode(made), mask)


class TestText:
    @given(numbers)
    def test_any_numbers_come_back(self, counts):
        assert rle.decompress(rle.compress(counts)).tolist() == counts
        assert rle.decompress(rle.compress(np.array(counts, np.int64)).encode()).tolist() == counts

    def test_none(self):
        assert rle.compress([]) == ""
        assert rle.decompress("").tolist() == []

    @pytest.mark.parametrize(
        "text, words",
        [
            ("61 X", "from '0' to 'o' only, but byte 2 is b' '"),
            ("p", "byte 0 is b'p'"),
            ("6é", r"byte 1 is b'\\xc3'"),
            ("61X", "end within a number; are they cut off"),
            ("o" * 20 + "0", "has 21 characters, more than 12"),
            ("O", "counts must not be negative, but number 0 is -1"),
        ],
    )
    def test_junk(self, text, words):
        with pytest.raises(ValueError, match=words):
            rle.decompress(text)
        with pytest.raises(ValueError, match=words):
            rle.decode({"size": [2, 3], "counts": text})


class TestRegion:
    @given(masks, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
    def test_as_the_whole_image(self, part, above, below, before, after):
        whole = np.pad(part, ((above, below), (before, after)))
        counts = rle.runs(part, above, before, whole.shape)
        assert np.array_equal(rle.fill(whole.shape, counts), whole)
        for compressed in (True, False):
            assert rle.to_rle(whole.shape, counts, compressed) == rle.encode(whole, compressed)

    @pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0)])
    def test_a_part_of_no_pixels_is_an_empty_mask(self, shape):
        assert rle.runs(np.zeros(shape, bool), 2, 3, (10, 20)).tolist() == [200]

    def test_the_image_is_never_made(self):
        side = 10**6  # an image of this size would not fit
        size = side, side
        made = rle.to_rle(size, rle.runs(np.eye(3, dtype=bool), side - 3, 5, size), True)
        assert (rle.area(made), rle.to_box(made)) == (3, (5, side - 3, 3, 3))

    @pytest.mark.parametrize("top, left", [(-1, 0), (0, -1), (8, 0), (0, 17)])
    def test_outside(self, top, left):
        with pytest.raises(ValueError, match=r"part of 3 x 4 pixels at row .* 10 x 20"):
            rle.runs(np.ones((3, 4), bool), top, left, (10, 20))


def test_ready_for_json():
    for compressed in (True, False):
        made = rle.encode(blob(5, 6), compressed)
        assert json.loads(json.dumps(made)) == made


def test_runs_of_no_pixels_are_read():
    runs = {"size": np.array([2, 3]), "counts": [1, 0, 1, 2, 0, 0, 2]}
    np.testing.assert_array_equal(rle.decode(runs), [[False, True, False]] * 2)
    assert rle.to_box(runs) == (1, 0, 1, 2)


@pytest.mark.parametrize(
    "mask, words",
    [
        (np.ones((2, 2), np.uint8), r"wanted a mask \[H, W\] bool; came \[2, 2\] uint8"),
        (np.ones((1, 2, 2), bool), r"came \[1, 2, 2\] bool"),
        ([[True]], "came list"),
        (np.ones((0, 2), bool), "at least one pixel; came 0 x 2"),
    ],
)
def test_wrong_masks(mask, words):
    with pytest.raises(ValueError, match=words):
        rle.encode(mask)


@pytest.mark.parametrize(
    "runs, words",
    [
        ({"counts": [6]}, r'"size": \[height, width\].*with size None'),
        ({"size": [2, 3]}, "came .'size'. with size"),
        ({"size": [2], "counts": [6]}, r"with size \[2\]"),
        ({"size": [2.0, 3], "counts": [6]}, "size must be whole numbers"),
        ({"size": [0, 3], "counts": [0]}, r"at least one pixel; came size \[0, 3\]"),
        ({"size": [2, 3], "counts": [5]}, "sum to height x width = 2 x 3 = 6, but sum to 5"),
        ({"size": [2, 3], "counts": []}, "but sum to 0"),
        ({"size": [2, 3], "counts": [2**62] * 5}, "but hold 4611686018427387904"),
        ({"size": [2, 3], "counts": [7, -1]}, "not be negative, but number 1 is -1"),
        ({"size": [2, 3], "counts": [5.5, 0.5]}, "must be whole numbers; came list of float64"),
        ({"size": [2, 3], "counts": [[6]]}, r"must be whole numbers; came list of int64 \[1, 1\]"),
        ({"size": [2, 3], "counts": 6}, "must be whole numbers; came int"),
    ],
)
def test_wrong_run_lengths(runs, words):
    for use in (rle.decode, rle.area, rle.to_box):
        with pytest.raises(ValueError, match=words):
            use(runs)


COORDS = st.lists(st.tuples(*[st.integers(0, 12)] * 4), max_size=12)


def make_boxes(numbers):
    rows = [(min(x, u), min(y, v), max(x, u), max(y, v)) for x, y, u, v in numbers]
    return np.array(rows, np.float64).reshape(-1, 4)


def iou_of(one, other):
    x = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    y = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - x * y
    return x * y / union if union else 0.0


@given(COORDS, st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.randoms(use_true_random=False))
def test_suppression_is_greedy(numbers, threshold, random):
    boxes = make_boxes(numbers)
    scores = [random.choice([0.1, 0.5, 0.9]) for _ in boxes]
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou_of(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    assert rle.non_maximum_suppression(boxes, scores, threshold).tolist() == kept


def test_suppression_across_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, 40, (100, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(5, 20, (100, 2))], axis=1)
    scores = generator.uniform(size=100)
    at_once = rle.non_maximum_suppression(boxes, scores, 0.3)
    monkeypatch.setattr(rle, "BLOCK", 7)
    assert 5 < len(at_once) < 95
    assert np.array_equal(rle.non_maximum_suppression(boxes, scores, 0.3), at_once)


def test_wrong_boxes():
    with pytest.raises(ValueError, match=r"wanted boxes \[N, 4\] as x0, y0, x1, y1; came \[3\]"):
        rle.non_maximum_suppression([1, 2, 3], [1.0], 0.5)
    with pytest.raises(ValueError, match="a score for each of 2 boxes"):
        rle.non_maximum_suppression(np.zeros((2, 4)), [1.0], 0.5)
    with pytest.raises(ValueError, match=r"box 1 is not finite: \[0.0, inf, 0.0, 0.0\]"):
        rle.non_maximum_suppression([[0, 0, 1, 1], [0, np.inf, 0, 0]], [1.0, 2.0], 0.5)
    with pytest.raises(ValueError, match="score 1 is not a number"):
        rle.non_maximum_suppression(np.zeros((2, 4)), [1.0, np.nan], 0.5)


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)))
def test_the_box_of_one_mask(mask):
    rows, columns = np.nonzero(mask)
    wanted = 0, 0, 0, 0
    if len(rows):
        wanted = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert rle.box_around(mask) == wanted


def test_boxes_of_no_area_leave_each_other_alone():
    points = np.array([[3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]], np.float32)
    assert rle.non_maximum_suppression(points, [3, 2, 1], 0.0).tolist() == [0, 1, 2]


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
    with pytest.raises(ValueError, match=r"a mask \[H, W\] bool; came \[3\] uint8"):
        remove_small_regions(np.zeros(3, np.uint8), 4, "holes")


def test_parts_are_numbered_in_reading_order():
    labels, areas = components(make(IMAGE))
    assert (labels.dtype, areas.dtype) == (np.int32, np.int64)
    assert areas.tolist() == [23, 1, 4, 1]
    assert [labels[1, 1], labels[1, 8], labels[3, 7], labels[6, 9]] == [1, 2, 3, 4]
    assert np.array_equal(labels > 0, make(IMAGE))


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


regions = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


@given(regions, st.integers(0, 12))
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
