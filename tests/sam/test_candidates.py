"""Packed masks: they come back as they were, whatever their place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyvit.sam.automatic import Candidate, PackedMask, stability_of
from tinyvit.sam.upscale import Region


@given(
    hnp.arrays(bool, st.tuples(st.integers(0, 9), st.integers(0, 9))),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_a_mask_comes_back(part, top, left):
    size = part.shape[0] + top + 2, part.shape[1] + left + 3
    whole = np.zeros(size, bool)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    packed = PackedMask.of(part, top, left, size)
    assert np.array_equal(packed.whole(), whole)
    assert packed.whole().dtype == np.bool_
    assert packed.area == whole.sum()
    assert packed.part().shape == packed.shape
    if packed.area:
        rows, columns = np.nonzero(whole)
        assert packed.box == (columns.min(), rows.min(), columns.max(), rows.max())
        assert packed.part()[0].any() and packed.part()[:, -1].any()
    else:
        assert packed.shape == (0, 0)


def test_it_is_small():
    """A disc in 12 megapixels: its box, eight pixels to a byte, and deflated."""
    y, x = np.ogrid[:1000, :1000]
    disc = (y - 500) ** 2 + (x - 500) ** 2 < 400**2
    packed = PackedMask.of(disc, 2000, 1000, (3000, 4000))
    assert packed.shape == (799, 799)
    assert len(packed.data) < disc.size / 50
    assert packed.area == disc.sum()


def a_region(mask, inner=3, outer=4):
    return Region(np.array(mask, bool), 1, 2, 20, 30, inner, outer)


def test_a_mask_of_a_crop_moves_into_the_image():
    region = a_region([[0, 1, 1], [0, 0, 1]])
    one = Candidate.found(region, 0.75, np.array([4.5, 2.5]), [10, 20, 40, 40], (60, 80))
    assert one.mask.box == (10 + 2 + 1, 20 + 1, 10 + 2 + 2, 20 + 2)
    assert one.mask.area == 3
    assert one.mask.size == (60, 80)
    assert one.point == (14.5, 22.5)
    assert one.crop_box == (10, 20, 40, 40)
    assert (one.predicted_iou, one.stability) == (0.75, 0.75)


def test_an_empty_mask_is_a_point_in_its_crop():
    """segment-anything gives it the box 0, 0, 0, 0 of the crop."""
    one = Candidate.found(a_region(np.zeros((2, 2))), 0.5, [0, 0], [10, 20, 40, 40], (60, 80))
    assert one.mask.box == (10, 20, 10, 20)
    assert not one.mask.whole().any()


def test_stability_is_compared_in_single_precision():
    assert stability_of(a_region([[1]], 19, 20)) == float(np.float32(0.95))
    assert np.isnan(stability_of(a_region([[0]], 0, 0)))
    assert stability_of(a_region([[1]], 1, 3)) == pytest.approx(1 / 3)
