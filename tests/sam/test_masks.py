"""What ``Masks`` gives to notebooks and to other tools."""

import io
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from tinyvit.errors import MissingExtraError
from tinyvit.image_spec import ImageSpec
from tinyvit.sam.masks import Masks
from tinyvit.sam.prompts import Prompt
from tinyvit.train import open_mask_set

HEIGHT, WIDTH = 48, 64


@pytest.fixture
def made():
    """A square, a ring in two parts, and nothing, of an image that is the model's input."""
    logits = np.full((3, 1, 16, 16), -8, np.float32)
    logits[0, 0, 2:6, 3:9] = 8
    logits[1, 0, 1:8, 1:8] = 8
    logits[1, 0, 3:6, 3:6] = -8
    logits[1, 0, 10:11, 12:14] = 8
    prompts = Prompt([[20, 12]], name="cat"), Prompt(box=[4, 4, 32, 32]), Prompt([[1, 1]])
    placement = ImageSpec.sam(64).place(HEIGHT, WIDTH)
    scores = tuple(np.array([score], np.float32) for score in (0.9, 0.5, 0.1))
    return Masks(prompts, tuple(logits), scores, placement, 4.0)


def test_it_is_indexed_and_stacked(made):
    assert np.array_equal(made[0], made.mask(0))
    assert np.array_equal(made[-1], made.mask(2))
    with pytest.raises(IndexError, match="there are 3 prompts; there is no prompt 3"):
        made[3]
    stacked = np.asarray(made)
    assert stacked.shape == (3, HEIGHT, WIDTH) and stacked.dtype == bool
    assert np.array_equal(stacked, [*made])
    assert np.asarray(made, np.uint8).dtype == np.uint8
    none = Masks((), (), (), made.placement, 4.0)
    assert np.asarray(none).shape == (0, HEIGHT, WIDTH)


def test_the_overlay_colours_masks_and_leaves_the_rest(made):
    image = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    drawn = made.overlay(image)
    assert drawn.shape == image.shape and (image == 100).all()
    assert (drawn[16, 30] != 100).any()  # in the square, away from the click
    assert (drawn[46, 5] == 100).all()
    with pytest.raises(ValueError):
        made.overlay(image[:20])
    with Image.open(io.BytesIO(made._repr_png_())) as png:
        assert png.size == (WIDTH, HEIGHT)


def test_polygons_follow_the_edges_of_pixels(made):
    square, ring, empty = made.polygons()
    (corners,) = square
    x0, y0, x1, y1 = made.boxes[0]
    assert {(x0, y0), (x1, y1)} & {tuple(corner) for corner in corners.tolist()} or len(corners) > 4
    assert (corners.min(0).tolist(), corners.max(0).tolist()) == ([x0, y0], [x1, y1])
    assert len(ring) == 3 and empty == []
    assert sum(map(len, made.polygons(1.0)[0])) <= len(corners)


def test_labelme_reads_them_back(made, tmp_path):
    content = made.to_labelme("a.png", tolerance=0)
    kinds = [(shape["label"], shape["shape_type"]) for shape in content["shapes"]]
    assert kinds == [("cat", "polygon"), ("object", "mask")]
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(content))
    ((_, masks),) = [scene.load() for scene in open_mask_set(tmp_path).scenes]
    assert np.array_equal(masks[0], made[0])
    assert np.array_equal(masks[1], made[1])


def test_yolo_has_a_line_for_each_part(made):
    lines = made.to_yolo(7, tolerance=0)
    assert [line.split()[0] for line in lines] == ["7", "7", "7"]
    numbers = np.array(lines[0].split()[1:], float).reshape(-1, 2) * [WIDTH, HEIGHT]
    np.testing.assert_allclose(numbers, made.polygons()[0][0], atol=1e-3)


def test_supervision_is_asked_only_where_it_is_installed(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtraError, match="pip install supervision"):
        made.to_supervision()
    stub = types.ModuleType("supervision")
    stub.Detections = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "supervision", stub)
    found = made.to_supervision()
    np.testing.assert_array_equal(found.xyxy, made.boxes)
    assert found.mask.shape == (3, HEIGHT, WIDTH)
    np.testing.assert_allclose(found.confidence, [0.9, 0.5, 0.1])
