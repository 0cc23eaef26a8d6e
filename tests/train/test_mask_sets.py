import numpy as np
import pytest
from PIL import Image

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
    assert "3 images with 4 masks; left out 3: " in found.describe()
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
