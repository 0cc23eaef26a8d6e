import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triangles import smooth_normals, split_polygons


def areas(polygons):
    polygon, pick = split_polygons(polygons)
    corners = polygons[polygon[:, None], pick]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return polygon, cross / 2


def newell(polygon):
    return np.cross(polygon, np.roll(polygon, -1, axis=0)).sum(axis=0) / 2


def test_triangles_and_squares_become_fans():
    triangle = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], dtype=float)
    polygon, pick = split_polygons(np.concatenate([triangle, triangle + 1]))
    assert polygon.tolist() == [0, 1]
    assert pick.tolist() == [[0, 1, 2], [0, 1, 2]]
    square = np.array([[[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]]], dtype=float)
    polygon, pick = split_polygons(square)
    assert polygon.tolist() == [0, 0]
    assert pick.tolist() == [[0, 1, 2], [0, 2, 3]]


@given(
    radii=st.lists(st.floats(0.2, 1), min_size=4, max_size=12),
    turn=st.floats(0, 6),
    is_mirrored=st.booleans(),
)
def test_a_star_is_covered_once_and_keeps_its_side(radii, turn, is_mirrored):
    angle = turn + np.arange(len(radii)) * 2 * np.pi / len(radii)
    flat = np.array(radii)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if is_mirrored:
        flat = flat * (1, -1)
    across, upwards = np.array([0.6, 0.0, 0.8]), np.array([0.0, 1.0, 0.0])
    star = flat @ np.stack([across, upwards])  # [K, 3] in a slanted plane
    _, parts = areas(star[None])
    assert len(parts) == len(radii) - 2
    whole = newell(star)
    # Doubles; the areas are about 1.
    np.testing.assert_allclose(parts.sum(axis=0), whole, atol=1e-9)
    assert np.linalg.norm(parts, axis=1).sum() == pytest.approx(np.linalg.norm(whole), abs=1e-6)


def test_a_notch_is_left_open():
    arrow = np.array([[[0, 0, 0], [2, -1, 0], [0.5, 0, 0], [2, 1, 0]]], dtype=float)
    _, parts = areas(arrow)
    assert (
        parts[:, 2] > 0
    ).all()  # a fan from the first corner would do; from another it would not
    turned = np.roll(arrow, 1, axis=1)
    _, parts = areas(turned)
    assert (parts[:, 2] > 0).all()
    assert parts[:, 2].sum() == pytest.approx(newell(arrow[0])[2])


def fold(degrees):
    """Two triangles that share an edge along z, the second bent down, vertices numbered twice."""
    angle = np.radians(degrees)
    left, right = (-1.0, 0.0, 0.0), (np.cos(angle), -np.sin(angle), 0.0)
    corners = np.array([[(0, 0, 0), left, (0, 0, 1)], [(0, 0, 1), right, (0, 0, 0)]], dtype=float)[
        :, ::-1
    ]
    return corners, np.arange(6).reshape(2, 3)


@pytest.mark.parametrize("degrees", [10, 40])
def test_a_gentle_fold_is_smooth(degrees):
    corners, vertex = fold(degrees)
    normals = smooth_normals(corners, vertex)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=2), 1, atol=1e-12)
    half = np.radians(degrees / 2)
    between = np.abs(normals[0, 0])  # at the shared edge; both triangles are equally large
    np.testing.assert_allclose(between, [np.sin(half), np.cos(half), 0], atol=1e-9)
    np.testing.assert_allclose(np.abs(normals[0, 1]), [0, 1, 0], atol=1e-9)


def test_a_sharp_fold_stays_sharp():
    corners, vertex = fold(80)
    normals = smooth_normals(corners, vertex)
    assert np.ptp(normals[0], axis=0).max() == 0
    assert np.ptp(normals[1], axis=0).max() == 0
    assert normals[0, 0] @ normals[1, 0] == pytest.approx(np.cos(np.radians(80)))


def test_the_hub_of_a_fine_disc_keeps_flat_normals():
    angle = np.linspace(0, 2 * np.pi, 101)
    rim = np.stack([np.cos(angle), np.full(101, -0.1), np.sin(angle)], axis=1)
    corners = np.stack([np.zeros((100, 3)), rim[1:], rim[:-1]], axis=1)
    vertex = np.stack([np.zeros(100, int), np.arange(1, 101), np.arange(100)], axis=1)
    normals = smooth_normals(corners, vertex)
    assert np.isfinite(normals).all()
    assert len(np.unique(normals[:, 0].round(6), axis=0)) == 100
