"""SAM's prompt encoder and mask decoder in the native library, on numpy arrays.

Shapes: N prompts, P points of a prompt, K masks, C channels, h w the features' grid, H W an image.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _abi
from ._net import Floats, call, library, to_tensors

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the model's input, sizes as (height, width).

    Attributes:
        covered: Pixels of the input that the logits cover, padding included.
        resized: The image's part of it.
        original: The image.
    """

    covered: Size
    resized: Size
    original: Size

    def struct(self) -> _abi.Placement:
        """As the library has it."""
        sizes = (*self.covered, *self.resized, *self.original)
        names = [name for name, *_ in _abi.Placement._fields_[1:]]
        return _abi.Placement(**dict(zip(names, sizes, strict=True)))


@dataclass(frozen=True)
class Region:
    """A mask that was found.

    Attributes:
        prompt: Of which prompt.
        mask: Which of its masks.
        score: Predicted IoU.
        stability: IoU of the masks at a higher and a lower threshold; nan for no pixels.
        box: First and last pixels, x0, y0, x1, y1, in the frame.
        counts: COCO's run lengths in the frame, int64; None where it is not stable enough.
    """

    prompt: int
    mask: int
    score: float
    stability: float
    box: tuple[int, int, int, int]
    counts: NDArray[np.int64] | None


class Prepared:
    """What all prompts on an image share; made by ``Decoder.prepare``."""

    def __init__(
        self, decoder: Decoder, features: NDArray[Any], early: NDArray[Any] | None
    ) -> None:
        data = np.ascontiguousarray(features, np.float32)
        if data.ndim != 3:
            raise ValueError(f"features must be [channels, height, width], got {list(data.shape)}")
        channels, *size = data.shape
        struct = _abi.Embedding(
            channels=channels, height=size[0], width=size[1], features=data.ctypes.data
        )
        if early is not None:
            early = np.ascontiguousarray(early, np.float32)
            if early.ndim != 3 or [*early.shape[:2]] != size:
                raise ValueError(
                    f"early must be [{size[0]}, {size[1]}, channels], got {list(early.shape)}"
                )
            struct.early_channels, struct.early = early.shape[2], early.ctypes.data
        self.decoder, self.size = decoder, (size[0], size[1])
        self.handle = ctypes.c_void_p()
        call("tinyvit_prepare", decoder.handle, struct, ctypes.byref(self.handle))

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
        tensors: Those of a SAM's state dict, "prompt_encoder..." and "mask_decoder..."; Light
            HQ-SAM's too.
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
        grid: Size = (64, 64),
        input_size: Size = (1024, 1024),
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

    def prepare(self, features: NDArray[Any], early: NDArray[Any] | None = None) -> Prepared:
        """What all prompts on features [C, h, w] share; ``early`` [h, w, D] is for Light HQ-SAM."""
        return Prepared(self, features, early)

    def decode(
        self,
        prepared: Prepared,
        *,
        points: tuple[NDArray[Any], NDArray[Any]] | None = None,
        boxes: NDArray[Any] | None = None,
        masks: NDArray[Any] | None = None,
        multimask: bool = True,
        min_score: float | None = None,
        hq_only: bool = False,
    ) -> tuple[Floats, Floats]:
        """Decode N prompts of one kind, in pixels of the model's input.

        Args:
            prepared: Of the image.
            points: (x and y [N, P, 2], labels [N, P]: 1 the object, 0 not the object, -1 none).
            boxes: [N, 4], left, top, right and bottom.
            masks: Logits [N, 1, 4h, 4w].
            multimask: Give the masks of an ambiguous prompt instead of the single one. Light
                HQ-SAM gives one mask in any case.
            min_score: Compute the logits of masks with a higher predicted IoU alone.
            hq_only: Give Light HQ-SAM's own mask, not the correction by it.

        Returns:
            (logits [N, K, 4h, 4w], predicted IoU [N, K]); with ``min_score`` logits [M, 4h, 4w] in
            the order of ``np.argwhere(scores > min_score)``.

        Raises:
            ValueError: The prompts have other shapes, or do not go together.
        """
        prompts, kept = self._prompts(prepared, points, boxes, masks, multimask, min_score)
        prompts.hq_only = int(hq_only)
        size = tuple(4 * n for n in prepared.size)
        number = self._masks(multimask)
        logits = np.empty((prompts.count, number, *size), np.float32)
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
        del kept
        return (logits if min_score is None else logits[scores > np.float32(min_score)]), scores

    def find(
        self,
        prepared: Prepared,
        placement: Placement,
        *,
        points: tuple[NDArray[Any], NDArray[Any]],
        threshold: float = 0.0,
        offset: float = 1.0,
        min_score: float | None = None,
        min_stability: float = 0.0,
        frame: Size | None = None,
        corner: Size = (0, 0),
    ) -> tuple[list[Region], Floats]:
        """The masks of many points, as run lengths; whole masks and their logits are never kept.

        Args:
            prepared: Of the image.
            placement: Of the image.
            points: As for ``decode``.
            threshold: Logits above it are mask.
            offset: Stability compares the masks this much above and below the threshold.
            min_score: Leave out masks whose predicted IoU is not higher.
            min_stability: Give no run lengths of less stable masks; 0 takes all.
            frame: (H, W) of the image that this one is a crop of; None: of the image itself.
            corner: (y, x) of the crop in it.

        Returns:
            (regions in the order of points and masks, predicted IoU [N, K] of all masks).

        Raises:
            ValueError: Wrong shapes, or the image does not lie in the frame.
        """
        prompts, kept = self._prompts(prepared, points, None, None, True, min_score)
        height, width = frame or placement.original
        search = _abi.Search(
            threshold=threshold,
            offset=offset,
            min_stability=min_stability,
            frame_height=height,
            frame_width=width,
            top=corner[0],
            left=corner[1],
        )
        scores = np.empty((prompts.count, self._masks(True)), np.float32)
        regions, number = ctypes.c_void_p(), ctypes.c_uint64()
        call(
            "tinyvit_find",
            self.handle,
            prepared.handle,
            prompts,
            placement.struct(),
            search,
            ctypes.byref(regions),
            scores.ctypes.data,
        )
        del kept
        try:
            found = library().tinyvit_regions_list(regions, ctypes.byref(number))
            return [_to_region(found[i]) for i in range(number.value)], scores
        finally:
            library().tinyvit_regions_destroy(regions)

    def _masks(self, multimask: bool) -> int:
        """Masks of a prompt."""
        number, prompts = ctypes.c_int32(), _abi.Prompts(multimask=int(multimask))
        call("tinyvit_decode", self.handle, None, prompts, None, None, ctypes.byref(number))
        return number.value

    def _prompts(
        self,
        prepared: Prepared,
        points: tuple[NDArray[Any], NDArray[Any]] | None,
        boxes: NDArray[Any] | None,
        masks: NDArray[Any] | None,
        multimask: bool,
        min_score: float | None,
    ) -> tuple[_abi.Prompts, list[Any]]:
        """Prompts as the library has them, and the memory that they refer to."""
        if prepared.decoder is not self:
            raise ValueError("the image was prepared by another decoder")
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
            size = tuple(4 * n for n in prepared.size)
            prompts.masks = give(masks, np.float32, (1, *size), "masks")
        if len(counts) > 1:
            raise ValueError(f"prompts must be about as many objects each, got {sorted(counts)}")
        prompts.count = counts.pop() if counts else 1
        if min_score is not None:
            bound = ctypes.c_float(min_score)
            kept.append(bound)
            prompts.min_score = ctypes.pointer(bound)
        return prompts, kept


