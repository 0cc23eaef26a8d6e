import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.train.tasks.classify import Mixing, mix


def batch(size=4, classes=3, side=8):
    images = torch.randn(size, 3, side, side)
    return images, torch.eye(classes)[torch.arange(size) % classes]


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_same_generator_gives_the_same_mixture():
    images, targets = batch()
    for settings in (Mixing(0.8), Mixing(0, 1.0), Mixing(0.8, 1.0)):
        first, again = (mix(images, targets, settings, chance(5)) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], mix(images, targets, settings, chance(6))[0])


def test_the_global_generator_is_not_touched():
    images, targets = batch()
    before = torch.get_rng_state()
    mix(images, targets, Mixing(0.8, 1.0), chance())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("settings", [Mixing(), Mixing(0.8, 1.0, probability=0.0)])
def test_nothing_is_mixed_where_it_is_off(settings):
    images, targets = batch()
    mixed = mix(images, targets, settings, chance())
    assert mixed[0] is images
    assert mixed[1] is targets


def test_one_image_alone_is_left_as_it_is():
    images, targets = batch(1)
    assert mix(images, targets, Mixing(0.8, 1.0), chance())[0] is images


@given(st.integers(0, 10_000))
def test_mixup_is_linear_in_images_and_targets(seed):
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 5, 6)
    targets = torch.eye(4)
    mixed, soft = mix(images, targets, Mixing(mixup=0.8), chance(seed))
    # each image is its number, so its mean must be the mean number under its target
    torch.testing.assert_close(mixed[:, 0, 0, 0], soft @ torch.arange(4.0))
    torch.testing.assert_close(soft.sum(1), torch.ones(4))


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9))
def test_cutmix_counts_the_pixels_that_are_seen(seed, height, width):
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, height, width)
    mixed, soft = mix(images, torch.eye(4), Mixing(cutmix=1.0), chance(seed))
    assert set(mixed.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    for image, target in zip(mixed, soft, strict=True):
        seen = torch.bincount(image[0].flatten().long(), minlength=4) / (height * width)
        torch.testing.assert_close(target, seen)  # float32 division both times


def test_both_take_turns():
    images, targets = batch(side=16)
    kinds = set()
    for seed in range(30):
        mixed, _ = mix(images, targets, Mixing(0.8, 1.0, switch=0.5), chance(seed))
        kinds.add(bool((mixed == images).any()))  # cutmix leaves most pixels to the last bit
    assert kinds == {False, True}


@pytest.mark.parametrize(
    "values", [{"mixup": -1.0}, {"cutmix": -0.1}, {"probability": 2.0}, {"switch": -1.0}]
)
def test_wrong_values(values):
    with pytest.raises(ValueError, match=r"must be (at least 0|between 0 and 1), got"):
        Mixing(**values)
