"""What tests of training and measuring share: a few masks on noise, and files of tiny SAMs."""

from pathlib import Path

import numpy as np
from PIL import Image

from tinyvit.checkpoints import write_state_dict
from tinyvit.image_spec import ImageSpec
from tinyvit.sam import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

WIDTH, SIDE = 16, 64


def write_cells(folder: Path, count: int = 3) -> Path:
    """``images/N.png`` and ``masks/N.png``, one square each; gives the folder."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        mask = np.zeros((48, 48), np.uint8)
        mask[8:32, 10 + number : 40] = 255
        pixels = rng.integers(0, 90, (48, 48, 3), np.uint8) + mask[:, :, None] // 2
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def write_sam(path: Path, make_tiny_vit, randomise, seed: int = 0) -> Path:
    """A whole SAM in a file that ``build_sam`` reads; gives the path."""
    encoder = make_tiny_vit(seed, img_size=SIDE, neck_dim=WIDTH, head=False)
    encoder.image_spec = ImageSpec.sam(SIDE)
    decoder = MaskDecoder(
        transformer_dim=WIDTH,
        transformer=TwoWayTransformer(2, WIDTH, 8, 2048),
        iou_head_hidden_dim=WIDTH,
    )
    prompts = PromptEncoder(WIDTH, (4, 4), (SIDE, SIDE), 16)
    sam = Sam(encoder, randomise(prompts, seed + 1), randomise(decoder, seed + 2))
    header = {"tinyvit.family": "tinyvit_sam", "tinyvit.strides": "2,2,1"}
    return write_state_dict(path, sam.state_dict(), metadata=header)
