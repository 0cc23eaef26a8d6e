"""Files of weights: read, recognise, convert, resize and download them.

One loader for TinyViT's whole lineage. The steps are functions of their own, each dict to dict or
file to file, and no step builds a model::

    fetch / path -> read_state_dict -> detect -> to_canonical -> resize_bias_tables -> your model

``inspect`` and ``convert`` put them together for people. Names are found on first use: what needs
no tensors (the cache's paths, say) loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyvit.checkpoints.cache import cached_path
    from tinyvit.checkpoints.conversion import ConversionReport, convert, convert_tensors
    from tinyvit.checkpoints.detection import Detection, detect
    from tinyvit.checkpoints.download import fetch
    from tinyvit.checkpoints.files import (
        StateFile,
        file_sha256,
        read_state_dict,
        write_state_dict,
    )
    from tinyvit.checkpoints.inspection import Inspection, inspect
    from tinyvit.checkpoints.keymap import from_canonical, to_canonical
    from tinyvit.checkpoints.resize import resize_bias_table, resize_bias_tables
    from tinyvit.checkpoints.transfer import Patience

_HOMES = {
    "ConversionReport": "conversion",
    "Detection": "detection",
    "Inspection": "inspection",
    "Patience": "transfer",
    "StateFile": "files",
    "cached_path": "cache",
    "convert": "conversion",
    "convert_tensors": "conversion",
    "detect": "detection",
    "fetch": "download",
    "file_sha256": "files",
    "from_canonical": "keymap",
    "inspect": "inspection",
    "read_state_dict": "files",
    "resize_bias_table": "resize",
    "resize_bias_tables": "resize",
    "to_canonical": "keymap",
    "write_state_dict": "files",
}

__all__ = [
    "ConversionReport",
    "Detection",
    "Inspection",
    "Patience",
    "StateFile",
    "cached_path",
    "convert",
    "convert_tensors",
    "detect",
    "fetch",
    "file_sha256",
    "from_canonical",
    "inspect",
    "read_state_dict",
    "resize_bias_table",
    "resize_bias_tables",
    "to_canonical",
    "write_state_dict",
]


def __getattr__(name: str) -> object:
    """Find a name in its file, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tinyvit.checkpoints' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
