import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvit.image_spec import ImageSpec, Placement

SIDES = st.integers(1, 3000)
SPECS = {
    "sam": ImageSpec.sam(),
    "sam_unpadded": ImageSpec.sam(512, pad=False),
    "sam_rectangle": ImageSpec.sam((224, 320)),
    "timm_224": ImageSpec.timm(224),
    "timm_384": ImageSpec.timm(384),
    "timm_512": ImageSpec.timm(512),
    "cream_224": ImageSpec.cream(224),
    "litemedsam": ImageSpec.litemedsam(),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def test_it_needs_only_the_standard_library():
    heavy = "torch", "numpy", "PIL"
    code = f"import sys, tinyvit.image_spec; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_known_specs():
    assert SPECS["sam"] == ImageSpec((1024, 1024), "longest_side", pad=True)
    assert SPECS["sam"].mean == (123.675, 116.28, 103.53)
    assert SPECS["sam"].std == (58.395, 57.12, 57.375)
    assert SPECS["timm_224"] == ImageSpec((224, 224), "crop", "bicubic", shorter_side=235)
    assert SPECS["timm_384"] == ImageSpec((384, 384), "crop", "bicubic", shorter_side=384)
    assert SPECS["timm_512"] == ImageSpec((512, 512), "squash", "bicubic")
    assert SPECS["cream_224"] == ImageSpec((224, 224), "crop", "bicubic", shorter_side=256)
    assert ImageSpec.cream(384) == SPECS["timm_384"]
    assert ImageSpec.cream(512) == SPECS["timm_512"]
    assert ImageSpec.timm(512, crop_pct=1.0).resize == "crop"
    assert SPECS["litemedsam"].normalise == "min_max"
    assert SPECS["litemedsam"].pad


# the rule int(side * 1024 / longest + 0.5), worked out by hand
SAM_SIZES = {
    (480, 640): (768, 1024),
    (640, 480): (1024, 768),
    (333, 500): (682, 1024),
    (1200, 1800): (683, 1024),
    (1024, 1024): (1024, 1024),
    (1, 1000): (1, 1024),
    (3, 7): (439, 1024),
    (2047, 1023): (1024, 512),
    (1, 3000): (1, 1024),  # 0.34 pixels, kept at 1
    (60, 97): (633, 1024),
}


@pytest.mark.parametrize(("old", "new"), SAM_SIZES.items())
def test_sam_sizes(old, new):
    assert ImageSpec.sam().place(*old) == Placement(old, new, (0, 0), (1024, 1024))
    assert ImageSpec.sam(pad=False).place(*old).model_size == new


def test_a_rectangle_holds_the_whole_image():
    assert SPECS["sam_rectangle"].place(448, 320).resized_size == (224, 160)
    assert SPECS["sam_rectangle"].place(100, 320).resized_size == (100, 320)


def test_crop_follows_torchvision():
    # 235 * 640 / 480 = 313.3; (313 - 224) / 2 = 44.5 -> 44 (to even); (235 - 224) / 2 = 5.5 -> 6
    assert SPECS["timm_224"].place(480, 640) == Placement(
        (480, 640), (235, 313), (6, 44), (224, 224)
    )
    assert SPECS["timm_224"].place(640, 480).resized_size == (313, 235)
    assert SPECS["cream_224"].place(256, 512).crop_offset == (16, 144)


@settings(deadline=None)
@given(height=SIDES, width=SIDES)
@specs
def test_a_placement_is_always_possible(spec, height, width):
    place = spec.place(height, width)
    assert place.original_size == (height, width)
    assert min(place.resized_size) >= 1
    for new, offset, model in zip(
        place.resized_size, place.crop_offset, place.model_size, strict=True
    ):
        if spec.resize == "crop":
            assert 0 <= offset <= new - model
        else:
            assert offset == 0
            assert new <= model
    if spec.resize == "longest_side":
        assert any(n == s for n, s in zip(place.resized_size, spec.size, strict=True))


@settings(deadline=None)
@given(height=SIDES, width=SIDES, x=st.floats(0, 1), y=st.floats(0, 1))
@specs
def test_coordinates_come_back(spec, height, width, x, y):
    place = spec.place(height, width)
    box = [0.0, 0.0, x * width, y * height]
    # float64 keeps 15 digits of numbers up to 705000 (a strip for the crop), scaled by up to 3000
    np.testing.assert_allclose(place.boxes_to_image(place.boxes_to_model(box)), box, atol=1e-5)
    point = np.array([[x * width, y * height]])
    np.testing.assert_allclose(
        place.points_to_image(place.points_to_model(point)), point, atol=1e-5
    )
    assert place.boxes_to_model(box)[2:] == pytest.approx(place.points_to_model(point)[0].tolist())


@settings(deadline=None)
@given(height=SIDES, width=SIDES)
@specs
def test_the_image_fills_its_resized_size(spec, height, width):
    place = spec.place(height, width)
    (new_h, new_w), (top, left) = place.resized_size, place.crop_offset
    got = place.boxes_to_model([0, 0, width, height])
    assert got == pytest.approx([-left, -top, new_w - left, new_h - top])


def test_every_container_is_mapped_alike():
    place = SPECS["timm_224"].place(480, 640)
    points = [[10, 20], [639, 0]]
    scale_x, scale_y = 313 / 640, 235 / 480
    wanted = [[10 * scale_x - 44, 20 * scale_y - 6], [639 * scale_x - 44, -6]]
    got = place.points_to_model(points)
    assert got == pytest.approx(np.array(wanted))
    assert isinstance(got[0][0], float)
    assert place.points_to_model(((10, 20), (639, 0))) == (tuple(got[0]), tuple(got[1]))
    for array, dtype in (
        (np.array(points), np.float64),
        (np.array(points, np.uint16), np.float64),
        (np.array(points, np.float32), np.float32),
        (torch.tensor(points), torch.float32),
        (torch.tensor(points, dtype=torch.float64), torch.float64),
    ):
        before = array.tolist()
        mapped = place.points_to_model(array)
        assert mapped.dtype == dtype
        np.testing.assert_allclose(np.asarray(mapped), wanted, rtol=1e-6)  # float32
        assert array.tolist() == before


def test_shapes_are_kept_and_gradients_pass():
    place = SPECS["sam"].place(480, 640)
    assert place.points_to_model(np.zeros((0, 2))).shape == (0, 2)
    assert place.points_to_model([]) == []
    assert place.boxes_to_model(np.ones((5, 3, 4))).shape == (5, 3, 4)
    assert place.boxes_to_model([10, 20, 30, 40]) == [16.0, 32.0, 48.0, 64.0]
    points = torch.ones(3, 2, requires_grad=True)
    place.points_to_model(points).sum().backward()
    torch.testing.assert_close(points.grad, torch.full((3, 2), 1.6))


@pytest.mark.parametrize(
    ("points", "came"),
    [
        ([1, 2, 3], "3 of them"),
        ([[1, 2], [1]], "1 of them"),
        (np.zeros((2, 4)), r"shape \[2, 4\]"),
        (torch.zeros(()), r"shape \[\]"),
        ("12", "str"),
        ([[1, "2"]], "int|str"),
    ],
)
def test_wrong_points_are_named(points, came):
    place = SPECS["sam"].place(4, 4)
    with pytest.raises(ValueError, match=rf"wanted points \[\.\.\., 2\].*came .*({came})"):
        place.points_to_model(points)


def test_wrong_boxes_are_named():
    with pytest.raises(ValueError, match=r"wanted boxes \[\.\.\., 4\].*shape \[1, 2\]"):
        SPECS["sam"].place(4, 4).boxes_to_image(np.zeros((1, 2)))


@specs
def test_dictionaries_go_through_json(spec):
    assert ImageSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert len({spec, ImageSpec.from_dict(spec.to_dict())}) == 1


def test_dictionaries_name_their_wrong_keys():
    values = SPECS["sam"].to_dict()
    del values["size"]
    with pytest.raises(ValueError, match=r"missing \['size'\], unknown \['sizes'\]"):
        ImageSpec.from_dict({**values, "sizes": 3})


NAN = math.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": (0, 4)}, "size must be a whole number of pixels, at least 1, but is 0"),
        ({"size": (4, 4.5)}, "size must be a whole number .* 4.5"),
        ({"size": (4, True)}, "size must be a whole number .* True"),
        ({"size": (4, 4, 3)}, r"size must be \(height, width\)"),
        ({"resize": "fit"}, "resize must be one of longest_side, crop, squash, but is 'fit'"),
        ({"interpolation": "cubic"}, "interpolation must be one of bilinear, bicubic"),
        ({"normalise": "none"}, "normalise must be one of mean_std, min_max"),
        ({"mean": (1.0, 2.0)}, "mean must be three numbers"),
        ({"mean": (1.0, 2.0, NAN)}, "mean must be three finite numbers"),
        ({"std": 58.0}, "std must be three numbers"),
        ({"std": (1.0, "2", 3.0)}, "std must be three finite numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be above 0"),
        ({"pad": 1}, "pad must be True or False"),
        ({"resize": "squash", "pad": True}, "pad=True goes with resize='longest_side'"),
        ({"shorter_side": 9}, "shorter_side goes with resize='crop', not 'longest_side'"),
        ({"resize": "crop"}, "shorter_side must be a whole number"),
        ({"resize": "crop", "shorter_side": 7}, "shorter_side must be at least 8"),
    ],
)
def test_wrong_specs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ImageSpec(**{"size": (4, 8), "resize": "longest_side", **change})


