"""What the loop asks of a task, and how its samples come: their order, their seeds, the batches.

All random numbers in a task come from the generators it is handed: they are seeded by what is being
done (epoch and sample, or step and rank). An epoch visits each sample at most once, in an order
drawn from (seed, epoch). Each step takes the next ``batch_size`` samples of it and splits them into
parts, one for each process and accumulated pass, which differ by one sample at most. The last step
of an epoch takes what is left. It is left out where ``drop_last`` says so or where fewer samples
are left than there are processes: nothing is ever repeated to fill it up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .settings import SettingError, SettingsError

Batch: TypeAlias = dict[str, Tensor]
"""Tensors by name, batch first. Values that are no tensors pass through the loop untouched."""

Goal: TypeAlias = tuple[str, Literal["max", "min"]]
"""A metric of ``validate`` and which way it is better."""

Loss: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""The loss of a batch, and metrics by name."""

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

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """One training sample.

        Args:
            index: 0 to ``len(self) - 1``.
            rng: The only source of random numbers; seeded by (seed, epoch, index).
        """

    def collate(self, samples: list[Sample]) -> Batch:
        """The batch made of samples, on the CPU."""

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Loss:
        """The loss of a batch, and metrics to log.

        Args:
            model: The network to call, on the device of ``batch``.
            batch: What ``collate`` gave, moved to the device; ``progress`` in it is the part of the
                run's steps that is done, a float.
            generator: On the CPU, seeded by (seed, step, rank); the only source of random numbers.

        Returns:
            The mean over the batch's samples, a float32 scalar, and detached scalars by name.
        """

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the held-out part.

        Args:
            model: In eval mode and without gradients; holds the averaged weights where they are on.
        """

    def save(self, model: nn.Module, path: Path) -> None:
        """Write a ``.safetensors`` file that every other command loads."""


# -- the order of samples ------------------------------------------------------------------------

Key = tuple[int, int]
"""(epoch, index): with the seed, all that a sample's randomness depends on."""


@dataclass(frozen=True)
class Order:
    """The order of the samples of a run."""

    samples: int  # samples in the data
    batch_size: int  # samples of a step, over all processes
    accumulate: int = 1  # parts of a step in each process
    ranks: int = 1  # processes
    seed: int = 0  # of the order
    drop_last: bool = False  # leave out an epoch's last, smaller step

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("the training data holds no samples")
        least = self.accumulate * self.ranks
        if self.batch_size < least:
            wanted = f"a sample for each accumulated part of {self.ranks} processes"
            raise SettingError("batch_size", f"at least {least}: {wanted}", self.batch_size)
        if self.steps_per_epoch < 1:
            words = f"is {self.batch_size}, and {self.samples} samples give {self.ranks} processes"
            wrong = [("batch_size", f"{words} no step"), ("drop_last", f"is {self.drop_last}")]
            advice = "; take a smaller batch, or keep an epoch's last, smaller step"
            raise SettingsError("", wrong, advice)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        whole, left = divmod(self.samples, self.batch_size)
        return whole + (not self.drop_last and left >= self.ranks)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, of a step, from 0."""
        return step // self.steps_per_epoch

    def group(self, step: int) -> NDArray[np.int64]:
        """Indices of all samples of a step, [n] with n <= batch_size."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.batch_size
        return _shuffled(self.samples, self.seed, epoch)[first : first + self.batch_size]

    def parts(self, step: int, rank: int) -> list[list[Key]]:
        """What a process computes in a step, part after part; no part is empty."""
        epoch, indices = self.epoch_of(step), self.group(step)
        passes = min(self.accumulate, len(indices) // self.ranks)
        pieces = np.array_split(indices, passes * self.ranks)
        return [[(epoch, int(i)) for i in piece] for piece in pieces[rank :: self.ranks]]


@lru_cache(maxsize=2)
def _shuffled(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch; kept, since every step asks for it."""
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    order.flags.writeable = False
    return order


def derived_seed(*numbers: int) -> int:
    """A seed for ``torch`` made of numbers, 0 or more: alike for equal ones, else unrelated."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def load_batches(
    task: Task[Sample],
    order: Order,
    rank: int,
    steps: range,
    workers: int = 0,
    is_pinned: bool = False,
) -> Iterator[Batch]:
    """The batches of process ``rank``, one for each part of each step, in order, on the CPU.

    ``workers`` processes prepare them ahead, none with 0; ``is_pinned`` puts them in memory from
    which a GPU fetches them faster.
    """
    keys = (part for step in steps for part in order.parts(step, rank))
    light = copy.copy(task)
    light.model = nn.Identity()  # other processes need no network
    loader: DataLoader[Sample] = DataLoader(
        _Samples(light, order.seed),
        batch_sampler=cast("Any", keys),  # an iterator will do: it is read once
        num_workers=workers,
        collate_fn=light.collate,
        generator=torch.Generator(),  # else the loader would draw from the global one
        pin_memory=is_pinned,
    )
    return iter(loader)


def stack_samples(samples: list[dict[str, Any]]) -> Batch:
    """Values of samples by name, stacked; reasons by name under ``broken`` are put together."""
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [one[key] for one in samples]
        if isinstance(first, dict):
            batch[key] = {name: text for held in values for name, text in held.items()}
        elif isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.from_numpy(np.stack(values))
    return batch


class _Samples(Dataset[Sample]):
    def __init__(self, task: Task[Sample], seed: int) -> None:
        self.task, self.seed = task, seed

    def __getitem__(self, key: Key) -> Sample:
        return self.task.sample(key[1], np.random.default_rng([self.seed, *key]))
