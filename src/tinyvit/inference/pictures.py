"""What a caller may hand in as pictures, one by one, and the work that makes each an input.

Knows how pictures are read and prepared; it knows no backend and no threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np
from torch import Tensor

from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Picture", "Prepared", "each", "preparations", "prepare"]

Picture: TypeAlias = "str | Path | bytes | BinaryIO | Image | np.ndarray[Any, Any] | Tensor"
"""One picture: a path, encoded bytes, an open file, a PIL image, RGB [H, W, 3], or a tensor
[3, H, W]."""

Prepared: TypeAlias = "tuple[Tensor, Placement]"
"""A model's input [3, H, W] float32, and where the picture lies in it."""


def each(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """One picture as a list of one; stacks [N, H, W, 3], [N, 3, H, W] and iterables as they are."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images if images.ndim == 4 else [images]
    if isinstance(images, (str, bytes, bytearray, memoryview, Path)) or hasattr(images, "read"):
        return [cast(Picture, images)]
    return images if isinstance(images, Iterable) else [images]


def prepare(picture: Picture, spec: ImageSpec) -> Prepared:
    """Decode a picture and make it a model's input.

    Raises:
        ImageError: The picture cannot be read.
        TypeError: It is no picture.
    """
    return to_tensor(decode(picture), spec)


def preparations(images: Iterable[Picture], spec: ImageSpec) -> Iterator[Callable[[], Prepared]]:
    """What is left to do for each picture, which may be done later and in another thread.

    Files and bytes of files are left as they are. What may change meanwhile (an open file that is
    read on, a buffer that is filled again, the frames of a PIL image) is decoded when it is taken.

    Raises:
        ImageError: A picture that is decoded here cannot be read.
        TypeError: It is no picture.
    """
    for picture in images:
        if isinstance(picture, (str, bytes, os.PathLike)):
            yield partial(prepare, picture, spec)
            continue
        image = decode(picture)
        if isinstance(picture, (np.ndarray, Tensor)):
            image = image.copy()  # it may share the memory of one that is used again
        yield partial(to_tensor, image, spec)
