"""What the tests of learning to segment share: a tiny ``Sam``."""

import pytest

from tinyvit.image_spec import ImageSpec
from tinyvit.modules.sam.mask_decoder import MaskDecoder
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.modules.sam.transformer import TwoWayTransformer
from tinyvit.sam.model import Sam

WIDTH, STRIDE = 32, 16


@pytest.fixture(scope="session")
def make_tiny_sam(make_tiny_vit, randomise):
    """``make_tiny_sam(size=64, seed=0)``, in eval mode."""

    def make(size=64, seed=0):
        encoder = make_tiny_vit(seed, img_size=size, neck_dim=WIDTH)
        encoder.image_spec = ImageSpec.sam(size)
        decoder = MaskDecoder(
            transformer_dim=WIDTH,
            transformer=TwoWayTransformer(2, WIDTH, 2, 48),
            iou_head_hidden_dim=24,
        )
        grid = -(-size // STRIDE), -(-size // STRIDE)
        prompts = PromptEncoder(WIDTH, grid, (grid[0] * STRIDE, grid[1] * STRIDE), 8)
        return Sam(encoder, randomise(prompts, seed + 1), randomise(decoder, seed + 2)).eval()

    return make
