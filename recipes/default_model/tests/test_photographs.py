import numpy as np
import pytest
from PIL import Image

import regions
from composites import CompositeSet
from photographs import draw_regions


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
    for pixels, masks in whole:
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
