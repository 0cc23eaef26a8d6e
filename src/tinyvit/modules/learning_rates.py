"""Layer-wise learning rates and the parameters that take no weight decay.

The rate of block i of n, in depth order, is scaled by decay ** (n - 1 - i). The stem goes with the
first block, a stage's downsample with its last block, heads and neck have scale 1 (TinyViT's
training recipe, Wu et al., ECCV 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

from torch import nn

if TYPE_CHECKING:
    from .tiny_vit import TinyViT

__all__ = ["ParamGroup", "build_param_groups", "set_lr_scales"]

NO_DECAY = "attention_biases"


class ParamGroup(TypedDict):
    """One group for a ``torch.optim`` optimiser."""

    params: list[nn.Parameter]
    lr: float
    lr_scale: float
    weight_decay: float


def set_lr_scales(model: TinyViT, decay: float) -> None:
    """Give every parameter its ``lr_scale`` attribute."""
    for parameter in model.parameters():
        parameter.lr_scale = 1.0  # type: ignore[attr-defined]
    for module, scale in _depth_order(model, decay):
        for parameter in module.parameters():
            parameter.lr_scale = scale  # type: ignore[attr-defined]


def build_param_groups(model: TinyViT, lr: float, weight_decay: float) -> list[ParamGroup]:
    """The trainable parameters, grouped by learning rate and weight decay."""
    groups: dict[tuple[float, float], ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale: float = getattr(parameter, "lr_scale", 1.0)
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(NO_DECAY) else weight_decay
        group = groups.setdefault(
            (scale, decay),
            {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay},
        )
        group["params"].append(parameter)
    return list(groups.values())


def _depth_order(model: TinyViT, decay: float) -> Iterator[tuple[nn.Module, float]]:
    last = sum(model.depths) - 1
    i = 0
    yield model.patch_embed, decay**last
    for stage in model.stages():
        for block in stage.blocks:
            yield block, decay ** (last - i)
            i += 1
        if stage.downsample is not None:
            yield stage.downsample, decay ** (last - i + 1)