def _to_region(found: _abi.Region) -> Region:
    counts = None
    if found.counts:
        counts = np.ctypeslib.as_array(found.counts, (found.num_counts,)).copy()
    x0, y0, x1, y1 = found.box
    return Region(found.prompt, found.mask, found.score, found.stability, (x0, y0, x1, y1), counts)


def enlarge(
    logits: NDArray[Any], placement: Placement, threshold: float | None = None
) -> NDArray[Any]:
    """Logits [..., h, w] in the image's own pixels, as segment-anything enlarges them.

    Args:
        logits: Low-res logits.
        placement: Of the image.
        threshold: Give masks of the logits above it; None gives the logits.

    Returns:
        [..., H, W], bool or float32.

    Raises:
        ValueError: The logits do not cover the image.
    """
    data = np.ascontiguousarray(logits, np.float32)
    if data.ndim < 2:
        raise ValueError(f"logits must be [..., h, w], got {list(data.shape)}")
    kind = np.float32 if threshold is None else np.bool_
    result = np.empty((*data.shape[:-2], *placement.original), kind)
    height, width = data.shape[-2:]
    call(
        "tinyvit_enlarge",
        data.ctypes.data,
        data.size // (height * width),
        height,
        width,
        placement.struct(),
        0.0 if threshold is None else threshold,
        None if threshold is None else result.ctypes.data,
        result.ctypes.data if threshold is None else None,
    )
    return result
