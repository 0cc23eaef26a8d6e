"""What a person would prompt, simulated, and the loss of what the model predicts.

First prompts follow Segment Anything's training (Kirillov et al., 2023): a click at a random place
of the object, or its box with each edge moved at random. Half of the clicks go to the most
interior point instead, where people click. A correction goes to the largest connected error.
Points are (x, y) in pixels of the model input, continuous: the centre of the first pixel is
(0.5, 0.5).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.evaluate.metrics import most_interior_point
from tinyvit.images.mask_ops import box_around
from tinyvit.modules.sam.mask_decoder import MaskDecoder
from tinyvit.sam.model import Sam
from tinyvit.train.task import Batch

from .losses import prompt_losses, shrink_masks
from .settings import SegmentSettings

Mask = NDArray[np.bool_]
Point = tuple[float, float]

BOX_NOISE = 0.1
"""Standard deviation of a box's edges, as a share of its side."""
MOST_BOX_NOISE = 20 / 1024
"""The farthest that an edge moves, as a share of the longer side of the model input."""

_INTERIOR_SHARE = 0.5
_LARGEST_SHARE = 0.8  # how often the largest error is corrected; else any, by its size


def first_click(mask: Mask, rng: np.random.Generator) -> Point:
    """A click in an object [H, W]: at its most interior point, or anywhere in it."""
    if rng.random() < _INTERIOR_SHARE:
        return most_interior_point(mask)
    places = np.flatnonzero(mask)
    if not len(places):
        raise ValueError("an empty mask has no point; skip it")
    row, column = divmod(int(places[rng.integers(len(places))]), mask.shape[1])
    return float(column + 0.5), float(row + 0.5)


