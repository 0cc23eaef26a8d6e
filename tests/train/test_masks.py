import csv
import json

import numpy as np
import pytest
from PIL import Image

from tinyvit.errors import ImageError
from tinyvit.images.mask_ops import encode
from tinyvit.train.data.annotations import (
    MaskFile,
    Polygons,
    RunLengths,
    fill_polygon,
    read_mask_file,
)
from tinyvit.train.data.masks import open_mask_set

from .shapes import shapes, write_shapes


def test_images_and_masks_come_back_as_they_were(tmp_path):
    found = open_mask_set(write_shapes(tmp_path, 2))
    assert (len(found), found.objects, found.faults) == (2, 4, ())
    for number, scene in enumerate(found):
        image, masks = scene.load()
        np.testing.assert_array_equal(image, shapes(number)[0])
        np.testing.assert_array_equal(masks, shapes(number)[1])


def test_faults_are_counted_and_named(tmp_path):
    write_shapes(tmp_path, 4)
    (tmp_path / "images" / "image0.png").write_bytes(b"broken")
    Image.new("L", (64, 48), 0).save(tmp_path / "masks" / "image1_0.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "masks" / "image2_1.png")
    found = open_mask_set(tmp_path)
    assert [len(scene) for scene in found] == [1, 1, 2]
    for fault, name, words in zip(
        found.faults,
        ("image0.png", "image1.png", "image2.png"),
        ("not an image", "mask is empty", "9 x 9 pixels"),
        strict=True,
    ):
        assert name in fault
        assert words in fault
    assert "3 images with 4 masks; skipped 3: " in found.describe()
    with pytest.raises(ValueError, match=r"has faults: .*image0.png"):
        open_mask_set(tmp_path, on_fault="error")


def test_pixels_are_looked_at_only_when_asked(tmp_path):
    write_shapes(tmp_path, 2)
    path = tmp_path / "images" / "image0.png"
    path.write_bytes(path.read_bytes()[:1000])  # the header is whole
    assert len(open_mask_set(tmp_path)) == 2
    assert len(open_mask_set(tmp_path, check_pixels=True)) == 1


def test_nothing_good_is_an_error(tmp_path):
    write_shapes(tmp_path, 1)
    (tmp_path / "images" / "image0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image with a good mask: .*is empty \(0 bytes\)"):
        open_mask_set(tmp_path)


def test_a_split_shares_no_image_and_is_always_the_same(tmp_path):
    found = open_mask_set(write_shapes(tmp_path, 10))
    first, second = found.split(0.3, seed=1)
    assert (len(first), len(second)) == (7, 3)
    assert {s.name for s in first} | {s.name for s in second} == {s.name for s in found}
    assert found.split(0.3, seed=1) == (first, second)
    assert [len(part) for part in found.split(0.999)] == [1, 9]
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        found.split(1)


def test_wrong_choice(tmp_path):
    with pytest.raises(ValueError, match="on_fault must be 'skip' or 'error'"):
        open_mask_set(tmp_path, on_fault="maybe")


def saved(path, values):
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def test_a_polygon_holds_the_pixels_whose_centres_it_holds():
    turn = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    ring = np.stack([20 + 9.3 * np.cos(turn), 16 + 7.1 * np.sin(turn)], 1)
    y, x = np.mgrid[0.5:32, 0.5:40]
    exact = ((x - 20) / 9.3) ** 2 + ((y - 16) / 7.1) ** 2 <= 1
    assert (fill_polygon(ring, (32, 40)) != exact).sum() <= 4  # 200 corners are no ellipse yet


def test_polygons_are_joined_and_cut_at_the_image():
    square = [-5.0, -5.0, 3.0, -5.0, 3.0, 3.0, -5.0, 3.0]
    other = [[6.0, 6.0], [20.0, 6.0], [20.0, 20.0], [6.0, 20.0]]
    mask = Polygons.read([square, other])[0].mask((10, 10))
    assert mask.sum() == 9 + 16
    assert mask[:3, :3].all()
    assert mask[6:, 6:].all()


def test_bad_polygons():
    for rings, words in (([], "came none"), ([[1, 2, 3, 4]], "three points"), ([["a"]], "numbers")):
        with pytest.raises(ValueError, match=words):
            Polygons.read(rings)
    outside, _ = Polygons.read([[30, 30, 50, 30, 50, 50]])
    with pytest.raises(ValueError, match="the mask is empty"):
        outside.check((10, 10))


def test_run_lengths_both_ways():
    mask = np.random.default_rng(0).random((7, 9)) > 0.5
    for compressed in (True, False):
        annotation = RunLengths.read(encode(mask, compressed))
        np.testing.assert_array_equal(annotation.mask((7, 9)), mask)
    with pytest.raises(ValueError, match=r"9 x 7 pixels .* but the image is 7 x 9"):
        annotation.check((9, 7))
    with pytest.raises(ValueError, match="run lengths want"):
        RunLengths.read({"counts": [1, 2]})


def test_ids_in_a_file(tmp_path):
    ids = saved(tmp_path / "ids.png", [[0, 1, 1], [7, 7, 0]])
    found = read_mask_file(ids, is_one_object=False)
    assert np.unique(found).tolist() == [0, 1, 7]
    np.testing.assert_array_equal(MaskFile(ids, 7).mask((2, 3)), [[0, 0, 0], [1, 1, 0]])
    MaskFile(ids, 7).check((2, 3))
    with pytest.raises(ValueError, match="3 x 2 pixels"):
        MaskFile(ids, 7).check((3, 2))


def test_a_grey_file_with_255_is_one_soft_mask(tmp_path):
    soft = saved(tmp_path / "soft.png", [[0, 100, 255]])
    np.testing.assert_array_equal(read_mask_file(soft, is_one_object=False), [[0, 0, 1]])


def test_colours_and_palettes(tmp_path):
    colours = saved(tmp_path / "colours.png", [[[0, 0, 0], [255, 0, 0], [0, 255, 0]]])
    found = read_mask_file(colours, is_one_object=False)
    assert found.tolist() == [[0, 0xFF0000, 0x00FF00]]
    image = Image.fromarray(np.array([[0, 1, 255, 2]], np.uint8)).convert("P")
    image.putdata([0, 1, 255, 2])
    image.putpalette([value // 3 for value in range(768)])
    image.save(tmp_path / "voc.png")
    assert read_mask_file(tmp_path / "voc.png", is_one_object=False).tolist() == [[0, 1, 0, 2]]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ImageError, match=r"there is no mask file .*none.png"):
        read_mask_file(tmp_path / "none.png", is_one_object=True)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad.png cannot be read"):
        MaskFile(tmp_path / "bad.png").mask((2, 2))


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
    assert found[0].labels == ("cat", "", "")
    assert masks[0].sum() == 400
    for one in masks[1:]:  # run lengths are objects, also where a tool calls them a crowd
        np.testing.assert_array_equal(one, mask)
    words = " ".join(found.faults)
    for expected in ("4: there is no image with the id 8", "5: wanted a list"):
        assert expected in words
    assert open_mask_set(tmp_path).objects == 3  # the folder finds its JSON


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
