"""A model that answers: pictures in, features out, on any backend."""

from .backend import Backend, StageBackend
from .engine import Encoded, Engine, Picture
from .torch_backend import TorchBackend

__all__ = ["Backend", "Encoded", "Engine", "Picture", "StageBackend", "TorchBackend"]
