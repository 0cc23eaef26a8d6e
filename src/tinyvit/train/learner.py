"""Network and loss as one module, and one step's gradient, part after part.

Knows no files, no optimiser and no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .distributed import Processes
from .samples import Key, Order, derived_seed
from .settings import TrainSettings
from .task import Batch, Task

__all__ = ["Gradient", "Learner", "accumulate_gradient"]

Sample = TypeVar("Sample")


class Learner(nn.Module):
    """A task's loss as a ``forward``, which ``DistributedDataParallel`` needs to see.

    Args:
        task: Gives the loss.
        precision: "bf16" computes in autocast.
        device: Of the network and the batches.
    """

    def __init__(self, task: Task[Sample], precision: str, device: torch.device) -> None:
        super().__init__()
        self.model = task.model
        self.loss_of = task.loss
        self.is_bf16 = precision == "bf16"
        self.device = device

    def forward(self, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the figures of a batch; all chance comes from ``seed``.

        Raises:
            ValueError: The task's loss is no scalar.
        """
        torch.manual_seed(seed)  # of dropout and stochastic depth, which know no other source
        generator = torch.Generator().manual_seed(derived_seed(seed))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            loss, figures = self.loss_of(self.model, batch, generator)
        if loss.ndim:
            raise ValueError(f"a task's loss must be a scalar, got one of shape {list(loss.shape)}")
        return loss, figures


@dataclass(frozen=True)
class Gradient:
    """What came with a step's gradient.

    Attributes:
        loss: Mean over this process's samples, times its part of all samples of the step; the sum
            over the processes is the step's loss.
        figures: Means over this process's samples.
        parts: (keys, batch on the CPU) of each part.
    """

    loss: float
    figures: dict[str, float]
    parts: list[tuple[list[Key], Batch]]


def accumulate_gradient(
    learner: nn.Module,
    batches: Iterator[Batch],
    order: Order,
    step: int,
    settings: TrainSettings,
    processes: Processes,
) -> Gradient:
    """Compute the gradient of the mean loss over a step's samples, in this and the other processes.

    Each part counts by its number of samples, so parts of different sizes give the same mean as
    one large batch.

    Args:
        learner: A ``Learner``, shared with the other processes; its gradients are empty.
        batches: The batches of this process, in order.
        order: Which samples they are.
        step: The step, from 0.
        settings: Seed and memory layout.
        processes: The processes.
    """
    keys = order.parts(step, processes.rank)
    total, own = len(order.group(step)), sum(len(part) for part in keys)
    parts: list[tuple[list[Key], Batch]] = []
    sums: dict[str, float] = {}
    for number, part in enumerate(keys):
        batch = next(batches)
        parts.append((part, batch))
        # the same in all processes, so that chance gives each as much to do: they wait for the last
        seed = derived_seed(settings.seed, step, number, 0)
        with processes.adding_up(learner, is_last=number == len(keys) - 1):
            loss, figures = learner(_moved(batch, processes.device, settings.channels_last), seed)
            # the processes' gradients are averaged, hence their number
            (loss * (len(part) * processes.count / total)).backward()
        names = ["loss", *figures]
        values = [loss.detach(), *(figure.detach() for figure in figures.values())]
        shown = torch.stack([value.float().reshape(()) for value in values]).tolist()
        for name, value in zip(names, shown, strict=True):
            sums[name] = sums.get(name, 0.0) + value * len(part)
    loss_sum = sums.pop("loss")
    return Gradient(loss_sum / total, {name: s / own for name, s in sums.items()}, parts)


def _moved(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    """A batch on the device, its pictures in channels-last memory."""
    moved = dict(batch)
    values: Mapping[str, object] = batch  # what a task alone reads is no tensor
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        there = value.to(device, non_blocking=True)
        if channels_last and there.ndim == 4 and there.is_floating_point():
            there = there.contiguous(memory_format=torch.channels_last)
        moved[name] = there
    return moved
