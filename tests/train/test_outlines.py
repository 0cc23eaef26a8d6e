import numpy as np
import pytest
from PIL import Image

from tinyvit.errors import ImageError
from tinyvit.sam.mask_ops import encode
from tinyvit.train.data.mask_formats import (
    MaskFile,
    Polygons,
    RunLengths,
    fill_polygon,
    object_ids,
    read_mask_file,
)


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
    mask = Polygons.read([square, other]).mask((10, 10))
    assert mask.sum() == 9 + 16
    assert mask[:3, :3].all()
    assert mask[6:, 6:].all()


def test_bad_polygons():
    for rings, words in (([], "came none"), ([[1, 2, 3, 4]], "three points"), ([["a"]], "numbers")):
        with pytest.raises(ValueError, match=words):
            Polygons.read(rings)
    outside = Polygons.read([[30, 30, 50, 30, 50, 50]])
    with pytest.raises(ValueError, match="the mask is empty"):
        outside.check((10, 10))


def test_run_lengths_both_ways():
    mask = np.random.default_rng(0).random((7, 9)) > 0.5
    for compressed in (True, False):
        outline = RunLengths.read(encode(mask, compressed))
        np.testing.assert_array_equal(outline.mask((7, 9)), mask)
    with pytest.raises(ValueError, match=r"9 x 7 pixels .* but the image is 7 x 9"):
        outline.check((9, 7))
    with pytest.raises(ValueError, match="run lengths want"):
        RunLengths.read({"counts": [1, 2]})


def test_ids_in_a_file(tmp_path):
    ids = saved(tmp_path / "ids.png", [[0, 1, 1], [7, 7, 0]])
    found = read_mask_file(ids, is_one_object=False)
    assert object_ids(found) == [1, 7]
    np.testing.assert_array_equal(MaskFile(ids, 7).mask((2, 3)), [[0, 0, 0], [1, 1, 0]])
    MaskFile(ids, 7).check((2, 3))
    with pytest.raises(ValueError, match="3 x 2 pixels"):
        MaskFile(ids, 7).check((3, 2))


def test_a_grey_file_with_255_is_one_soft_mask(tmp_path):
    soft = saved(tmp_path / "soft.png", [[0, 100, 255]])
    np.testing.assert_array_equal(read_mask_file(soft, is_one_object=False), [[0, 0, 1]])


def test_colours_and_palettes(tmp_path):
    colours = saved(tmp_path / "colours.png", [[[0, 0, 0], [255, 0, 0], [0, 255, 0]]])
    assert object_ids(read_mask_file(colours, is_one_object=False)) == [0x00FF00, 0xFF0000]
    image = Image.fromarray(np.array([[0, 1, 255, 2]], np.uint8)).convert("P")
    image.putdata([0, 1, 255, 2])
    image.putpalette([value // 3 for value in range(768)])
    image.save(tmp_path / "voc.png")
    assert object_ids(read_mask_file(tmp_path / "voc.png", is_one_object=False)) == [1, 2]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ImageError, match=r"there is no mask file .*none.png"):
        read_mask_file(tmp_path / "none.png", is_one_object=True)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad.png cannot be read"):
        MaskFile(tmp_path / "bad.png").mask((2, 2))
