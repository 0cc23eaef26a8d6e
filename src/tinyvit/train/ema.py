"""The average of the weights along the way, which often does better than the last weights.

The average is a whole network beside the trained one. Parameters that learn are averaged; all else
(frozen parameters, buffers such as batch statistics) is copied after every step, so nothing in it
is ever older than the step. Nothing else is kept: attention's tables of biases are parameters, and
what is derived from them is computed at each call.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["Ema"]


class Ema:
    """An exponential moving average of a network.

    Early on the memory is shorter, (1 + step) / (10 + step), so that the first, random weights are
    soon forgotten.

    Args:
        model: The trained network; a copy is made.
        decay: Memory: the part of the average that stays in each step, from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The memory in a step, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after a step into the average.

        Args:
            model: The trained network.
            step: The step, counted from 0.
        """
        weight = 1.0 - self.decay_at(step)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        for mean, parameter in pairs:
            if parameter.requires_grad:
                mean.lerp_(parameter, weight)
            else:
                mean.copy_(parameter)
        for mine, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(buffer)
