"""What a file of weights says of itself in its header, beside the tensors: classes, preparation.

Entries are JSON text in a safetensors header. Files of other projects have none of them, and need
none. Family and strides are read where they are used, in ``detection.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from safetensors import SafetensorError, safe_open

from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec

__all__ = ["CLASSES", "IMAGE_SPEC", "classes_in", "header_for", "image_spec_in", "read_header"]

CLASSES = "tinyvit.classes"
"""A list of names, in the order of the classes' numbers."""

IMAGE_SPEC = "tinyvit.image_spec"
"""The object of ``ImageSpec.to_dict``."""


def header_for(
    image_spec: ImageSpec | None = None, classes: Sequence[str] | None = None
) -> dict[str, str]:
    """Entries for a file to be written.

    Args:
        image_spec: How pictures are prepared for the model.
        classes: Names of the classes, in the order of their numbers.
    """
    header = {}
    if image_spec is not None:
        header[IMAGE_SPEC] = json.dumps(image_spec.to_dict())
    if classes is not None:
        header[CLASSES] = json.dumps(list(classes), ensure_ascii=False)
    return header


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in a safetensors header, without its tensors; none for files of other kinds."""
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def image_spec_in(
    header: Mapping[str, str], path: str | os.PathLike[str] = "the file"
) -> ImageSpec | None:
    """How pictures are prepared for the model, where the header says so.

    Args:
        header: Texts of a header.
        path: The file, for the words of an error.

    Raises:
        CheckpointError: The entry is damaged.
    """
    if IMAGE_SPEC not in header:
        return None
    try:
        return ImageSpec.from_dict(json.loads(header[IMAGE_SPEC]))
    except (ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path}: {IMAGE_SPEC} in the header is damaged: {err}") from err


def classes_in(
    header: Mapping[str, str], path: str | os.PathLike[str] = "the file"
) -> tuple[str, ...] | None:
    """Names of the classes, where the header has them.

    Args:
        header: Texts of a header.
        path: The file, for the words of an error.

    Raises:
        CheckpointError: The entry is damaged.
    """
    if CLASSES not in header:
        return None
    try:
        names = json.loads(header[CLASSES])
    except ValueError as err:
        raise CheckpointError(f"{path}: {CLASSES} in the header is damaged: {err}") from err
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: {CLASSES} in the header must be a JSON list of names")
    return tuple(names)
