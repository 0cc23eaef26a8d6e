"""The masks of one picture: kept as low-res logits, enlarged one at a time when asked for.

A full-size mask of every prompt would take a gigabyte for a few hundred prompts on a photograph;
its low-res logits take 256 kB. Knows no model. Coordinates are continuous: a box around one pixel
is 1 wide.

Letters: N prompts, K masks of a prompt, H W the picture, h4 w4 the low-res logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.image_spec import Placement

from .prompts import Prompt
from .rle import encode
from .upscale import upscale

__all__ = ["Masks", "enlarge"]


def enlarge(
    low_res_logits: Tensor, placement: Placement, pitch: float, threshold: float | None
) -> Tensor:
    """Bring many masks into the original picture, one at a time: in logits they may be large.

    Args:
        low_res_logits: [..., h4, w4] float32.
        placement: Where the picture lies in the model's frame.
        pitch: Pixels of the model's frame for one low-res logit.
        threshold: Logits above it are mask; None gives the logits.

    Returns:
        [..., H, W] on the CPU: bool, or float32 logits.
    """
    outer = low_res_logits.shape[:-2]
    masks = torch.empty(
        (*outer, *placement.original_size),
        dtype=torch.float32 if threshold is None else torch.bool,
    )
    sources = low_res_logits.reshape(-1, *low_res_logits.shape[-2:])
    for source, target in zip(sources, masks.view(-1, *placement.original_size), strict=True):
        logits = upscale(source[None], placement, pitch)[0]
        target.copy_(logits if threshold is None else logits > threshold)
    return masks


@dataclass(frozen=True, eq=False)
class Masks:
    """What prompts on one picture mean, in the order of the prompts.

    Iterating gives the best mask of each prompt, [H, W] bool.

    Attributes:
        prompts: The N prompts.
        low_res_logits: Of each prompt, [K, h4, w4] float32 on the CPU; K may differ between them.
        predicted_ious: Of each prompt, [K] float32: the network's own estimate.
        placement: Where the picture lies in the model's frame.
        pitch: Pixels of the model's frame for one low-res logit.
        threshold: Logits above it are mask.
    """

    prompts: tuple[Prompt, ...]
    low_res_logits: tuple[Tensor, ...]
    predicted_ious: tuple[NDArray[np.float32], ...]
    placement: Placement
    pitch: float
    threshold: float = 0.0

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[NDArray[np.bool_]]:
        return (self.mask(prompt) for prompt in range(len(self)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, K, H, W), K the most of any prompt."""
        most = max((len(ious) for ious in self.predicted_ious), default=0)
        return (len(self), most, *self.placement.original_size)

    @property
    def scores(self) -> NDArray[np.float32]:
        """The predicted IoU of every mask, [N, K] float32; nan where a prompt has fewer masks."""
        scores = np.full(self.shape[:2], np.nan, np.float32)
        for row, ious in zip(scores, self.predicted_ious, strict=True):
            row[: len(ious)] = ious
        return scores

    @cached_property
    def boxes(self) -> NDArray[np.float64]:
        """The box around the best mask of each prompt, [N, 4] xyxy in pixels; 0 for an empty one.

        Enlarges every mask once; kept.
        """
        boxes = [_box_around(mask) for mask in self]
        return np.array(boxes, np.float64).reshape(len(self), 4)

    def best(self) -> NDArray[np.int64]:
        """Which mask of each prompt has the highest score, [N] int64; the first of equals."""
        return np.array([int(np.argmax(ious)) for ious in self.predicted_ious], np.int64)

    def logits(self, prompt: int, token: int | None = None) -> NDArray[np.float32]:
        """Logits of one mask in the original picture.

        Args:
            prompt: Which prompt, from 0.
            token: Which of its masks, from 0; None takes the best.

        Returns:
            [H, W] float32.

        Raises:
            IndexError: There is no such prompt or mask.
        """
        ious = self._of(prompt)
        chosen = int(np.argmax(ious)) if token is None else token
        if not -len(ious) <= chosen < len(ious):
            raise IndexError(f"prompt {prompt} has {len(ious)} masks; there is no mask {token}")
        low_res = self.low_res_logits[prompt][chosen]
        logits: NDArray[np.float32] = enlarge(low_res, self.placement, self.pitch, None).numpy()
        return logits

    def mask(self, prompt: int, token: int | None = None) -> NDArray[np.bool_]:
        """One mask in the original picture, [H, W] bool; arguments and errors as for ``logits``."""
        mask: NDArray[np.bool_] = self.logits(prompt, token) > self.threshold
        return mask

    def to_numpy(self) -> NDArray[np.bool_]:
        """All masks at once, [N, K, H, W] bool; empty where a prompt has fewer masks than K."""
        masks = np.zeros(self.shape, np.bool_)
        for prompt, ious in enumerate(self.predicted_ious):
            for token in range(len(ious)):
                masks[prompt, token] = self.mask(prompt, token)
        return masks

    def to_coco(self, image_id: int, category_id: int = 1) -> list[dict[str, object]]:
        """The best mask of each prompt as COCO's annotations and results have it.

        Args:
            image_id: Of the picture.
            category_id: Of what is segmented; Segment Anything names no categories.

        Returns:
            For each prompt, ready for JSON: ``segmentation`` (compressed run lengths), ``bbox``
            (x, y, width, height), ``area`` in pixels, ``score`` and ``predicted_iou`` (the same
            number), ``iscrowd`` 0, ``prompt`` as ``Prompt.describe`` gives it, and the two ids.
            Annotations of a data set want an ``id`` each, which only the caller can number.
        """
        found: list[dict[str, object]] = []
        for prompt, ious, mask in zip(self.prompts, self.predicted_ious, self, strict=True):
            x0, y0, x1, y1 = _box_around(mask)
            score = float(np.max(ious))
            found.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "segmentation": encode(mask),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "score": score,
                    "predicted_iou": score,
                    "prompt": prompt.describe(),
                }
            )
        return found

    def __repr__(self) -> str:
        count, most, height, width = self.shape
        return f"Masks({count} prompts, up to {most} masks each, picture {height}x{width})"

    def _of(self, prompt: int) -> NDArray[np.float32]:
        if not -len(self) <= prompt < len(self):
            raise IndexError(f"there are {len(self)} prompts; there is no prompt {prompt}")
        return self.predicted_ious[prompt]


def _box_around(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Outer edges of a mask's pixels, xyxy; zeros without any."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
