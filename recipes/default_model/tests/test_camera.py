import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camera import GRID, Camera, View, direction_of

CUBE = np.array(
    [[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], dtype=np.float32
)


def test_angles_point_where_they_say():
    np.testing.assert_allclose(direction_of(0, 0), [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(direction_of(90, 0), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(direction_of(77, 90), [0, 1, 0], atol=1e-12)


@given(
    azimuth=st.floats(0, 360),
    elevation=st.floats(-10, 60),
    roll=st.floats(-20, 20),
    field=st.floats(10, 50),
    side=st.integers(8, 400),
)
def test_every_corner_falls_into_the_window(azimuth, elevation, roll, field, side):
    view = View(azimuth, elevation, roll=roll, field=field, longest_side=side)
    camera = Camera(CUBE[:6].reshape(-1, 3, 3), view)
    height, width = camera.size
    assert max(height, width) == side
    # Where the corner lies between the rays of the first and of the last pixel, in pixels.
    origin, ways = camera.rays(np.array([0, height * width - 1]), (0, 0))
    flat = []
    for way in [*ways, *(CUBE[:6] - origin[0])]:
        depth = -(way @ camera.towards)
        flat.append([way @ camera.right / depth, -(way @ camera.up) / depth])
    first, last, *corners = np.array(flat)
    steps = np.maximum([width - 1, height - 1], 1)
    places = (np.array(corners) - first) / np.where(last > first, last - first, 1) * steps
    places += 0.5 / GRID
    # Rays are float32: 1e-6 of the distance, that is 1e-3 of a pixel at 400 pixels.
    assert (places > -0.01).all()
    if min(height, width) > 1:
        assert (places < np.array([width, height]) + 0.01).all()


def test_rays_run_from_left_to_right_and_downwards():
    camera = Camera(CUBE[:6].reshape(-1, 3, 3), View(0, 0, longest_side=10))
    height, width = camera.size
    _, ways = camera.rays(np.array([0, width - 1, (height - 1) * width]), (0, 0))
    assert ways[1, 0] > ways[0, 0]
    assert ways[2, 1] < ways[0, 1]
    np.testing.assert_allclose(np.linalg.norm(ways, axis=1), 1, atol=1e-6)
    _, lower = camera.rays(np.array([0]), (GRID - 1, 0))
    assert lower[0, 1] < ways[0, 1]
    assert lower[0, 0] == pytest.approx(ways[0, 0], abs=1e-3)