def noisy_box(mask: Mask, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """The box (x0, y0, x1, y1) around an object [H, W] as a person would draw it.

    It lies inside the model input and is at least one pixel wide and high.
    """
    if not mask.any():
        raise ValueError("an empty mask has no box; skip it")
    height, width = mask.shape
    edges = np.array(box_around(mask), np.float64)
    sides = np.tile(edges[2:] - edges[:2], 2)
    most = MOST_BOX_NOISE * max(height, width)
    moved = edges + np.clip(BOX_NOISE * sides * rng.standard_normal(4), -most, most)
    moved = np.clip(moved, 0, [width, height, width, height])
    if (moved[2:] - moved[:2] < 1).any():  # too thin to be moved
        moved = edges
    x0, y0, x1, y1 = moved.tolist()
    return x0, y0, x1, y1


def correct(predicted: Mask, target: Mask, rng: np.random.Generator) -> tuple[Point, int] | None:
    """A click that corrects a mask, somewhere in one connected error, most often the largest.

    Gives ((x, y), 1 where the object was missed or 0 where there was too much); None without
    errors.
    """
    from scipy.ndimage import label

    missed, count = label(target & ~predicted)
    extra, more = label(predicted & ~target)
    if not count + more:
        return None
    sizes = np.concatenate([np.bincount(found.ravel())[1:] for found in (missed, extra)])
    if rng.random() < _LARGEST_SHARE:
        chosen = int(np.argmax(sizes))
    else:
        chosen = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
    is_missed = chosen < count
    region = missed == chosen + 1 if is_missed else extra == chosen + 1 - count
    return first_click(region, rng), int(is_missed)


_SINGLE, _MULTIPLE = slice(0, 1), slice(1, None)  # of the decoder's masks


class Objects(NamedTuple):
    """Objects of several images, and the first prompts of each."""

    rows: Tensor  # [N] int64, which image's embedding
    targets: Tensor  # [N, h4, w4] in 0..1, the covered share of each low-res pixel
    weights: Tensor  # [N, h4, w4], 1 where the image is and 0 in the padding
    points: Tensor  # [N, 2] (x, y) of the first click, in pixels of the model input
    boxes: Tensor  # [N, 4] xyxy, the same

    @classmethod
    def of(cls, sam: Sam, grid: tuple[int, int], samples: Batch) -> Objects:
        """Objects of samples as ``Segment`` makes them, whose embeddings have this grid.

        ``masks`` are [B, K, H, W] in the model input, ``sizes`` [B, 2] (height, width) of each
        image in it without padding, ``points`` [B, K, 2] and ``boxes`` [B, K, 4].
        """
        masks, sizes = samples["masks"], samples["sizes"]
        batch, count, height, width = masks.shape
        stride = logit_stride(sam)
        low_res = 4 * grid[0], 4 * grid[1]
        whole = round(low_res[0] * stride), round(low_res[1] * stride)
        flat = F.pad(masks.flatten(0, 1), (0, whole[1] - width, 0, whole[0] - height))
        y, x = (stride * torch.arange(n, device=masks.device) for n in low_res)
        inside = (y[:, None] < sizes[:, 0, None, None]) & (x < sizes[:, 1, None, None])
        return cls(
            torch.arange(batch, device=masks.device).repeat_interleave(count),
            shrink_masks(flat, low_res),
            inside.float().repeat_interleave(count, dim=0),
            samples["points"].flatten(0, 1),
            samples["boxes"].flatten(0, 1),
        )


def logit_stride(sam: Sam) -> float:
    """Pixels of the model input for one low-res logit."""
    return sam.prompt_encoder.input_image_size[0] / sam.prompt_encoder.mask_input_size[0]


def prompt_and_learn(
    sam: Sam,
    features: Tensor,
    objects: Objects,
    settings: SegmentSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Prompt every object once or several times: ``prompt_losses`` of the last predictions.

    ``features`` [B, C, h, w] are with or without gradient, the generator is on the CPU. Objects
    that are prompted by clicks come first, then those by boxes.
    """
    seed, steps = (int(torch.randint(2**62, (), generator=generator)) for _ in range(2))
    rng = np.random.default_rng(seed)
    corrections = 0
    if torch.rand((), generator=generator).item() < settings.corrective_share:
        corrections = 1 + steps % settings.most_corrections
    by_box = torch.rand(len(objects.rows), generator=generator) < settings.box_share
    found = []
    for chosen, kind in ((~by_box, False), (by_box, True)):
        if chosen.any():
            some = Objects(*(part[chosen.to(features.device)] for part in objects))
            found.append(_learn_one_kind(sam, features, some, kind, corrections, settings, rng))
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def _learn_one_kind(
    sam: Sam,
    features: Tensor,
    objects: Objects,
    by_box: bool,
    corrections: int,
    settings: SegmentSettings,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """Objects that all have the same kind of prompts, so that they can be decoded together."""
    boxes = objects.boxes if by_box else None
    points = objects.points[:, None][:, int(by_box) :]  # [N, P, 2]: the first click, or none
    labels = torch.ones_like(points[:, :, 0], dtype=torch.int64)
    is_ambiguous = not (by_box or corrections)  # the last prompt is a single click
    previous: Tensor | None = None
    source = features[objects.rows]
    for _ in range(corrections):
        with torch.no_grad():
            logits, ious = _decode(sam, source, points, labels, boxes, previous)
        wanted = _SINGLE if by_box or points.shape[1] > 1 else _MULTIPLE
        logits, best = logits[:, wanted], ious[:, wanted].argmax(1)
        previous = logits[torch.arange(len(best), device=best.device), best][:, None]
        new, kinds = _corrections(previous[:, 0], objects, logit_stride(sam), rng)
        points, labels = torch.cat((points, new), 1), torch.cat((labels, kinds), 1)
    logits, ious = _decode(sam, source, points, labels, boxes, previous)
    targets, weights = objects.targets.to(logits.dtype), objects.weights.to(logits.dtype)
    single = prompt_losses(settings, logits[:, _SINGLE], ious[:, _SINGLE], targets, weights)
    if not is_ambiguous:
        return single
    found = prompt_losses(settings, logits[:, _MULTIPLE], ious[:, _MULTIPLE], targets, weights)
    return {**found, "total": (found["total"] + single["total"]) / 2}


def _decode(
    sam: Sam,
    source: Tensor,
    points: Tensor,
    labels: Tensor,
    boxes: Tensor | None,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(low-res logits [N, K, h4, w4], predicted IoU [N, K]) of all masks, at least float32."""
    grid = int(source.shape[2]), int(source.shape[3])
    pair = (points, labels) if points.shape[1] else None
    sparse, dense = sam.prompt_encoder(pair, boxes, previous, grid)
    pe = sam.prompt_encoder.get_dense_pe(grid)
    logits, ious = sam.mask_decoder.predict_masks(source, pe, sparse, dense)
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(exact), ious.to(exact)


def _corrections(
    logits: Tensor, objects: Objects, stride: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A click for each object: ([N, 1, 2] (x, y) in the model input, labels [N, 1])."""
    inside = objects.weights > 0
    predicted = ((logits > 0) & inside).cpu().numpy()
    wanted = ((objects.targets > 0.5) & inside).cpu().numpy()
    points, labels = objects.points.cpu().numpy().copy(), np.ones(len(predicted), np.int64)
    for row, (found, target) in enumerate(zip(predicted, wanted, strict=True)):
        click = correct(found, target, rng)
        if click is not None:  # else the first click once more
            points[row], labels[row] = np.array(click[0]) * stride, click[1]
    device = logits.device
    clicks = torch.from_numpy(points).to(device, objects.points.dtype)
    return clicks[:, None], torch.from_numpy(labels).to(device)[:, None]


def check_trainable(sam: Sam) -> None:
    """Refuse Light HQ-SAM's decoder, which gives one corrected mask for every prompt."""
    if type(sam.mask_decoder) is not MaskDecoder:
        raise ValueError(
            f"promptable segmentation is trained with Segment Anything's mask decoder; this model "
            f"has {type(sam.mask_decoder).__name__} instead; take a checkpoint without it"
        )
