"""The state of a run in one file, from which it goes on as if it had never stopped.

``state.safetensors`` holds the tensors (network, average, the optimiser's memory) and, as JSON in
its header, the plain facts (step, best figure so far, settings). One file cannot disagree with
itself. There is no state of random generators in it: all chance is drawn from seeds made of
(seed, epoch, sample) or (seed, step, part, process), so the step says it all.

A new state is written beside the old one, flushed to the disk and renamed; the old one stays as
``state.previous.safetensors``. Whenever the process is killed, and whenever the disk is full, one
whole state is there. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tinyvit.checkpoints.files import read_state_dict, write_state_dict
from tinyvit.errors import CheckpointError

__all__ = ["Facts", "RunState", "pack", "read_state", "sweep", "unpack", "write_state"]

Facts: TypeAlias = dict[str, object]
"""JSON-able values by name."""

NEXT, CURRENT, PREVIOUS = (
    "state.next.safetensors",
    "state.safetensors",
    "state.previous.safetensors",
)
_HEADER = "run"


@dataclass(frozen=True)
class RunState:
    """What was read.

    Attributes:
        path: The file.
        tensors: As ``pack`` gives them.
        facts: As they were written.
        trouble: Newer files that could not be read, in words.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: Facts
    trouble: tuple[str, ...] = ()


def write_state(folder: Path, tensors: Mapping[str, Tensor], facts: Facts) -> Path:
    """Write a state; the one before it stays beside it.

    Args:
        folder: The run's folder.
        tensors: As ``pack`` gives them.
        facts: JSON-able.

    Returns:
        The file.

    Raises:
        CheckpointError: It could not be written; then the files are as they were.
    """
    current = folder / CURRENT
    fresh = folder / NEXT
    try:
        write_state_dict(fresh, tensors, metadata={_HEADER: json.dumps(facts)})
    except CheckpointError as err:
        kept = f"the state before it, {current}, is whole" if current.exists() else "none was kept"
        raise CheckpointError(
            f"the run's state could not be saved, and {kept}: {err}; then go on with resume"
        ) from err
    if current.exists():
        os.replace(current, folder / PREVIOUS)
    os.replace(fresh, current)
    _flush(folder)
    return current


def read_state(folder: Path) -> RunState | None:
    """Read the newest whole state of a folder.

    Returns:
        The state; None where none was ever written.

    Raises:
        CheckpointError: There are states, and none can be read.
    """
    trouble: list[str] = []
    for name in (NEXT, CURRENT, PREVIOUS):  # NEXT is there only if a kill came between renames
        path = folder / name
        if not path.exists():
            continue
        try:
            file = read_state_dict(path)
            facts = json.loads(file.metadata[_HEADER])
        except (CheckpointError, KeyError, ValueError) as err:
            trouble.append(f"{path} is no whole state ({err})")
            continue
        return RunState(path, file.tensors, facts, tuple(trouble))
    if trouble:
        raise CheckpointError(
            f"{'; '.join(trouble)}; no other state is there: start anew in another folder"
        )
    return None


def sweep(folder: Path) -> None:
    """Remove what a kill left half written: temporary files beside the run's own."""
    for pattern in (".*.safetensors.*.tmp", ".*.toml.*.tmp", ".*.jsonl.*.tmp", ".*.png.*.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def pack(
    model: nn.Module, average: nn.Module | None, optimiser: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Flatten a run's tensors: ``model/…``, ``average/…``, ``optimiser/parameter/…``."""
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    if average is not None:
        tensors.update({f"average/{key}": value for key, value in average.state_dict().items()})
    for name, parameter in _named(optimiser):
        for key, value in optimiser.state[parameter].items():
            tensors[f"optimiser/{name}/{key}"] = value
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    average: nn.Module | None,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Put a run's tensors back where ``pack`` took them from.

    Raises:
        CheckpointError: They are of another network.
    """
    memory: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, rest = key.partition("/")
        if part == "optimiser":
            name, _, what = rest.rpartition("/")
            memory.setdefault(name, {})[what] = value
    try:
        model.load_state_dict(_part(tensors, "model"))
        if average is not None:
            average.load_state_dict(_part(tensors, "average"))
    except RuntimeError as err:
        raise CheckpointError(f"the state is of another network: {err}") from err
    unknown = sorted(set(memory) - {name for name, _ in _named(optimiser)})
    if unknown:
        raise CheckpointError(
            f"the state is of another run: it moved {', '.join(unknown)}, which does not move now"
        )
    for name, parameter in _named(optimiser):
        if name in memory:
            optimiser.state[parameter] = {
                what: value.clone() if what == "step" else _like(value, parameter)
                for what, value in memory[name].items()
            }


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor of the optimiser's own, in memory as the parameter is: channels last or not."""
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _named(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimiser's parameters by the names that ``parameter_groups`` gave them."""
    for group in optimiser.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _flush(folder: Path) -> None:
    """Make renames survive a power cut, where the system knows how."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
