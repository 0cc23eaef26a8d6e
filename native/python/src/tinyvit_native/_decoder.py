"""SAM's prompt encoder and mask decoder in the native library, on numpy arrays.

Shapes: N prompts, P points of a prompt, K masks, C channels, h w the features' grid.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _abi
from ._net import Floats, call, library, to_tensors


class Prepared:
    """What all prompts on an image share; made by ``Decoder.prepare``."""

    def __init__(self, decoder: Decoder, features: NDArray[Any]) -> None:
        data = np.ascontiguousarray(features, np.float32)
        if data.ndim != 3:
            raise ValueError(f"features must be [channels, height, width], got {list(data.shape)}")
        self.decoder, self.size = decoder, data.shape[1:]
        self.handle = ctypes.c_void_p()
        call(
            "tinyvit_prepare",
            decoder.handle,
            data.ctypes.data,
            *data.shape,
            ctypes.byref(self.handle),
        )

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().tinyvit_prepared_destroy(self.handle)

    @property
    def nbytes(self) -> int:
        """How much memory it holds."""
        return int(library().tinyvit_prepared_bytes(self.handle))


class Decoder:
    """Prompts on an image's features become masks and their predicted IoU, in float32.

    Args:
        tensors: Those of a SAM's state dict, "prompt_encoder..." and "mask_decoder...".
        num_heads: Heads of every attention.
        grid: (h, w) of the features of a padded image.
        input_size: (height, width) of the model's input in pixels.
        threads: Threads of a call; 0 means as many as the process has CPUs.
        isa: As for ``Net``.

    Raises:
        ValueError: A tensor is missing or has another shape.
        NativeError: The library cannot run such a decoder.
    """

    def __init__(
        self,
        tensors: Mapping[str, NDArray[Any]],
        *,
        num_heads: int = 8,
        grid: tuple[int, int] = (64, 64),
        input_size: tuple[int, int] = (1024, 1024),
        threads: int = 0,
        isa: str | None = None,
    ) -> None:
        self.handle = ctypes.c_void_p()
        config = _abi.DecoderConfig(
            num_heads=num_heads,
            grid_height=grid[0],
            grid_width=grid[1],
            input_height=input_size[0],
            input_width=input_size[1],
            threads=threads,
            isa=isa.encode() if isa else None,
        )
        array, count, kept = to_tensors(tensors)
        call("tinyvit_decoder_create", config, array, count, ctypes.byref(self.handle))
        del kept

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().tinyvit_decoder_destroy(self.handle)

    def prepare(self, features: NDArray[Any]) -> Prepared:
        """What all prompts on features [C, h, w] share."""
        return Prepared(self, features)

    def decode(
        self,
        prepared: Prepared,
        *,
        points: tuple[NDArray[Any], NDArray[Any]] | None = None,
        boxes: NDArray[Any] | None = None,
        masks: NDArray[Any] | None = None,
        multimask: bool = True,
    ) -> tuple[Floats, Floats]:
        """Decode N prompts of one kind, in pixels of the model's input.

        Args:
            prepared: Of the image.
            points: (x and y [N, P, 2], labels [N, P]: 1 the object, 0 not the object, -1 none).
            boxes: [N, 4], left, top, right and bottom.
            masks: Logits [N, 1, 4h, 4w].
            multimask: Give the masks of an ambiguous prompt instead of the single one.

        Returns:
            (logits [N, K, 4h, 4w], predicted IoU [N, K]).

        Raises:
            ValueError: The prompts have other shapes, or do not go together.
        """
        if prepared.decoder is not self:
            raise ValueError("the image was prepared by another decoder")
        size = tuple(4 * n for n in prepared.size)
        prompts = _abi.Prompts(multimask=int(multimask))
        kept, counts = [], set()

        def give(values: NDArray[Any], kind: Any, shape: tuple[int, ...], name: str) -> int:
            data = np.ascontiguousarray(values, kind)
            if data.shape[1:] != shape:
                raise ValueError(
                    f"{name} must be [N, {', '.join(map(str, shape))}], got {list(data.shape)}"
                )
            kept.append(data)
            counts.add(len(data))
            return int(data.ctypes.data)

        if points is not None:
            prompts.num_points = np.shape(points[0])[1]
            prompts.points = give(points[0], np.float32, (prompts.num_points, 2), "points")
            prompts.labels = give(points[1], np.int32, (prompts.num_points,), "labels")
        if boxes is not None:
            prompts.boxes = give(boxes, np.float32, (4,), "boxes")
        if masks is not None:
            prompts.masks = give(masks, np.float32, (1, *size), "masks")
        if len(counts) > 1:
            raise ValueError(f"prompts must be about as many objects each, got {sorted(counts)}")
        number = ctypes.c_int32()
        call("tinyvit_decode", self.handle, None, prompts, None, None, ctypes.byref(number))
        prompts.count = counts.pop() if counts else 1
        logits = np.empty((prompts.count, number.value, *size), np.float32)
        scores = np.empty(logits.shape[:2], np.float32)
        if prompts.count:
            call(
                "tinyvit_decode",
                self.handle,
                prepared.handle,
                prompts,
                logits.ctypes.data,
                scores.ctypes.data,
                None,
            )
        return logits, scores
