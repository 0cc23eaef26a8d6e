"""Outlines of masks. The mask itself is the reference: even-odd filling gives it back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays

from tiny import even_odd
from tinyvit.images.mask_ops import is_outer, outlines

masks = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(masks)
def test_exact_outlines_give_the_mask_back(mask):
    rings = outlines(mask)
    assert (even_odd(rings, mask.shape) == mask).all()
    assert sum(map(is_outer, rings)) >= bool(mask.any())
    areas = sum(abs_area(ring) for ring in rings)
    assert areas == mask.sum()


def abs_area(ring):
    after = np.roll(ring, -1, axis=0)
    return (ring[:, 0] * after[:, 1] - ring[:, 1] * after[:, 0]).sum() / 2


def test_outlines_of_easy_masks():
    assert outlines(np.zeros((3, 4), bool)) == []
    full = outlines(np.ones((3, 4), bool))
    assert [ring.tolist() for ring in full] == [[[0, 0], [4, 0], [4, 3], [0, 3]]]
    hole = np.ones((3, 3), bool)
    hole[1, 1] = False
    assert sorted(map(is_outer, outlines(hole))) == [False, True]
    yy, xx = np.mgrid[:200, :300]
    disc = np.hypot(yy - 100, xx - 150) < 80
    (exact,), (simple,) = outlines(disc), outlines(disc, 1.0)
    assert len(simple) < len(exact) / 5
    with pytest.raises(ValueError, match="tolerance must be 0 or more"):
        outlines(disc, -1)
    with pytest.raises(ValueError, match="a mask \\[H, W\\] bool"):
        outlines(disc.astype(int))
