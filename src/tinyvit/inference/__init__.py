"""A model that answers: pictures in, features out, on any backend.

Names are found on first use: ``OpenVINOGraph`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backend import Backend, LogitsBackend, StageBackend
    from .engine import Encoded, Engine, Picture
    from .onnx_backend import OnnxBackend, OnnxGraph
    from .openvino_backend import OpenVINOBackend
    from .openvino_graph import OpenVINOGraph
    from .torch_backend import TorchBackend

_HOMES = {
    "Backend": "backend",
    "Encoded": "engine",
    "Engine": "engine",
    "LogitsBackend": "backend",
    "OnnxBackend": "onnx_backend",
    "OnnxGraph": "onnx_backend",
    "OpenVINOBackend": "openvino_backend",
    "OpenVINOGraph": "openvino_graph",
    "Picture": "engine",
    "StageBackend": "backend",
    "TorchBackend": "torch_backend",
}

__all__ = [
    "Backend",
    "Encoded",
    "Engine",
    "LogitsBackend",
    "OnnxBackend",
    "OnnxGraph",
    "OpenVINOBackend",
    "OpenVINOGraph",
    "Picture",
    "StageBackend",
    "TorchBackend",
]


def __getattr__(name: str) -> object:
    """Find a name in its file, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tinyvit.inference' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
