"""Packages that may be missing: names found on first use, and the line to type where one is not.

Every package's ``__init__`` calls ``attach``, so that a name that needs torch says so. Code that
imports torch inside a function calls ``need_torch`` before.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import lazy_loader  # type: ignore[import-untyped]

from tinyvit.errors import MissingExtraError

EXTRAS = {
    "torch": "torch",
    "scipy": "torch",
    "huggingface_hub": "torch",
    "onnx": "export",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "sse_starlette": "serve",
}
"""Package that may be missing -> the extra that brings it."""


def attach(package: str, stub: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], Any]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose public names its stub lists.

    A name whose module wants a package that is not installed is a ``MissingExtraError``.
    """
    find, names, listed = lazy_loader.attach_stub(package, stub)

    def find_or_say(name: str) -> Any:
        try:
            return find(name)
        except ModuleNotFoundError as err:
            raise missing(err, f"{package}.{name}") from err

    return find_or_say, names, listed


def missing(err: ModuleNotFoundError, what: str) -> ImportError:
    """The error to raise for a failed import: with the line to type for a package of an extra."""
    root = (err.name or "").partition(".")[0]
    if root not in EXTRAS:
        return err
    return MissingExtraError(
        f"{what} needs {root}, which is not installed; pip install 'tinyvit[{EXTRAS[root]}]'"
    )


def need_torch(what: str) -> None:
    """``need`` for torch."""
    need("torch", what)


def need(package: str, what: str) -> None:
    """Raise a MissingExtraError where a package of ``EXTRAS`` is not installed."""
    if find_spec(package) is None:
        raise missing(ModuleNotFoundError(name=package), what)
