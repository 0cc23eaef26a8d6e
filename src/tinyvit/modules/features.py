"""TinyViT as a feature extractor: what its stages give, and a module that gives only that.

Shapes: B batch, C channels, h w height and width of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor, nn

if TYPE_CHECKING:
    from .tiny_vit import TinyViT

__all__ = ["FeatureInfo", "FeatureMaps", "StageInfo", "describe_stages", "select_stages"]


class StageInfo(TypedDict):
    """One stage's map: channels, picture pixels per position, and the module it comes from."""

    num_chs: int
    reduction: int
    module: str


class FeatureInfo(list[StageInfo]):
    """The stages' maps in depth order, with timm's accessors."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [stage["num_chs"] for stage in self]

    def reduction(self) -> list[int]:
        """Picture pixels per position of each map, along one side."""
        return [stage["reduction"] for stage in self]

    def module_name(self) -> list[str]:
        """The module that each map comes from."""
        return [stage["module"] for stage in self]


class FeatureMaps(nn.Module):
    """A TinyViT that returns the maps of some stages, for detectors and dense heads.

    Args:
        encoder: The model. Build it with ``neck_dim=None, head=False``, so that no parameter is
            left without a gradient.
        out_indices: Stages, as for ``TinyViT.forward_intermediates``.

    Raises:
        ValueError: An index is unknown.

    Example:
        >>> import torch
        >>> from tinyvit.modules import FeatureMaps, TinyViT
        >>> encoder = TinyViT(embed_dims=(16, 32, 64, 96), num_heads=(1, 1, 2, 3),
        ...                   strides=(2, 2, 2), neck_dim=None, head=False)
        >>> maps = FeatureMaps(encoder, out_indices=(1, 2, 3)).eval()
        >>> [tuple(m.shape) for m in maps(torch.zeros(1, 3, 100, 75))]
        [(1, 32, 13, 10), (1, 64, 7, 5), (1, 96, 4, 3)]
    """

    def __init__(self, encoder: TinyViT, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.out_indices = select_stages(out_indices, encoder.num_layers)
        info = encoder.feature_info
        self.feature_info = FeatureInfo(info[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> one [B, C, h, w] for each stage of ``out_indices``."""
        maps = self.encoder.forward_intermediates(x, self.out_indices, intermediates_only=True)
        return maps if isinstance(maps, list) else maps[1]


def describe_stages(
    stem_reduction: int, embed_dims: Sequence[int], strides: Sequence[int]
) -> FeatureInfo:
    """Channels and reduction of each stage's map: a merge's stride counts for the next stage."""
    info = FeatureInfo()
    reduction = stem_reduction
    for i, (width, stride) in enumerate(zip(embed_dims, (*strides, 1), strict=True)):
        info.append({"num_chs": width, "reduction": reduction, "module": f"layers.{i}.blocks"})
        reduction *= stride
    return info


def select_stages(indices: int | Sequence[int] | None, num_stages: int) -> tuple[int, ...]:
    """Stage numbers in depth order, each once; an int n means the last n, None means all.

    Raises:
        ValueError: A stage that does not exist, or none at all.
    """
    if indices is None:
        return tuple(range(num_stages))
    if isinstance(indices, int):
        if indices > num_stages:
            raise ValueError(f"indices must name stages, at most {num_stages}, got {indices}")
        indices = range(num_stages - indices, num_stages)
    chosen = {i + num_stages if i < 0 else i for i in indices}
    if not chosen or not chosen <= set(range(num_stages)):
        raise ValueError(
            f"indices must name stages 0 to {num_stages - 1} (or -{num_stages} to -1), "
            f"got {tuple(indices)}"
        )
    return tuple(sorted(chosen))
