"""Measures: how good a classifier or a segmenter is, with intervals, and what it costs.

Each job is one function in a file of its own; names are found on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .classify import ClassifyReport, evaluate_classifier
    from .segment import evaluate_segment

_HOMES = {
    "ClassifyReport": "classify",
    "evaluate_classifier": "classify",
    "evaluate_segment": "segment",
}

__all__ = ["ClassifyReport", "evaluate_classifier", "evaluate_segment"]


def __getattr__(name: str) -> object:
    """Find a name in its file, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tinyvit.evaluate' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
