"""Stochastic depth (Huang et al., ECCV 2016): a residual branch is left out at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["DropPath", "drop_path_rates"]


class DropPath(nn.Module):
    """In training, zero a sample's whole branch with probability ``drop_prob``.

    What stays is divided by the probability of staying, so the expectation is unchanged.
    In eval mode, and at probability 0, the input is returned as it is.

    Raises:
        ValueError: ``drop_prob`` is outside [0, 1].
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_path must be a probability between 0 and 1, got {drop_prob}")
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        if self.drop_prob == 1.0:
            return x * 0.0
        keep = 1.0 - self.drop_prob
        mask = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """The probability."""
        return f"drop_prob={self.drop_prob:g}"


def drop_path_rates(drop_path: float | Sequence[float], depth: int) -> list[float]:
    """One rate for each of ``depth`` blocks, from one number or a sequence of ``depth`` numbers.

    Raises:
        ValueError: The sequence has another length.
    """
    if isinstance(drop_path, Sequence):
        if len(drop_path) != depth:
            raise ValueError(
                f"drop_path wants one rate for each of the {depth} blocks, got {len(drop_path)}: "
                f"{list(drop_path)}; pass {depth} rates or a single number"
            )
        return [float(rate) for rate in drop_path]
    return [float(drop_path)] * depth
