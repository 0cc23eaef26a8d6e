"""Learning: one loop for every task, on a laptop, a GPU or many, that can be stopped at any moment.

``task.py`` says what a task brings, ``settings.py`` what can be chosen, ``loop.py`` puts them
together. Names are found on first use: ``TrainSettings`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .divergence import DivergedError
    from .journal import Progress
    from .loop import Result, train
    from .settings import TrainSettings
    from .task import Batch, Task

_HOMES = {
    "Batch": "task",
    "DivergedError": "divergence",
    "Progress": "journal",
    "Result": "loop",
    "Task": "task",
    "TrainSettings": "settings",
    "train": "loop",
}

__all__ = [
    "Batch",
    "DivergedError",
    "Progress",
    "Result",
    "Task",
    "TrainSettings",
    "train",
]


def __getattr__(name: str) -> object:
    """Find a name in its file, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tinyvit.train' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
