import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from meshes import read_library, read_obj, smooth_normals, split_polygons


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


SQUARE = "v 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0\n"


def no_file(name):
    return None


def library(**more):
    """A library of one slab, twice as wide as high, whose front is red."""
    files = {
        "PluginFurnitureCatalog.properties": (
            "# model#9=/no/no.obj\nid=x\n"
            "name#1=Slab\nmodel#1=/Things/slab/Slab.obj\nwidth#1=50\ndepth#1=10.0\nheight#1=40\n"
            "model#2=/Things/other/other.dae\nwidth#2=1\ndepth#2=1\nheight#2=1\n"
        ),
        "things/slab/slab.obj": "mtllib the slab.mtl\nusemtl a b\n" + SQUARE + "f 1 2 3 4\n",
        "things/slab/the slab.mtl": "newmtl a b\nKd 1 0 0\nmap_Kd C:\\Images\\Red Paint.PNG\n",
        "things/other/other.dae": "<xml/>",
    }
    files |= more
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def png(*colour):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_square_becomes_two_triangles():
    mesh = read_obj(SQUARE + "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nf 1/1 2/2 3/3 4/4\n", no_file)
    assert mesh.corners.dtype == mesh.normals.dtype == mesh.texture_points.dtype == np.float32
    np.testing.assert_array_equal(mesh.corners[0], [[0, 0, 0], [2, 0, 0], [2, 1, 0]])
    np.testing.assert_array_equal(mesh.corners[1], [[0, 0, 0], [2, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(mesh.texture_points[1], [[0, 0], [1, 1], [0, 1]])
    np.testing.assert_allclose(mesh.normals, np.broadcast_to([0, 0, 1], (2, 3, 3)), atol=1e-7)
    assert mesh.material_index.tolist() == [0, 0]


def test_numbers_may_count_from_the_end():
    from_start = read_obj(SQUARE + "f 1 2 3\n", no_file)
    from_end = read_obj(SQUARE + "f -4 -3 -2\n", no_file)
    np.testing.assert_array_equal(from_start.corners, from_end.corners)


def test_given_normals_are_kept_and_made_unit():
    text = SQUARE + "vn 0 3 4\nvn 0 0 0\nf 1//1 2//2 3\n"
    normals = read_obj(text, no_file).normals[0]
    # The second is of length 0 and the third is missing: both are made from the triangle.
    np.testing.assert_allclose(normals, [[0, 0.6, 0.8], [0, 0, 1], [0, 0, 1]], atol=1e-7)


def test_a_line_may_go_on_and_extra_numbers_do_not_matter():
    text = "v 0 0 0 1\nv 1 0 0 1\nv 0 1 0 1\nvt 1 2 3\nl 1 2\nf 1/1 2/1 \\\n 3/1\n"
    mesh = read_obj(text, no_file)
    assert len(mesh.corners) == 1
    np.testing.assert_array_equal(mesh.texture_points[0, 2], [1, 2])


def test_what_cannot_be_seen_is_left_out():
    materials = b"newmtl air\nd 0\nnewmtl wood\nKd 1 1 1\n"
    text = "mtllib m\n" + SQUARE + "usemtl air\nf 1 2 3\nusemtl wood\nf 1 3 4\nf 1 1 2\n"
    mesh = read_obj(text, {"m": materials}.get)
    assert len(mesh.corners) == 1
    assert mesh.materials[mesh.material_index[0]].diffuse == (1, 1, 1)


@pytest.mark.parametrize(
    "text, words",
    [
        (SQUARE + "f 1 2 5\n", "the corner '5', but there are only 4 so far"),
        (SQUARE + "f 1 2 -5\n", "the corner '-5', but there are only 4 so far"),
        (SQUARE + "f 1 2 0\n", "the corner '0'"),
        (SQUARE + "f 1 2 /1\n", "the corner '/1', which has no position"),
        (SQUARE + "f 1 2 x\n", "the corner 'x', wanted numbers as 1/2/3"),
        ("v 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "the vertices are no rows of numbers"),
        (SQUARE, "of 0 triangles none has an area and can be seen"),
        (SQUARE + "f 1 1 2\n", "of 1 triangles none has an area and can be seen"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(text, words):
    with pytest.raises(ValueError, match=words):
        read_obj(text, no_file)


def test_a_library_gives_its_models_as_large_as_the_catalogue_says():
    image = png(255, 255, 255)
    models, read = read_library("Lib", library(**{"things/slab/red paint.png": image}))
    assert [(model.library, model.name) for model in models] == [("Lib", "slab")]
    mesh = read(models[0])
    # A flat slab has no depth to scale.
    np.testing.assert_allclose(mesh.corners.min(axis=(0, 1)), [-25, -20, 0])
    np.testing.assert_allclose(mesh.corners.max(axis=(0, 1)), [25, 20, 0])
    painted = mesh.materials[mesh.material_index[0]]
    assert painted.diffuse == (1, 0, 0)
    assert painted.texture.shape == (2, 2, 4)


def test_a_model_is_turned_before_it_is_scaled():
    catalogue = (
        "model#1=things/slab/slab.obj\nwidth#1=10\ndepth#1=30\nheight#1=20\n"
        "modelRotation#1=0 0 1 0 1 0 -1 0 0\n"  # x becomes -z, z becomes x
    )
    models, read = read_library("L", library(**{"PluginFurnitureCatalog.properties": catalogue}))
    mesh = read(models[0])
    np.testing.assert_allclose(np.ptp(mesh.corners, axis=(0, 1)), [0, 20, 30], atol=1e-5)
    np.testing.assert_allclose(mesh.normals[:, :, 0], 1, atol=1e-6)


def test_a_model_without_triangles_is_named():
    models, read = read_library("Lib", library(**{"things/slab/slab.obj": "v 0 0 0\n"}))
    with pytest.raises(ValueError, match="Lib/slab: of 0 triangles"):
        read(models[0])


@pytest.mark.parametrize(
    "data", [b"", b"no zip", library()[:100]], ids=["empty", "other", "cut off"]
)
def test_a_damaged_library_is_refused(data):
    with pytest.raises(ValueError, match="Lib is no furniture library"):
        read_library("Lib", data)


def test_a_zip_without_a_catalogue_is_refused():
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    with pytest.raises(ValueError, match="Lib is no furniture library"):
        read_library("Lib", buffer.getvalue())
