import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import to_input
from tinyvit.train.data.augment import (
    _OPERATIONS,
    Augmentation,
    MaskAugment,
    View,
    _draw_box,
    augmentation,
    fit_sample,
)

SPEC = ImageSpec((20, 20), "squash", "bilinear")


def photo(height=24, width=30):
    rows, columns = np.mgrid[:height, :width]
    return np.stack(
        [rows * 255 // height, columns * 255 // width, (rows + columns) * 4 % 256], axis=2
    ).astype(np.uint8)


@pytest.mark.parametrize("strength", ["none", "light", "full"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (24, 30), (3, 200)])
def test_a_view_is_a_pure_function_of_image_and_generator(strength, size):
    view = pickle.loads(pickle.dumps(View(augmentation(strength), SPEC)))
    image = photo(*size)
    before = image.copy()
    for seed in range(8):
        first, again = (view(image, np.random.default_rng(seed)) for _ in range(2))
        assert (first.shape, first.dtype) == ((3, 20, 20), np.float32)
        np.testing.assert_array_equal(first, again)
        assert np.isfinite(first).all()
    np.testing.assert_array_equal(image, before)


def test_without_chance_a_view_is_what_the_model_is_measured_with():
    wanted, _ = to_input(photo(), SPEC)
    made = View(augmentation("none"), SPEC)(photo(), np.random.default_rng(5))
    # the same filter on the same pixels; the arithmetic of the mean is in another order
    np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-5)


def test_chance_changes_the_view():
    for strength in ("light", "full"):
        view = View(augmentation(strength), SPEC)
        views = {view(photo(), np.random.default_rng(seed)).tobytes() for seed in range(20)}
        assert len(views) == 20


def test_one_seed_means_one_crop_at_every_size():
    big = ImageSpec((40, 40), "squash", "bilinear")
    for seed in range(10):
        chance = augmentation("full")
        chance = Augmentation(chance.scale, flip=0.5, operations=2, colours=False, erase=0.0)
        small = View(chance, SPEC)(photo(200, 300), np.random.default_rng(seed))
        large = View(chance, big)(photo(200, 300), np.random.default_rng(seed))
        halved = large.reshape(3, 20, 2, 20, 2).mean((2, 4))
        # a smooth image: the mean difference of two sizes of one view is small, that of two
        # views (crops, mirrored, turned) is not
        assert np.abs(halved - small).mean() < 0.12


def test_mirroring_is_half_of_the_images():
    chance = Augmentation((1, 1), (1, 1), flip=0.5, operations=0, erase=0)
    view = View(chance, SPEC)
    plain = View(augmentation("none"), SPEC)(photo(), np.random.default_rng(0))
    mirrored = 0
    for seed in range(200):
        made = view(photo(), np.random.default_rng(seed))
        is_mirrored = not np.array_equal(made, plain)
        if is_mirrored:
            np.testing.assert_array_equal(made[:, :, ::-1], plain)
        mirrored += is_mirrored
    assert 60 < mirrored < 140  # six standard deviations


def test_erasing_leaves_the_rest_alone():
    chance = Augmentation((1, 1), (1, 1), flip=0, operations=0, erase=1.0)
    plain = View(augmentation("none"), SPEC)(photo(), np.random.default_rng(0))
    for seed in range(20):
        made = View(chance, SPEC)(photo(), np.random.default_rng(seed))
        changed = (made != plain).any(axis=0)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert changed.sum() == len(rows) * len(columns)  # one rectangle
        assert 0 < changed.mean() < 0.5


def test_min_max_has_its_own_scale():
    spec = ImageSpec((20, 20), "squash", normalise="min_max")
    made = View(augmentation("none"), spec)(photo(), np.random.default_rng(0))
    assert (made.min(), made.max()) == (0.0, 1.0)
    flat = View(augmentation("none"), spec)(
        np.full((4, 4, 3), 9, np.uint8), np.random.default_rng(0)
    )
    assert not flat.any()


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 99))
def test_a_crop_lies_in_the_image(height, width, seed):
    chance = augmentation("full")
    x0, y0, x1, y1 = _draw_box(height, width, chance, np.random.default_rng(seed))
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    assert (x1 - x0) * (y1 - y0) <= height * width * (1 + 1e-9)


