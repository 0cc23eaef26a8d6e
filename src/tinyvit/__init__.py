"""TinyViT, the compact vision transformer: encoder, classifier, segmenter, for any image size.

The public names are found on first use, so that ``import tinyvit`` takes milliseconds and loads no
torch. Everything else is reached by its room: ``tinyvit.modules`` has the ten module classes,
``tinyvit.checkpoints`` reads and converts files of weights, ``tinyvit.images`` decodes and draws.
"""

from __future__ import annotations

import importlib

import lazy_loader

_find, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*_names, "__version__"])


def __getattr__(name: str) -> object:
    """Find a public name where it lives; lazy_loader keeps it."""
    if name != "__version__":
        return _find(name)
    value = globals()[name] = importlib.import_module("importlib.metadata").version("tinyvit")
    return value


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
