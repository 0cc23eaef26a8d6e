"""Tiny models with lively weights, and small folders of images, for the tests of every package."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def randomise(module, seed=0):
    """Values that leave nothing at its neutral start: no zero biases, no batch norm of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif name.endswith(("running_mean", "bias")):
            noise = 0.2 * noise
        elif tensor.ndim == 1:  # weight of a norm
            noise = 1 + 0.2 * noise
        elif not name.endswith("attention_biases"):
            noise = noise * tensor[0].numel() ** -0.5
        tensor.copy_(noise)
    return module


def make_tiny_vit(seed=0, **changes):
    """A TinyViT of some 20 000 parameters, in eval mode."""
    from tinyvit.modules import TinyViT

    arguments = {
        "img_size": 64,
        "num_classes": 5,
        "embed_dims": (8, 12, 16, 24),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 3),
        "window_sizes": (4, 3, 5, 2),
        "drop_path_rate": 0.0,
        "neck_dim": 16,
    }
    return randomise(TinyViT(**{**arguments, **changes}), seed).eval()


def make_tiny_engine(seed=0, size=64, **changes):
    """An engine of an encoder with SAM's preparation, in torch; features [16, size/16, size/16]."""
    from tinyvit import Engine
    from tinyvit.image_spec import ImageSpec

    model = make_tiny_vit(seed, img_size=size, **{"head": False, **changes})
    model.image_spec = ImageSpec.sam(size)
    return Engine(model, backend="torch", workers=2)


def make_tiny_classifier(classes=3, seed=0, size=16, **changes):
    """A classifier with ``timm``'s preparation, in eval mode."""
    from tinyvit.image_spec import ImageSpec

    changes = {"strides": (2, 2, 2), "neck_dim": None, **changes}
    model = make_tiny_vit(seed, img_size=size, num_classes=classes, **changes)
    model.image_spec = ImageSpec.timm(size)
    return model


def make_tiny_sam(size=64, is_hq=False, seed=0, pad=True, *, loadable=False, **changes):
    """A ``Sam`` whose masks cover a part only, in eval mode; ``loadable``: ``build_sam`` reads it.

    A file does not show heads and widths of the transformer, so a loadable one has SAM's.
    """
    from tinyvit.image_spec import ImageSpec
    from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder, TwoWayTransformer
    from tinyvit.modules.sam.prompt_encoder import PromptEncoder
    from tinyvit.sam.model import Sam

    width, heads, mlp, hidden, dots = (16, 8, 2048, 16, 16) if loadable else (32, 2, 48, 24, 8)
    encoder = make_tiny_vit(seed, img_size=size, neck_dim=width, **changes)
    encoder.image_spec = ImageSpec.sam(size, pad=pad)
    kind, extra = (HQMaskDecoder, {"vit_dim": 16}) if is_hq else (MaskDecoder, {})
    decoder = kind(
        transformer_dim=width,
        transformer=TwoWayTransformer(2, width, heads, mlp),
        iou_head_hidden_dim=hidden,
        **extra,
    )
    grid = -(-size // 16)
    prompts = PromptEncoder(width, (grid, grid), (16 * grid, 16 * grid), dots)
    return Sam(encoder, randomise(prompts, seed + 1), randomise(decoder, seed + 2)).eval()


def write_tiny_sam(path, seed=0, **changes):
    """A whole SAM in a file that ``build_sam`` reads; gives the path."""
    from tinyvit.checkpoints import write_state_dict

    sam = make_tiny_sam(seed=seed, loadable=True, **{"head": False, **changes})
    header = {"tinyvit.family": "tinyvit_sam", "tinyvit.strides": "2,2,1"}
    return write_state_dict(path, sam.state_dict(), metadata=header)


def noise(height, width, seed=0):
    """RGB noise [H, W, 3] uint8 that depends on size and seed alone."""
    generator = np.random.default_rng([height, width, seed])
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_image(path, height=24, width=40, seed=0):
    """An image of noise; gives its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_mask_folder(folder, count=3):
    """``images/N.png`` and ``masks/N.png`` of 48 x 48, one square on each; gives the folder."""
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


def even_odd(rings, shape):
    """The mask that outlines draw, by counting crossings to the left of each pixel's centre."""
    out = np.zeros(shape, bool)
    rows = np.arange(shape[0]) + 0.5
    columns = np.arange(shape[1]) + 0.5
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if x0 == x1 and y0 != y1:
                inside = (rows > min(y0, y1)) & (rows < max(y0, y1))
                out ^= inside[:, None] & (columns > x0)[None]
    return out
