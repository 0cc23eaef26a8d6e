import sys

import numpy as np
import pytest
from PIL import Image

import regions
from composites import CompositeSet
from manifest import Background, read_rows
from regions import draw_regions


@pytest.fixture
def photograph(tmp_path):
    """A photograph of a red and a blue half, and its regions: one stage of three has them."""
    pixels = np.zeros((90, 120, 3), np.uint8)
    pixels[:, :60], pixels[:, 60:] = (220, 30, 30), (30, 30, 220)
    stages = np.ones((90, 120, 3), np.uint8)  # the first and the second: one region of everything
    stages[:, 60:, 2] = 2
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(stages).save(tmp_path / "regions.png")
    return tmp_path / "a.png", tmp_path / "regions.png"


def test_masks_lie_where_the_image_has_them(photograph):
    found = [draw_regions(*photograph, (64, 48), np.random.default_rng(n)) for n in range(60)]
    assert any(one is None for one in found)  # a stage of one region that covers everything
    whole = [one for one in found if one is not None]
    assert len(whole) > 5
    for pixels, masks, boxed in whole:
        assert boxed.shape == (len(masks),) and boxed.dtype == bool
        assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
        assert masks.shape[1:] == (48, 64) and masks.dtype == bool
        for mask in masks:
            assert 0.004 * mask.size <= mask.sum() <= 0.6 * mask.size
        if pixels.std((0, 1)).max() < 20:
            continue  # made grey, or the border lies at the edge
        red = pixels[..., 0].astype(int) > pixels[..., 2]
        agree = [max((mask == red).mean(), (mask == ~red).mean()) for mask in masks]
        assert min(agree) > 0.9


def test_what_is_thin_is_left_out(tmp_path):
    labels = np.ones((90, 120, 3), np.uint8)
    labels[np.arange(90), np.arange(90)] = 2  # a line across
    labels[np.arange(89), np.arange(1, 90)] = 2
    Image.fromarray(labels * 90).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / "r.png")
    paths = tmp_path / "a.png", tmp_path / "r.png"
    for seed in range(20):
        found = draw_regions(*paths, (96, 96), np.random.default_rng(seed))
        if found is not None:  # one side of the line
            assert all(mask.sum() > 0.2 * mask.size for mask in found[1])


def test_a_box_stands_for_what_somebody_would_box():
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:40] = True
    assert regions.has_box(mask)
    mask[:30, 10:40] = True  # touches the upper edge
    assert regions.has_box(mask)
    mask[:, 10:40] = True  # and the lower one
    assert not regions.has_box(mask)
    frame = np.zeros((40, 60), bool)
    frame[5:35, 5:55] = True
    frame[10:30, 10:50] = False  # fills less than half of its box
    assert 0.25 < frame.sum() / (30 * 50) < 0.5 and not regions.has_box(frame)


def test_a_set_mixes_them_with_composites(tmp_path, make_supply):
    pytest.importorskip("skimage")
    work = make_supply(tmp_path)
    regions.build(work)
    mixed = CompositeSet(work, "train", 64, seed=5, regions=0.5, weights={"photo": 1.0})
    labels = [mixed[number].labels for number in range(40)]
    share = np.mean([set(one) == {"region"} for one in labels])
    assert 0.2 < share < 0.8
    assert all(set(one) == {"region"} or "region" not in one for one in labels)
    again = CompositeSet(work, "train", 64, seed=5, regions=0.5, weights={"photo": 1.0})
    for number in (0, 1, 2, 3):
        for one, other in zip(mixed[number].load(), again[number].load(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_without_regions_nothing_is_asked_of_them(tmp_path, make_supply):
    plain = CompositeSet(make_supply(tmp_path), "train", 64, seed=5, weights={"photo": 1.0})
    assert all("region" not in plain[number].labels for number in range(10))


def test_regions_that_were_not_made_are_an_error_that_names_the_file(tmp_path, make_supply):
    mixed = CompositeSet(make_supply(tmp_path), "train", 64, regions=1.0, weights={"photo": 1.0})
    with pytest.raises(FileNotFoundError, match=r"regions.*\.png"):
        mixed[0].load()


pytest.importorskip("skimage", reason="the regions need scikit-image")


def scene(noise=3.0, seed=0):
    """A sky above a meadow, with a house on the meadow: [120, 160, 3], and the truth [120, 160]."""
    truth = np.zeros((120, 160), np.int64)
    truth[60:] = 1
    truth[45:90, 50:100] = 2
    colours = np.array([(120, 170, 230), (60, 130, 40), (200, 60, 50)], np.float64)
    pixels = colours[truth] + np.random.default_rng(seed).normal(0, noise, (*truth.shape, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), truth


def test_the_coarsest_stage_finds_what_differs():
    pixels, truth = scene()
    found = regions.find_regions(pixels)
    assert found.dtype == np.uint8 and found.shape == pixels.shape
    coarse = found[..., 2]
    assert 3 <= coarse.max() <= 5  # a border's blur may be a region of its own
    for number in range(3):
        true = truth == number
        best = max(
            (true & (coarse == other)).sum() / (true | (coarse == other)).sum()
            for other in range(1, 6)
        )
        assert best > 0.9


def test_a_coarser_stage_joins_and_never_cuts():
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((160, 120), Image.Resampling.NEAREST))
    fine, middle, whole = np.moveaxis(regions.find_regions(pixels), -1, 0)
    assert fine.max() > middle.max() > whole.max() >= 1
    for below, above in ((fine, middle), (middle, whole)):
        pairs = np.unique(np.stack((below.ravel(), above.ravel())), axis=1)
        assert len(np.unique(pairs[0])) == pairs.shape[1]  # each lies in one of the next stage


def test_numbers_fall_with_the_size():
    counts = np.bincount(regions.find_regions(scene()[0])[..., 2].ravel())
    assert counts[0] == 0 and list(counts[1:]) == sorted(counts[1:], reverse=True)


def test_one_colour_is_one_region():
    found = regions.find_regions(np.full((50, 40, 3), 77, np.uint8))
    assert (found == 1).all()


def test_more_regions_than_a_byte_holds_have_no_number():
    labels = np.arange(400).reshape(20, 20)
    labels[0] = 0
    found = regions._numbered(labels)
    assert found.max() == 255 and (found == 0).sum() == 381 - 255 and (found[0] == 1).all()


def test_only_missing_regions_are_made(tmp_path, make_supply):
    work = make_supply(tmp_path)
    names = [row.file for row in read_rows(work / "backgrounds" / "manifest.csv", Background)]
    done = regions.regions_path(work, names[0])
    done.parent.mkdir()
    done.write_bytes(b"mine")
    assert regions.build(work) == len(names) - 1
    assert done.read_bytes() == b"mine"
    with Image.open(regions.regions_path(work, names[1])) as image:
        assert image.mode == "RGB" and image.size == (96, 80)
    assert regions.build(work) == 0
    assert sorted(path.stem for path in done.parent.iterdir()) == sorted(n[:-4] for n in names)


def test_without_scikit_image_the_error_says_what_to_install(tmp_path, make_supply, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"scikit-image: pip install -r .*requirements.txt"):
        regions.build(make_supply(tmp_path))
