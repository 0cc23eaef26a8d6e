import csv
import json

import numpy as np
import pytest
from PIL import Image

from tinyvit.sam.mask_ops import encode
from tinyvit.train.data.masks import open_mask_set

from .shapes import shapes, write_shapes

BOX = [10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]


def image(path, size=(48, 64)):
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)


def coco(tmp_path, annotations, **row):
    image(tmp_path / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 48, "width": 64, **row}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path / "all.json"


def test_coco_with_polygons_and_run_lengths(tmp_path):
    mask = shapes(0)[1][0]
    rows = [
        {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [BOX]},
        {"id": 2, "image_id": 7, "category_id": 9, "segmentation": encode(mask)},
        {"id": 3, "image_id": 7, "segmentation": encode(mask, False), "iscrowd": 1},
        {"id": 4, "image_id": 8, "segmentation": [BOX]},
        {"id": 5, "image_id": 7, "segmentation": []},
    ]
    found = open_mask_set(coco(tmp_path, rows))
    _, masks = found[0].load()
    assert found[0].labels == ("cat", "")
    assert masks[0].sum() == 400
    np.testing.assert_array_equal(masks[1], mask)
    words = " ".join(found.faults)
    for expected in ("3: a crowd", "4: there is no image with the id 8", "5: wanted a list"):
        assert expected in words
    assert open_mask_set(tmp_path).objects == 2  # the folder finds its JSON


def test_coco_of_another_size(tmp_path):
    path = coco(tmp_path, [{"id": 1, "image_id": 7, "segmentation": [BOX]}], width=100)
    with pytest.raises(ValueError, match=r"masks are for 100 x 48 .* the image is 64 x 48"):
        open_mask_set(path)


def test_labelme(tmp_path):
    image(tmp_path / "a.png")
    square = [[0, 0], [10, 0], [10, 10], [0, 10]]
    shapes_ = [
        {"label": "cat", "points": [[10, 5], [30, 25]], "shape_type": "rectangle"},
        {"label": "ball", "points": [[30, 30], [40, 30]], "shape_type": "circle"},
        {"label": "dog", "points": square, "group_id": 1},
        {"label": "dog", "points": (np.array(square) + 20).tolist(), "group_id": 1},
        {"label": "line", "points": square, "shape_type": "linestrip"},
    ]
    content = {"shapes": shapes_, "imagePath": "a.png", "imageHeight": 48, "imageWidth": 64}
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = open_mask_set(tmp_path)
    _, masks = found[0].load()
    assert found[0].labels == ("cat", "ball", "dog")
    assert masks.sum((1, 2))[[0, 2]].tolist() == [400, 200]
    assert masks[1].sum() == pytest.approx(np.pi * 100, rel=0.03)  # pixels at the rim
    assert "a linestrip has no area" in found.faults[0]


def test_csv(tmp_path):
    write_shapes(tmp_path, 2)
    rows = [
        {"image": "image0.png", "mask": "image0_0.png", "label": "disc"},
        {"image": "image0.png", "mask": "image0_1.png", "label": "box"},
        {"image": "image1.png", "mask": "", "label": ""},
    ]
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = open_mask_set(tmp_path)
    assert [scene.labels for scene in found] == [("disc", "box")]
    assert "line 4: no image or no mask" in found.faults[0]


def test_a_csv_without_the_columns(tmp_path):
    (tmp_path / "a.csv").write_text("left,right\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns 'picture' .* it has left, right"):
        open_mask_set(tmp_path)


def test_folders(tmp_path):
    write_shapes(tmp_path, 2)
    masks = tmp_path / "masks"
    ids = np.zeros((48, 64), np.uint8)
    ids[:10, :10], ids[20:30, 20:30] = 4, 9
    Image.fromarray(ids).save(masks / "many.png")
    image(tmp_path / "images" / "many.png")
    image(tmp_path / "images" / "own.png")
    image(tmp_path / "images" / "bare.png")
    (masks / "own").mkdir()
    Image.fromarray((ids > 0).astype(np.uint8) * 255).save(masks / "own" / "first.png")
    Image.fromarray(ids).save(masks / "stranger.png")
    found = open_mask_set(tmp_path)
    assert {scene.name: len(scene) for scene in found} == {
        "many.png": 2,
        "own.png": 1,
        "image0.png": 2,
        "image1.png": 2,
    }
    many = next(scene for scene in found if scene.name == "many.png")
    assert many.load()[1].sum((1, 2)).tolist() == [100, 100]
    words = " ".join(found.faults)
    assert "stranger.png belongs to no image" in words
    assert "bare.png has no masks" in words


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="there is nothing at"):
        open_mask_set(tmp_path / "none")
    with pytest.raises(ValueError, match="is no data set that is known"):
        open_mask_set(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        open_mask_set(tmp_path, tmp_path / "none")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, but holds a list"):
        open_mask_set(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"x": 1}')
    with pytest.raises(ValueError, match="neither COCO's JSON"):
        open_mask_set(tmp_path / "a.json")
