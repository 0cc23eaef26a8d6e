import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.sam.upscale import upscale, upscale_region

ROUNDING = 1e-5  # two interpolations as one product, in fp32


def twice(logits, placement, covered):
    """segment-anything's postprocess_masks, for one stack of masks."""
    height, width = placement.resized_size
    masks = F.interpolate(logits[None], covered, mode="bilinear", align_corners=False)
    masks = masks[..., :height, :width]
    return F.interpolate(masks, placement.original_size, mode="bilinear", align_corners=False)[0]


def assert_twice(logits, placement, covered):
    wanted = twice(logits, placement, covered).numpy()
    np.testing.assert_allclose(upscale(logits.numpy(), placement), wanted, rtol=0, atol=ROUNDING)
    masks = upscale(logits.numpy(), placement, threshold=0.5)
    assert masks.dtype == bool
    assert not ((masks != (wanted > 0.5)) & (np.abs(wanted - 0.5) > ROUNDING)).any()


def in_image(region, size):
    """The mask of a region in the whole image."""
    mask = np.zeros(size, bool)
    height, width = region.mask.shape
    mask[region.top : region.top + height, region.left : region.left + width] = region.mask
    return mask


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (100, 30), (1, 1), (1, 200), (17, 13)])
def test_whole_masks(size):
    placement = ImageSpec.sam(64).place(*size)
    logits = torch.randn(2, 16, 16)
    assert_twice(logits, placement, (64, 64))


def test_logits_of_an_image_without_padding():
    placement = ImageSpec.sam(64, pad=False).place(300, 410)  # 47 x 64 pixels, 3 x 4 cells
    assert placement.model_size == (47, 64)
    logits = torch.randn(1, 12, 16)
    assert_twice(logits, placement, (48, 64))


def test_no_masks():
    placement = ImageSpec.sam(64).place(20, 30)
    assert upscale(np.empty((0, 16, 16), np.float32), placement).shape == (0, 20, 30)


@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    spots=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=4),
    threshold=st.sampled_from([0.0, 0.7, -0.5]),
    seed=st.integers(0, 1000),
)
def test_a_region_is_the_whole_mask(height, width, spots, threshold, seed):
    placement = ImageSpec.sam(64).place(height, width)
    logits = -4 + 0.5 * torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
    for y, x in spots:
        logits[y, x] = 3.0 + 0.1 * y
    region = upscale_region(logits.numpy(), placement, threshold=threshold)
    whole = twice(logits[None].double(), placement, (64, 64))[0]
    undecided = (whole - threshold).abs() < ROUNDING
    wrong = (
        torch.from_numpy(in_image(region, (height, width))) != (whole > threshold)
    ) & ~undecided
    assert not wrong.any()
    near = int(((whole - threshold).abs() - 1).abs().lt(ROUNDING).sum())
    assert abs(region.inner - int((whole > threshold + 1).sum())) <= near
    assert abs(region.outer - int((whole > threshold - 1).sum())) <= near


def test_a_region_is_no_larger_than_it_must_be():
    placement = ImageSpec.sam(256).place(1000, 1500)
    logits = np.full((64, 64), -5.0, np.float32)
    logits[20:24, 30:36] = 5.0
    region = upscale_region(logits, placement)
    assert region.mask.any()
    assert region.mask.shape[0] < 150 and region.mask.shape[1] < 250
    rows, columns = np.nonzero(in_image(region, (1000, 1500)))
    assert abs(rows.mean() - 22 / 64 * 1500) < 2 and abs(columns.mean() - 33 / 64 * 1500) < 2


def test_stability_is_the_share_of_the_inner_mask():
    placement = Placement((64, 64), (64, 64), (0, 0), (64, 64))
    logits = np.full((16, 16), -5.0, np.float32)
    logits[4:12, 4:12] = 0.5  # above -1, not above 1
    logits[4:8, 4:12] = 5.0
    region = upscale_region(logits, placement)
    whole = upscale(logits, placement)
    assert region.stability == pytest.approx(int((whole > 1).sum()) / int((whole > -1).sum()))


def test_an_empty_mask():
    placement = ImageSpec.sam(64).place(20, 30)
    region = upscale_region(np.full((16, 16), -2.0, np.float32), placement)
    assert region.mask.size == 0
    assert region.inner == region.outer == 0 and np.isnan(region.stability)


def test_logits_in_the_padding_are_no_mask():
    placement = ImageSpec.sam(64).place(32, 64)
    logits = np.full((16, 16), -5.0, np.float32)
    logits[12:] = 5.0  # below the image
    assert not upscale_region(logits, placement).mask.any()


def test_logits_of_another_image():
    placement = ImageSpec.sam(64).place(64, 64)
    for call in (
        lambda: upscale(np.zeros((1, 8, 16), np.float32), placement),
        lambda: upscale_region(np.zeros((8, 16), np.float32), placement),
    ):
        with pytest.raises(ValueError, match=r"cover 32x64 pixels, but the image has 64x64"):
            call()


def test_logits_of_another_rank():
    with pytest.raises(ValueError, match=r"wanted logits \[..., h4, w4\]; came \[4\]"):
        upscale(np.zeros(4, np.float32), ImageSpec.sam(16).place(16, 16))
