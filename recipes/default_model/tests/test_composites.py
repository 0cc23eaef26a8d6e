from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from changes import changed, studio
from composites import CompositeSet, CompositeSettings
from manifest import Row, read_rows, write_rows

KINDS = {"photo": 1.0}


def drawn(work, count=30, **settings):
    made = CompositeSet(work, "train", 96, 1, weights=KINDS, settings=CompositeSettings(**settings))
    return [made.draw(number) for number in range(count)]


def test_crowds_are_of_one_kind_and_near_each_other(tmp_path, make_supply):
    samples = drawn(make_supply(tmp_path), crowds=1.0)
    for sample in samples:
        assert len(set(sample.labels)) == 1 and 1 <= len(sample.masks) <= 7
        assert not (sample.masks.sum(0) > 1).any()  # what is covered belongs to the upper thing
    assert np.mean([len(sample.masks) for sample in samples]) > 2.5
    gaps = []
    for sample in samples:
        for mask in sample.masks if len(sample.masks) > 1 else ():
            others = sample.masks.any(0) & ~mask
            near = np.array(Image.fromarray(mask).convert("L").resize((96, 96))) > 0
            grown = near | np.roll(near, 4, 0) | np.roll(near, -4, 0)
            grown |= np.roll(near, 4, 1) | np.roll(near, -4, 1)
            small = np.array(Image.fromarray(others).convert("L").resize((96, 96))) > 0
            gaps.append((grown & small).any())
    assert np.mean(gaps) > 0.7


def test_the_same_number_gives_the_same_sample(tmp_path, make_supply):
    work, mix = make_supply(tmp_path), {"crowds": 0.3, "studio": 0.3, "oblique": 0.5}
    for one, other in zip(drawn(work, 8, **mix), drawn(work, 8, **mix), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.masks, other.masks)


def test_long_things_are_drawn_at_any_angle(tmp_path, make_supply):
    work = make_supply(tmp_path)
    table = work / "objects" / "photo.csv"
    long = Image.new("RGBA", (90, 10), (200, 30, 30, 255))
    rows = read_rows(table, Row)
    long.save(work / "objects" / "photo" / "long.png")
    named = replace(rows[0], file="photo/long.png", label="long", group="long", width=90, height=10)
    write_rows(table, [*rows, named], Row)
    samples = drawn(work, 20, oblique=1.0)
    assert {label for sample in samples for label in sample.labels} == {"long"}
    rng = np.random.default_rng(0)
    tall = [changed(long, 90, rng, is_oblique=True).height for _ in range(60)]
    little = [changed(long, 90, rng).height for _ in range(60)]
    assert np.median(tall) > 1.5 * np.median(little)


def test_without_long_things_any_are_drawn(tmp_path, make_supply):
    assert drawn(make_supply(tmp_path), 3, oblique=1.0)


def test_a_studio_has_a_wall_and_a_floor():
    differ = []
    for seed in range(20):
        image = studio((60, 40), np.random.default_rng(seed))
        assert image.size == (60, 40) and image.mode == "RGB"
        pixels = np.asarray(image, float)
        differ.append(abs(pixels[0].mean() - pixels[-1].mean()))
    assert np.median(differ) > 10
    whole = [studio((60, 40), np.random.default_rng(3)) for _ in range(2)]
    assert whole[0].tobytes() == whole[1].tobytes()


def test_no_object_is_an_error(tmp_path, make_supply):
    with pytest.raises(ValueError, match="has no object of split 'train'"):
        CompositeSet(make_supply(tmp_path), "train", weights={"render": 1.0})
