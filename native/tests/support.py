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
