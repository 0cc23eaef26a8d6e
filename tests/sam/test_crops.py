"""Grids of points and crops: segment-anything's numbers, and what must hold for any image."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.sam.automatic import (
    build_all_layer_point_grids,
    build_point_grid,
    check_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
)


def test_a_grid_goes_row_by_row_through_the_middles_of_squares():
    grid = build_point_grid(3)
    assert grid.shape == (9, 2)
    assert grid.dtype == np.float64
    np.testing.assert_allclose(grid[:3], [[1 / 6, 1 / 6], [1 / 2, 1 / 6], [5 / 6, 1 / 6]])
    np.testing.assert_allclose(grid[3], [1 / 6, 1 / 2])
    assert build_point_grid(1).tolist() == [[0.5, 0.5]]


def test_deeper_layers_have_fewer_points():
    grids = build_all_layer_point_grids(32, 2, 2)
    assert [len(grid) for grid in grids] == [32**2, 16**2, 8**2]
    assert [len(grid) for grid in build_all_layer_point_grids(5, 1, 2)] == [25, 4]  # rounded down


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0, 1), "points_per_side must be at least 1, came 0"),
        ((4, -1, 1), "crop_n_layers must be at least 0, came -1"),
        ((4, 1, 0), "crop_n_points_downscale_factor must be at least 1, came 0"),
        ((4, 3, 2), "leaves layer 3 without points"),
    ],
)
def test_grids_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        build_all_layer_point_grids(*arguments)


def test_one_grid_of_none():
    with pytest.raises(ValueError, match="at least 1 point a side, came 0"):
        build_point_grid(0)


def test_a_caller_s_grids_are_checked():
    given_grids = [[[0, 0.5]], np.ones((3, 2), np.float32)]
    grids = check_point_grids(given_grids, 1)
    assert [grid.shape for grid in grids] == [(1, 2), (3, 2)]
    assert check_point_grids([np.zeros((0, 2))], 0)[0].shape == (0, 2)
    with pytest.raises(ValueError, match="each of 2 layers of crops, 3 in all; came 2"):
        check_point_grids(given_grids, 2)
    with pytest.raises(ValueError, match=r"point_grids\[0\] must be \[P, 2\], came \[3\]"):
        check_point_grids([[0.1, 0.2, 0.3]], 0)
    with pytest.raises(ValueError, match=r"point_grids\[0\] must lie in 0..1.*came 0.5 to 40"):
        check_point_grids([[[0.5, 40]]], 0)
    with pytest.raises(ValueError, match=r"must lie in 0..1"):
        check_point_grids([[[0.5, np.nan]]], 0)


def test_crops_of_a_photograph():
    """Worked out by hand from the published rule: 400x600, a third of the short side common."""
    boxes, layers = generate_crop_boxes((400, 600), 2, 512 / 1500)
    assert layers == [0] + [1] * 4 + [2] * 16
    assert boxes[0] == [0, 0, 600, 400]
    assert boxes[1:5] == [
        [0, 0, 368, 268],
        [0, 132, 368, 400],
        [232, 0, 600, 268],
        [232, 132, 600, 400],
    ]
    assert boxes[5] == [0, 0, 201, 151]
    assert boxes[20] == [399, 249, 600, 400]


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 3), st.floats(0, 0.99))
def test_crops_lie_in_the_image_and_cover_it(height, width, n_layers, ratio):
    boxes, layers = generate_crop_boxes((height, width), n_layers, ratio)
    assert len(boxes) == len(layers)
    for layer in range(n_layers + 1):
        own = [box for box, at in zip(boxes, layers, strict=True) if at == layer]
        assert own
        seen = [np.zeros(width, bool), np.zeros(height, bool)]
        for x0, y0, x1, y1 in own:
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            seen[0][x0:x1] = True
            seen[1][y0:y1] = True
        assert seen[0].all()
        assert seen[1].all()


def test_what_a_crop_may_have_cut_off():
    crop, image = [100, 0, 300, 200], [0, 0, 400, 200]
    boxes = [
        [50, 50, 100, 100],  # within
        [5, 50, 100, 100],  # at the crop's left edge
        [20, 50, 100, 100],  # 20 pixels from it: near
        [21, 50, 100, 100],
        [50, 0, 100, 100],  # at its upper edge, which is the image's
        [50, 50, 199, 100],  # at its right edge
    ]
    near = is_box_near_crop_edge(boxes, crop, image)
    assert near.tolist() == [False, True, True, False, False, True]
    assert is_box_near_crop_edge([[0, 0, 399, 199]], image, image).tolist() == [False]
    assert is_box_near_crop_edge(np.zeros((0, 4)), crop, image).shape == (0,)