@pytest.mark.parametrize("crop_pct", [0, -1, 1.01, NAN])
def test_wrong_crop_pct(crop_pct):
    with pytest.raises(ValueError, match="crop_pct must be above 0 and at most 1"):
        ImageSpec.timm(224, crop_pct)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5, 2.0), (None, 5)])
def test_wrong_image_sizes(size):
    with pytest.raises(ValueError, match=r"(height|width) must be a whole number of pixels"):
        SPECS["sam"].place(*size)


def test_numpy_integers_are_numbers():
    assert SPECS["sam"].place(np.int64(480), np.int32(640)) == SPECS["sam"].place(480, 640)


@pytest.mark.parametrize(
    "spec, size, grid, cells",
    [
        (ImageSpec.sam(1024), (480, 640), (64, 64), (48, 64)),
        (ImageSpec.sam(1024), (1, 1000), (64, 64), (1, 64)),
        (ImageSpec.sam(64), (33, 64), (4, 4), (3, 4)),  # the third row covers one line of it
        (ImageSpec.sam(64, pad=False), (33, 64), (3, 4), (3, 4)),
        (ImageSpec.timm(224), (300, 900), (7, 7), (7, 7)),
        (ImageSpec.sam3(), (300, 900), (72, 72), (72, 72)),
    ],
)
def test_cells_that_cover_the_image(spec, size, grid, cells):
    assert spec.place(*size).cells(grid) == cells
