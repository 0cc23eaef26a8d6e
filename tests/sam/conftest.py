"""What the tests of promptable segmentation share: a tiny ``Sam`` whose masks are lively."""

import numpy as np
import pytest

from tinyvit.image_spec import ImageSpec
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.modules.sam.transformer import TwoWayTransformer
from tinyvit.sam.model import Sam

WIDTH, STRIDE = 32, 16


@pytest.fixture(scope="session")
def make_tiny_sam(make_tiny_vit, randomise):
    """``make_tiny_sam(size=64, is_hq=False, seed=0, pad=True)``: its masks cover a part only."""

    def make(size=64, is_hq=False, seed=0, pad=True):
        encoder = make_tiny_vit(seed, img_size=size, neck_dim=WIDTH)
        encoder.image_spec = ImageSpec.sam(size, pad=pad)
        transformer = TwoWayTransformer(2, WIDTH, 2, 48)
        kind, extra = (HQMaskDecoder, {"vit_dim": 16}) if is_hq else (MaskDecoder, {})
        decoder = kind(
            transformer_dim=WIDTH, transformer=transformer, iou_head_hidden_dim=24, **extra
        )
        grid = size // STRIDE, size // STRIDE
        prompts = PromptEncoder(WIDTH, grid, (size, size), 8)
        return Sam(encoder, randomise(prompts, seed + 1), randomise(decoder, seed + 2)).eval()

    return make


@pytest.fixture(scope="session")
def photo():
    """``photo(height, width)``: RGB noise, [H, W, 3] uint8, that depends on the size alone."""

    def make(height, width, seed=0):
        generator = np.random.default_rng([height, width, seed])
        return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make
