import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raytrace
from materials import Material
from meshes import read_obj
from raytrace import GRID, Camera, View, direction_of

from .ray_cast import PlainScene

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


SQUARE = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
FRONT = View(0, 0, longest_side=16, lamp_azimuth=0, lamp_elevation=10)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Every test but the last goes without Embree."""
    monkeypatch.setattr(raytrace, "_scene", PlainScene)


def mesh_of(text, *materials):
    """A mesh whose materials are these, in the order in which the text names them."""
    mesh = read_obj(SQUARE + text, lambda name: None)
    return type(mesh)(**{**vars(mesh), "materials": materials or mesh.materials})


def square(*materials):
    return mesh_of("f 1/1 2/2 3/3 4/4\n", *materials)


def texture(*rows):
    return np.array(rows, dtype=np.float32)


WHITE, RED, GREEN, BLUE = ((*colour, 1) for colour in [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])


def test_a_square_fills_its_image():
    image = raytrace.render(square(Material((1, 0, 0))), FRONT)
    assert image.dtype == np.uint8
    assert image.shape == (16, 16, 4)
    assert (image[1:-1, 1:-1, 3] == 255).all()
    assert (image[..., 0] > image[..., 1]).all()


def test_textures_are_the_right_way_round():
    texels = texture([RED, GREEN], [BLUE, WHITE])  # as one sees it: red is top left
    image = raytrace.render(square(Material((1, 1, 1), texture=texels)), FRONT)[..., :3]
    assert image[3, 3].argmax() == 0
    assert image[3, -4].argmax() == 1
    assert image[-4, 3].argmax() == 2
    assert image[-4, -4].min() > 100


def test_from_behind_it_is_lit_and_mirrored():
    texels = texture([RED, GREEN])
    material = Material((1, 1, 1), texture=texels)
    view = View(180, 0, longest_side=16, lamp_azimuth=180, lamp_elevation=10)
    image = raytrace.render(square(material), view)[..., :3]
    assert image[8, 3].argmax() == 1
    front = raytrace.render(square(material), FRONT)[..., :3]
    # The sky's directions turn with the lamp, so that both sides get the same light.
    np.testing.assert_allclose(image[8, 3, 1], front[8, -4, 1], atol=2)


def test_alpha_is_the_share_of_a_pixel():
    triangle = mesh_of("f 1 2 3\n")
    image = raytrace.render(triangle, View(0, 0, longest_side=40))
    # Half of the square: the outline's pixels are known to one ray of 16 each.
    assert image[..., 3].mean() / 255 == pytest.approx(0.5 * 39**2 / 40**2, abs=0.01)
    levels = set(np.unique(image[..., 3]))
    assert {0, 255} < levels
    assert all(min(abs(level - 255 * k / 16) for k in range(17)) < 1 for level in levels)


def test_colours_at_an_edge_are_straight():
    image = raytrace.render(mesh_of("f 1 2 3\n"), View(0, 0, longest_side=24))
    partly = (image[..., 3] > 0) & (image[..., 3] < 255)
    inside = image[image[..., 3] == 255][:, :3].astype(int)
    assert partly.sum() > 10
    # One surface in one light: what alpha mixes in would be darker by a half.
    assert np.abs(image[partly][:, :3].astype(int) - np.median(inside, axis=0)).max() < 20
    assert (image[image[..., 3] == 0] == 0).all()


def test_holes_in_a_texture_are_holes():
    hole = (0, 0, 0, 0)
    texels = texture([RED, RED, hole, hole] * 2)
    image = raytrace.render(square(Material((1, 1, 1), texture=texels)), FRONT)
    assert image[8, 2, 3] > 220  # a ray at the edge of a texel may miss
    assert image[8, 6, 3] == 0
    seen = image[image[..., 3] > 0]
    assert (seen[:, 1] < 30).all()  # no dark or other colour creeps in from the holes' texels
    assert (seen[:, 0] > 100).all()


def test_glass_lets_through_what_is_behind():
    text = (
        "v -1 -1 -1\nv 1 -1 -1\nv 1 1 -1\nv -1 1 -1\n"
        "usemtl glass\nf 1 2 3 4\nusemtl wall\nf 5 6 7 8\n"
    )
    glass, wall = Material((0, 0, 1), opacity=0.6), Material((1, 0, 0))
    both = raytrace.render(mesh_of(text, Material(), glass, wall), FRONT)
    alone = raytrace.render(square(glass), FRONT)
    assert both[8, 8, 3] == 255
    assert min(both[8, 8, 0], both[8, 8, 2]) > 40
    assert alone[8, 8, 3] == round(0.6 * 255)
    assert alone[8, 8, 0] < 20


def test_what_is_shaded_is_darker():
    floor = "v -1 0 -1\nv -1 0 1\nv 1 0 1\nv 1 0 -1\nf 5 6 7 8\n"
    roof = "v -1 .3 -1\nv -1 .3 0\nv 1 .3 0\nv 1 .3 -1\nf 9 10 11 12\n"
    view = View(0, 30, longest_side=24, lamp_elevation=80)
    light = raytrace.render(mesh_of(floor), view)
    dark = raytrace.render(mesh_of(floor + roof), view)
    assert dark[-3, 12, :3].mean() > 0.8 * light[-3, 12, :3].mean()  # in front of the roof
    covered = dark[int(0.45 * len(dark)) : int(0.6 * len(dark)), 12, :3].mean(axis=1).min()
    assert covered < 0.75 * light[light.shape[0] // 2, 12, :3].mean()


def test_more_exposure_is_brighter_and_never_wraps():
    views = [View(0, 0, longest_side=8, exposure=e) for e in (0.3, 1, 3, 30)]
    means = [raytrace.render(square(Material((1, 1, 1))), view)[4, 4, 0] for view in views]
    assert means == sorted(means)
    assert means[0] < means[1] < means[2]


def test_a_mesh_from_its_edge_shows_nothing():
    with pytest.raises(ValueError, match="nothing can be seen in this view"):
        raytrace.render(mesh_of("f 1 2 3 4\n", Material(opacity=0.001)), FRONT)


def test_embree_sees_what_the_plain_tracer_sees(monkeypatch):
    pytest.importorskip("embreex")
    cube = (
        "v -1 -1 -1\nv 1 -1 -1\nv 1 1 -1\nv -1 1 -1\nf 5 6 7 8\nf 1 2 6 5\nf 2 3 7 6\nf 1 4 8 5\n"
    )
    view = View(25, 30, roll=3, longest_side=32)
    plain_image = raytrace.render(mesh_of(cube), view).astype(int)
    monkeypatch.undo()
    image = raytrace.render(mesh_of(cube), view).astype(int)
    assert image.shape == plain_image.shape
    # float32 against float64: a ray on an edge may fall to the other side.
    assert (np.abs(image - plain_image) > 3).mean() < 0.02


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "embreex.mesh_construction", None)
    with pytest.raises(
        ImportError, match=r"pip install -r recipes/default_model/requirements\.txt"
    ):
        raytrace.render(square(), FRONT)
