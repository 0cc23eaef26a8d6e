"""The processes that train together, as ``torchrun`` starts them; one process is the common case.

Each process computes its part of every step; ``DistributedDataParallel`` adds up the gradients.
Only the first process writes files, and every process reads the state of a run that is resumed, so
the run's folder must be one that all of them see. Parameters are not sharded (FSDP): the largest
model here takes 0.35 GB with gradients and AdamW's state.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinyvit.inference.backend import choose_device

_PATIENCE = timedelta(hours=12)  # the others wait while the first process validates


@dataclass(frozen=True)
class Processes:
    """This process, ``rank``, among the ``count`` that train together."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, module: nn.Module) -> nn.Module:
        """Let a module, whose ``forward`` gives the loss, start as the first process's.

        Its gradients are added up with the others'. Buffers are the first process's: batch
        statistics that are updated and not synchronised are those of its samples.
        """
        if self.count == 1:
            return module
        # a prompt that is not there leaves its weights out
        return DistributedDataParallel(module, find_unused_parameters=True)

    def gradient_sync(self, module: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """Add up gradients over the processes in the last of a step's parts only."""
        if isinstance(module, DistributedDataParallel) and not is_last:
            context: AbstractContextManager[None] = module.no_sync()
            return context
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, the same in each; changes ``values``."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started with this one, and leave them at the end.

    "auto" and "cuda" give each process a GPU of its own; ValueError where there are too few.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=torch.device(choose_device(device)))
        return
    rank, place = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    own = _own_device(choose_device(device), place)
    is_ours = not dist.is_initialized()
    if is_ours:
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        with warnings.catch_warnings():
            # torch says so where all parameters happen to be used; that is no fault
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True.*")
            yield Processes(rank, count, own)
    finally:
        if is_ours:
            dist.destroy_process_group()


def _own_device(device: str, place: int) -> torch.device:
    """The device of the process at a place of this machine."""
    if device != "cuda":
        return torch.device(device)
    if place >= torch.cuda.device_count():
        raise ValueError(
            f"process {place} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "start that many processes, or take device='cpu'"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)
