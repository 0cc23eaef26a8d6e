"""Torch models with random weights, and the native net with the same ones."""

from __future__ import annotations

import numpy as np
import torch
from tinyvit_native import Config, Net

from tinyvit.modules import TinyViT


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights, statistics and biases of every kind, so that nothing is 0 or 1 by default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("num_batches_tracked"):
                continue
            if name.endswith("running_var"):
                value.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif value.ndim < 2:
                value.copy_(0.2 * noise + (0.9 if name.endswith("weight") else 0))
            elif name.endswith("attention_biases"):
                value.copy_(0.5 * noise)
            else:
                value.copy_(noise * 1.2 / value[0].numel() ** 0.5)
    return model.eval()


def config_of(model: TinyViT, **changes: object) -> Config:
    return Config(
        **{
            "embed_dims": model.embed_dims,
            "depths": model.depths,
            "num_heads": model.num_heads,
            "window_sizes": model.window_sizes,
            "strides": model.strides,
            "in_chans": model.in_chans,
            "stem": model.stem,
            "end": None if model.neck is None else "sam",
            "head": model.head is not None,
            **changes,
        }
    )


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def native(model: TinyViT, **how: object) -> Net:
    return Net(config_of(model), tensors_of(model), **how)


WIDTHS = {  # of the variants: channels and heads
    "tiny_vit_5m_224": ((64, 128, 160, 320), (2, 4, 5, 10)),
    "tiny_vit_11m_224": ((64, 128, 256, 448), (2, 4, 8, 14)),
    "tiny_vit_21m_224": ((96, 192, 384, 576), (3, 6, 12, 18)),
}


class Student(torch.nn.Module):
    """EfficientSAM3's image encoder: a TinyViT trunk and a head, resized."""

    def __init__(self, variant: str, embed_size: int) -> None:
        super().__init__()
        dims, heads = WIDTHS[variant]
        trunk = TinyViT(
            embed_dims=dims, num_heads=heads, strides=(2, 2, 2), neck_dim=None, head=False
        )
        self.embed_size = embed_size
        self.backbone = torch.nn.ModuleDict({"model": trunk})
        self.head = torch.nn.Sequential(
            torch.nn.Conv2d(dims[-1], 1024, 1, bias=False),
            torch.nn.BatchNorm2d(1024),
            torch.nn.GELU(),
            torch.nn.Conv2d(1024, 1024, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.backbone["model"](x))
        return torch.nn.functional.interpolate(y, (self.embed_size,) * 2, mode="bilinear")

    def native(self, **how: object) -> Net:
        trunk = self.backbone["model"]
        tensors = {k.removeprefix("backbone.model."): v for k, v in tensors_of(self).items()}
        return Net(config_of(trunk, end="sam3", end_size=self.embed_size), tensors, **how)
