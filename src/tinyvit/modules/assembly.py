"""From numbers to the parts of a TinyViT: its stages, its neck, its first weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from .conv import LayerNorm2d
from .patch import PatchMerging
from .stage import BasicLayer, ConvLayer

if TYPE_CHECKING:
    from .tiny_vit import TinyViT

__all__ = ["check_stages", "check_strides", "init_weights", "make_neck", "make_stages"]


def check_strides(strides: Sequence[int] | None, num_stages: int) -> tuple[int, ...]:
    """One stride for each merge between two stages; None means SAM's: 2, but 1 for the third.

    Raises:
        ValueError: No stage, another number of strides, or a stride that is neither 1 nor 2.
    """
    if num_stages < 1:
        raise ValueError("depths must name at least one stage, got none")
    if strides is None:
        return tuple(1 if i == 2 else 2 for i in range(num_stages - 1))
    if len(strides) != num_stages - 1 or any(stride not in (1, 2) for stride in strides):
        raise ValueError(
            f"strides wants {num_stages - 1} numbers (1 or 2), one for each merge between "
            f"{num_stages} stages, got {tuple(strides)}"
        )
    return tuple(strides)


def check_stages(num_stages: int, **numbers: Sequence[int]) -> None:
    """Each argument must name every stage once, by a positive number.

    Raises:
        ValueError: It does not.
    """
    for name, values in numbers.items():
        if len(values) != num_stages:
            raise ValueError(
                f"{name} wants {num_stages} numbers, one for each stage of depths, got {values}"
            )
        if min(values) < 1:
            raise ValueError(f"{name} must be positive, got {values}")


def make_stages(model: TinyViT, use_checkpoint: bool) -> nn.ModuleList:
    """The stages that the model's attributes describe; their sizes are declared later."""
    total = sum(model.depths)
    rates = [model.drop_path_rate * i / max(total - 1, 1) for i in range(total)]
    stages = nn.ModuleList()
    for i, depth in enumerate(model.depths):
        drop_path = rates[sum(model.depths[:i]) :][:depth]
        is_last = i == model.num_layers - 1
        downsample = None if is_last else partial(PatchMerging, stride=model.strides[i])
        out_dim = None if is_last else model.embed_dims[i + 1]
        if i == 0:
            stage: nn.Module = ConvLayer(
                dim=model.embed_dims[i],
                input_resolution=1,
                depth=depth,
                activation=nn.GELU,
                drop_path=drop_path,
                downsample=downsample,
                use_checkpoint=use_checkpoint,
                out_dim=out_dim,
                conv_expand_ratio=model.mbconv_expand_ratio,
            )
        else:
            stage = BasicLayer(
                dim=model.embed_dims[i],
                input_resolution=1,
                depth=depth,
                num_heads=model.num_heads[i],
                window_size=model.window_sizes[i],
                mlp_ratio=model.mlp_ratio,
                drop=model.drop_rate,
                drop_path=drop_path,
                downsample=downsample,
                use_checkpoint=use_checkpoint,
                local_conv_size=model.local_conv_size,
                out_dim=out_dim,
            )
        stages.append(stage)
    return stages


def make_neck(in_chans: int, neck_dim: int) -> nn.Sequential:
    """The neck of SAM's image encoders (Kirillov et al., ICCV 2023)."""
    return nn.Sequential(
        nn.Conv2d(in_chans, neck_dim, kernel_size=1, bias=False),
        LayerNorm2d(neck_dim),
        nn.Conv2d(neck_dim, neck_dim, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(neck_dim),
    )


def init_weights(module: nn.Module) -> None:
    """Linear layers start from a normal of std 0.02, their biases from 0."""
    if isinstance(module, nn.Linear):
        # The published file truncates at +-2, a hundred deviations away; looking for what lies
        # beyond would take most of the constructor's time.
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
