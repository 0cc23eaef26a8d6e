"""When the loss or the gradient is no number any more: keep the batch, and say so.

Found before the optimiser steps, so the weights are still those of the step before. What the batch
means is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tinyvit.checkpoints.files import write_state_dict
from tinyvit.errors import CheckpointError, TinyViTError

from .samples import Key
from .task import Batch

__all__ = ["DivergedError", "keep_batch"]


class DivergedError(TinyViTError, ArithmeticError):
    """The loss or the gradient became infinite or no number; the batch that did it was kept."""


def keep_batch(
    folder: Path, step: int, rank: int, parts: Sequence[tuple[Sequence[Key], Batch]]
) -> str:
    """Write the batch of a step to ``diverged_step_N_rank_R.safetensors``.

    Tensors are written as ``part/name``; the samples' (epoch, index) and whatever is no tensor
    stand as text in the file's header.

    Args:
        folder: The run's folder.
        step: The step, counted from 1.
        rank: The process; each writes what it had.
        parts: (keys, batch) of each part.

    Returns:
        In words, where the batch is, or why it could not be kept.
    """
    path = folder / f"diverged_step_{step}_rank_{rank}.safetensors"
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for number, (keys, batch) in enumerate(parts):
        header[f"{number}/samples"] = json.dumps([list(key) for key in keys])
        values: Mapping[str, object] = batch  # what a task alone reads is no tensor
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}/{name}"] = value
            else:
                header[f"{number}/{name}"] = repr(value)
    try:
        write_state_dict(path, tensors, metadata=header)
    except CheckpointError as err:
        return f"its batch could not be kept ({err})"
    return f"its batch is kept in {path}"
