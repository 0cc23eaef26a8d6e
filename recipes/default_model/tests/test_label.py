import numpy as np
import pytest
from PIL import Image

import label
from composites import CompositeSet
from manifest import Background, Row, read_rows


def disc(radius=0.5, x=0.0, y=0.0, soft=0.02):
    """What a sure network says of a disc in an image of 320 pixels."""
    rows, columns = np.mgrid[-1:1:320j, -1:1:320j]
    distance = np.hypot(columns - x, rows - y)
    return np.clip((radius - distance) / soft + 0.5, 0, 1).astype(np.float32)


def test_only_sure_answers_of_one_piece_and_a_fair_size_are_good():
    assert label.is_good(disc())
    assert not label.is_good(disc(0.1))  # 0.8 % of the image
    assert not label.is_good(disc(1.2))
    assert not label.is_good(disc(soft=2.0))  # undecided nearly everywhere
    assert not label.is_good(0.7 * disc())
    assert not label.is_good(np.maximum(disc(0.3, -0.6), disc(0.3, 0.6)))  # two things
    band = np.zeros((320, 320), np.float32)
    band[100:200] = 1
    assert not label.is_good(band) and not label.is_good(band.T)


def test_what_does_not_hang_together_is_left_out():
    found = label.largest_piece(np.maximum(disc(0.4, -0.3), disc(0.1, 0.7)))
    np.testing.assert_array_equal(found > 0.3, disc(0.4, -0.3) > 0.3)


def test_an_answer_is_kept_where_another_look_agrees():
    photograph = Image.new("RGB", (640, 480))
    sizes = []

    def steady(image):
        sizes.append(image.size)
        return disc()

    kept = list(label.find_things(photograph, steady))
    assert len(kept) == 9 and kept[0][0].size == (512, 384)
    assert all(found.shape == part.size[::-1] for part, found in kept)
    assert (416, 312) in sizes
    # on the same side in the mirrored image too, and in each crop
    assert not list(label.find_things(photograph, lambda image: disc(0.3, x=0.65)))


def test_the_larger_crop_is_looked_up_at_the_right_place():
    inner = label._inner(disc(0.5, -0.35, -0.35), (0.0, 0.0, 0.65, 0.65))
    assert label.agreement(inner, disc(0.5 / 0.65)) > 0.98
    assert label.agreement(np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)) == 0


def test_a_thing_that_is_cut_off_is_no_cut_out():
    assert label.is_whole(disc()) and label.is_whole(disc(y=0.9))
    assert not label.is_whole(disc(x=0.9)) and not label.is_whole(disc(y=-0.9))


def test_build_keeps_crops_probabilities_and_cut_outs(tmp_path, make_supply):
    work = make_supply(tmp_path)
    (work / "labels" / "manifest.csv").unlink()
    assert label.build(work, lambda image: disc()) == 6 * 9
    rows = read_rows(work / "labels" / "manifest.csv", Background)
    assert (rows[0].file, rows[0].width, rows[0].package) == ("0_0.jpg", 96, "grounds 2.0")
    with Image.open(work / "labels" / "0_0.png") as mask:
        assert mask.size == (96, 80) and mask.getextrema() == (0, 255)
    cutouts = read_rows(work / "objects" / "cutout.csv", Row)
    assert len(cutouts) == 6 * 9 and {row.group for row in cutouts} == {f"u2:{n}" for n in range(6)}
    assert all(0.5 < row.fill < 0.9 for row in cutouts)
    assert label.build(work, lambda image: pytest.fail("done before")) == 0


def test_samples_are_probabilities_where_the_image_has_them(tmp_path, make_supply):
    things = CompositeSet(make_supply(tmp_path), "train", 64, things=1.0, weights={"photo": 1.0})
    for number in range(8):
        sample = things.draw(number)
        assert sample.masks.dtype == np.float32 and sample.masks.shape[1:] == sample.image.shape[:2]
        assert sample.masks.min() >= 0 and sample.masks.max() <= 1
        assert sample.labels == ("thing",) and sample.boxed.all()
    with pytest.raises(ValueError, match="has no thing of split 'night'"):
        CompositeSet(tmp_path, "val", 64, things=1.0)._thing  # noqa: B018
        from composites import _things

        _things(tmp_path, "night")
