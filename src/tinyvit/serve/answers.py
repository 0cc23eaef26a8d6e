"""Masks as a client wants them: numbers, run lengths, outlines, PNG, low-res logits."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from tinyvit.images import mask_ops
from tinyvit.images.draw import to_png
from tinyvit.images.mask_ops import outlines
from tinyvit.sam.segmenter import Masks

from .schema import MaskModel, Object, RunLengths, SegmentRequest, pack_logits

EXACT = {"rle", "counts", "polygons", "png"}
"""What needs the mask in the image's own pixels."""


def describe(masks: Masks, request: SegmentRequest) -> list[Object]:
    """The objects of an answer, in the order of the prompts."""
    include: set[str] = set(request.include)
    found = []
    for number, prompt in enumerate(masks.prompts):
        scores = masks.predicted_ious[number]
        best = int(np.argmax(scores))
        wanted = range(len(scores)) if request.which == "all" else [best]
        found.append(
            Object(
                name=prompt.name,
                best=best,
                masks=[_mask(masks, number, index, include, request) for index in wanted],
            )
        )
    return found


def _mask(
    masks: Masks, number: int, index: int, include: set[str], request: SegmentRequest
) -> MaskModel:
    facts: dict[str, Any] = {
        "index": index,
        "score": float(masks.predicted_ious[number][index]),
    }
    if include & EXACT:
        facts |= _exact(masks.mask(number, index), include, request.tolerance)
    if "low_res" in include:
        logits = np.asarray(masks.low_res_logits[number][index], np.float32)
        size = masks.placement.resized_size
        facts["low_res"] = pack_logits(logits, size, masks.logit_stride, request.low_res_dtype)
    return MaskModel(**facts)


def _exact(mask: NDArray[np.bool_], include: set[str], tolerance: float) -> dict[str, Any]:
    left, top, width, height = mask_box(mask)
    facts: dict[str, Any] = {"area": int(mask.sum()), "box": [left, top, width, height]}
    if "rle" in include:
        facts["rle"] = RunLengths(**mask_ops.encode(mask))
    if "counts" in include:
        facts["counts"] = RunLengths(**mask_ops.encode(mask, compressed=False))
    if "polygons" in include:
        facts["polygons"] = [ring.tolist() for ring in outlines(mask, tolerance)]
    if "png" in include:
        facts["png"] = base64.b64encode(to_png(mask)).decode()
    return facts


def mask_box(mask: NDArray[np.bool_]) -> list[float]:
    """x, y, width, height of the box around a mask, as ``Masks.to_coco`` has it."""
    x0, y0, x1, y1 = map(float, mask_ops.box_around(mask))
    return [x0, y0, x1 - x0, y1 - y0]


def jpeg_view(rgb: NDArray[np.uint8], side: int) -> str:
    """An image of at most ``side`` pixels a side as base64 of a JPEG."""
    image = PilImage.fromarray(rgb)
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return base64.b64encode(stream.getvalue()).decode()


def tensors(masks: Masks) -> bytes:
    """All low-res logits (fp16) and scores (fp32) as a safetensors file."""
    from safetensors.numpy import save

    most = max(len(scores) for scores in masks.predicted_ious)
    shape = np.asarray(masks.low_res_logits[0]).shape[-2:]
    logits = np.full((len(masks), most, *shape), -np.inf, np.float16)
    scores = np.full((len(masks), most), np.nan, np.float32)
    rows: Sequence[Any] = masks.low_res_logits
    for number, (row, values) in enumerate(zip(rows, masks.predicted_ious, strict=True)):
        logits[number, : len(values)] = np.clip(np.asarray(row), -65504, 65504)
        scores[number, : len(values)] = values
    return bytes(save({"low_res_logits": logits, "scores": scores}))
