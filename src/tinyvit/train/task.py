"""What the loop asks of a task: samples, the loss of a batch, and a validation.

The loop (``loop.py``) brings the order of the samples, the optimiser, the schedule, the state that
survives a kill, and the processes. All random numbers in a task come from the generators it is
handed: they are seeded by what is being done (epoch and sample, or step and rank), so that neither
the number of workers, nor the number of processes, nor a stop in between changes anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]
"""Tensors by name, batch first. Values that are no tensors pass through the loop untouched."""

Goal: TypeAlias = tuple[str, Literal["max", "min"]]
"""A metric of ``validate`` and which way it is better."""

Sample = TypeVar("Sample")


class Task(Protocol[Sample]):
    """What is trained, and on what.

    ``sample`` and ``collate`` run in worker processes: the task must pickle, and these two must not
    touch ``model``, which stays behind in the main process.

    Attributes:
        name: For logs and messages: "classify", "segment", "distill-logits", ...
        model: The network that is trained, in place.
        goal: Which metric of ``validate`` decides what the best checkpoint is.
    """

    name: str
    model: nn.Module
    goal: Goal

    def __len__(self) -> int:
        """Training samples in an epoch."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """One training sample.

        Args:
            index: 0 to ``len(self) - 1``.
            rng: The only source of random numbers; seeded by (seed, epoch, index).
        """
        ...

    def collate(self, samples: list[Sample]) -> Batch:
        """The batch made of samples, on the CPU."""
        ...

    def loss(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and metrics to log.

        Args:
            model: The network to call, on the device of ``batch``.
            batch: What ``collate`` gave, moved to the device.
            generator: On the CPU, seeded by (seed, step, rank); the only source of random numbers.

        Returns:
            The mean over the batch's samples, a float32 scalar, and detached scalars by name.
        """
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the held-out part.

        Args:
            model: In eval mode and without gradients; holds the averaged weights where they are on.
        """
        ...

    def save(self, model: nn.Module, path: Path) -> None:
        """Write a ``.safetensors`` file that every other command loads."""
        ...