@pytest.mark.parametrize("name", sorted(_OPERATIONS))
def test_every_operation_keeps_size_and_mode(name):
    from PIL import Image

    for size in ((1, 1), (7, 5)):
        for level in (0.0, 1.0):
            for sign in (-1.0, 1.0):
                made = _OPERATIONS[name](Image.new("RGB", size, (10, 200, 90)), level, sign)
                assert (made.size, made.mode) == (size, "RGB")


def test_turning_keeps_the_middle_and_moves_the_rest():
    from PIL import Image

    image = Image.fromarray(photo(21, 21))
    turned = np.asarray(_OPERATIONS["rotate"](image, 1.0, 1.0)).astype(int)
    # the middle pixel stays, up to interpolation between neighbours that differ by 13
    assert np.abs(turned[10, 10] - photo(21, 21)[10, 10].astype(int)).max() <= 13
    moved = np.asarray(_OPERATIONS["move_x"](image, 1.0, 1.0)).astype(int)
    assert np.abs(moved[:, 0, 1] - photo(21, 21)[:, 9, 1].astype(int)).max() <= 13  # 0.45 * 21


@pytest.mark.parametrize(
    "values, words",
    [
        ({"scale": (0.0, 1.0)}, "scale must be two parts of an area"),
        ({"ratio": (2.0, 1.0)}, "ratio must be two numbers"),
        ({"flip": 1.5}, "flip must be at least 0 and at most 1, got 1.5"),
        ({"magnitude": 11.0}, "magnitude must be at least 0 and at most 10"),
    ],
)
def test_wrong_values(values, words):
    with pytest.raises(ValueError, match=words):
        Augmentation(**values)
    with pytest.raises(ValueError, match="'none', 'light' or 'full', got 'heavy'"):
        augmentation("heavy")


def test_plain_values_give_the_same_choice_again():
    chance = augmentation("light")
    assert Augmentation(**chance.to_dict()) == chance


def scene(height=60, width=90):
    """White objects on black: after any change but that of colour, white is where the mask is."""
    masks = np.zeros((2, height, width), bool)
    masks[0, 10:40, 10:30] = True
    masks[1, 20:50, 50:85] = True
    image = np.repeat(masks.any(0)[:, :, None], 3, 2).astype(np.uint8) * 255
    return image, masks


def test_the_whole_image_fits_into_the_frame():
    pixels, masks = fit_sample(*scene(), (64, 64))
    assert pixels.shape == (43, 64, 3)
    assert masks.shape == (2, 43, 64)
    assert masks.mean() == pytest.approx(scene()[1].mean(), rel=0.05)


@pytest.mark.parametrize("seed", range(12))
def test_masks_stay_on_their_objects(seed):
    augment = MaskAugment(colour=0, grey=0)
    pixels, masks = augment(*scene(), (64, 48), np.random.default_rng(seed))
    height, width = pixels.shape[:2]
    assert height <= 64
    assert width <= 48
    assert masks.any()
    white = pixels[:, :, 0] > 127
    # resizing of pixels and masks rounds alike; only where objects touch may a pixel differ
    assert (white != masks.any(0)).mean() < 0.02


def test_the_same_chance_gives_the_same_scene():
    one, two = (MaskAugment()(*scene(), (64, 64), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def test_grey_takes_all_colour_away():
    image, masks = scene()
    image[:, :, 1] = 30
    pixels, _ = MaskAugment(grey=1.0)(image, masks, (64, 64), np.random.default_rng(0))
    assert np.ptp(pixels, axis=2).max() == 0


def test_an_image_of_one_pixel():
    image, masks = np.full((1, 1, 3), 200, np.uint8), np.ones((1, 1, 1), bool)
    _, masks = MaskAugment()(image, masks, (32, 32), np.random.default_rng(0))
    assert masks.all()


def test_ranges_are_checked():
    with pytest.raises(ValueError, match="smallest_crop must be above 0 and at most 1"):
        MaskAugment(smallest_crop=0)
    with pytest.raises(ValueError, match="flip must be at least 0 and at most 1, got 2"):
        MaskAugment(flip=2)
    with pytest.raises(ValueError, match="colour must be at least 0 and below 1"):
        MaskAugment(colour=1)
