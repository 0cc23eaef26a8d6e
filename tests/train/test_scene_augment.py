import numpy as np
import pytest

from tinyvit.train.data.augment import SceneAugment, frame_scene


def scene(height=60, width=90):
    """White objects on black: after any change but that of colour, white is where the mask is."""
    masks = np.zeros((2, height, width), bool)
    masks[0, 10:40, 10:30] = True
    masks[1, 20:50, 50:85] = True
    image = np.repeat(masks.any(0)[:, :, None], 3, 2).astype(np.uint8) * 255
    return image, masks


def test_the_whole_image_fits_into_the_frame():
    framed = frame_scene(*scene(), (64, 64))
    assert framed.pixels.shape == (43, 64, 3)
    assert framed.masks.shape == (2, 43, 64)
    assert framed.masks.mean() == pytest.approx(scene()[1].mean(), rel=0.05)


@pytest.mark.parametrize("seed", range(12))
def test_masks_stay_on_their_objects(seed):
    augment = SceneAugment(colour=0, grey=0)
    framed = augment(*scene(), (64, 48), np.random.default_rng(seed))
    height, width = framed.pixels.shape[:2]
    assert height <= 64
    assert width <= 48
    assert framed.masks.any()
    white = framed.pixels[:, :, 0] > 127
    # resizing of pixels and masks rounds alike; only where objects touch may a pixel differ
    assert (white != framed.masks.any(0)).mean() < 0.02


def test_the_same_chance_gives_the_same_scene():
    one, two = (SceneAugment()(*scene(), (64, 64), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one.pixels, two.pixels)
    np.testing.assert_array_equal(one.masks, two.masks)


def test_grey_takes_all_colour_away():
    image, masks = scene()
    image[:, :, 1] = 30
    framed = SceneAugment(grey=1.0)(image, masks, (64, 64), np.random.default_rng(0))
    assert np.ptp(framed.pixels, axis=2).max() == 0


def test_an_image_of_one_pixel():
    image, masks = np.full((1, 1, 3), 200, np.uint8), np.ones((1, 1, 1), bool)
    framed = SceneAugment()(image, masks, (32, 32), np.random.default_rng(0))
    assert framed.masks.all()


def test_ranges_are_checked():
    with pytest.raises(ValueError, match="smallest_crop must be above 0 and at most 1"):
        SceneAugment(smallest_crop=0)
    with pytest.raises(ValueError, match="flip must lie in 0 to 1, but is 2"):
        SceneAugment(flip=2)
    with pytest.raises(ValueError, match="colour must be at least 0 and below 1"):
        SceneAugment(colour=1)
