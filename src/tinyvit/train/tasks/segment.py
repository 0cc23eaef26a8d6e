"""The task of learning to segment by prompts: its samples, its loss, and the prompts of both.

First prompts follow Segment Anything's training (Kirillov et al., 2023): a click at a random place
of the object, or its box with each edge moved at random. Half of the clicks go to the most
interior point instead, where people click. A correction goes to the largest connected error.
Points are (x, y) in pixels of the model input, continuous: the centre of the first pixel is
(0.5, 0.5). A mask is validated by simulated clicks and boxes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.checkpoints import write_state_dict
from tinyvit.checkpoints.files import header_for
from tinyvit.errors import ImageError
from tinyvit.evaluate.metrics import Mask, Point, error_regions, most_interior_point
from tinyvit.evaluate.segment import EvaluateSettings, LabelledImage, evaluate_segment
from tinyvit.images.mask_ops import box_around
from tinyvit.images.preprocess import normalise_and_pad
from tinyvit.modules.sam.mask_decoder import MaskDecoder
from tinyvit.sam.embedding import spec_of
from tinyvit.sam.model import Sam, build_sam
from tinyvit.sam.predictor import SamPredictor
from tinyvit.train.data.augment import RGB, MaskAugment, Masks, fit_sample
from tinyvit.train.data.images import read_good
from tinyvit.train.data.masks import MaskSet, open_mask_set
from tinyvit.train.settings import SettingError
from tinyvit.train.task import Batch, Goal, Loss, stack_samples

from .losses import feature_loss, fit_grid, prompt_losses
from .settings import SegmentSettings
from .teachers import open_maps

_SAME = "is trained and validated on, so the metrics say nothing about others"


Maps = Callable[[Tensor], Sequence[Tensor | None]]
"""A teacher: normalised images [B, 3, H, W] -> its embedding, and other maps, [B, C, h, w] each.

A network that has no such embedding, such as a classifier's backbone, gives None in its place.
"""


class MaskedImage(Protocol):
    """An image to train on, such as a ``MaskSample``.

    Masks may be probabilities, which are then the targets; above a half is the object. It may have
    an attribute ``boxed``, [N] bool: which of its objects may be prompted by a box.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    def load(self) -> tuple[RGB, Masks]:
        """(RGB [H, W, 3] uint8, masks [N, H, W], bool or float32 in 0..1)."""


class MaskSamples(Protocol):
    """Images with masks by number: a ``MaskSet``, or images made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> MaskedImage: ...


@dataclass
class Segment:
    """Learns to segment by prompts; a ``Task``."""

    model: nn.Module  # the Sam, trained in place
    data: MaskSamples  # what is trained on
    val: Iterable[LabelledImage]  # what is validated on
    settings: SegmentSettings  # all but the places of data and weights
    teacher: Maps | None = None  # what the embedding is to resemble
    # reason by name of each unreadable image met so far, in this process
    broken: dict[str, str] = field(default_factory=dict)
    name: str = "segment"
    goal: Goal = ("mean_iou", "max")

    def __post_init__(self) -> None:
        spec = spec_of(cast(Sam, self.model))
        if spec.resize != "longest_side":
            raise ValueError(
                f"a SAM's images are fitted by their longest side, not {spec.resize!r}"
            )
        self.spec = replace(spec, pad=True)
        self.augment = MaskAugment() if self.settings.augment == "full" else None
        self._kept: dict[int, Tensor] = {}
        if self.settings.embedding:
            if self.teacher is None:
                wanted = "0 without a teacher, whose embedding is learnt"
                raise SettingError("embedding", wanted, self.settings.embedding)
            self.model = Taught(cast(Sam, self.model), self.teacher, self.spec.size)
        self.teacher = None  # the model has it; samples are made without

    def __len__(self) -> int:
        return len(self.data)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One image and some of its objects; those of an image with few come again.

        ``images`` [3, H, W] normalised and padded, ``sizes`` (height, width) of the image in it,
        ``masks`` [K, H, W] bool or float32, ``points`` [K, 2] a first click for each object,
        ``boxes`` [K, 4], NaN where none may be, ``index`` which image, ``broken`` reasons by name.
        """
        data, on_broken = self.data, self.settings.on_broken
        load, name_of = partial(self._fitted, rng=rng), lambda i: data[i].name
        index, (image, masks, boxed), broken = read_good(
            load, index, name_of, len(data), rng, on_broken
        )
        areas = (masks > 0.5).sum((1, 2))
        good = np.flatnonzero(areas >= min(self.settings.least_pixels, int(areas.max())))
        order = np.resize(rng.permutation(good), self.settings.objects)
        chosen = masks[order]
        height, width = image.shape[:2]
        padded = np.zeros((len(chosen), *self.spec.size), masks.dtype)
        padded[:, :height, :width] = chosen
        points = np.array([first_click(mask > 0.5, rng) for mask in chosen], np.float32)
        boxes = np.array([noisy_box(mask > 0.5, rng) for mask in chosen], np.float32)
        return {
            "index": index,
            "broken": broken,
            "images": normalise_and_pad(torch.from_numpy(image).permute(2, 0, 1), self.spec)[0],
            "sizes": (height, width),
            "masks": padded,
            "points": points,
            "boxes": np.where(boxed[order, None], boxes, np.float32(np.nan)),
        }

    def _fitted(self, index: int, rng: np.random.Generator) -> tuple[RGB, Masks, Mask]:
        """An image in the model input with at least one large object; which may have a box."""
        one = self.data[index]
        image, masks = one.load()
        boxed: Mask = getattr(one, "boxed", np.ones(len(masks), np.bool_))
        if self.augment is not None:
            fitted = self.augment(image, masks, self.spec.size, rng)
            if ((fitted[1] > 0.5).sum((1, 2)) >= self.settings.least_pixels).any():
                return *fitted, boxed
        fitted = fit_sample(image, masks, self.spec.size)
        if not (fitted[1] > 0.5).any():
            height, width = self.spec.size
            raise ValueError(f"all its objects vanish at {width} x {height} pixels")
        return *fitted, boxed

    collate = staticmethod(stack_samples)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Loss:
        """Losses of every object's last prediction, and the distance from the teacher."""
        self.broken.update(cast("dict[str, str]", batch.get("broken", {})))
        settings, sam = self.settings, sam_of(model)
        if not settings.embedding:
            return self._mask_loss(sam, self._features(sam, batch), batch, generator)
        features, distance = cast(Taught, model).compare(batch["images"])
        done = float(batch.get("progress", 0.0))
        weight = settings.embedding * (1 - done * (1 - settings.final_embedding))
        metrics = {"embedding_distance": distance.detach()}
        if not settings.focal + settings.dice:
            return weight * distance, metrics
        loss, of_masks = self._mask_loss(sam, features, batch, generator)
        return loss + weight * distance, {**of_masks, **metrics}

    def _mask_loss(
        self, sam: Sam, features: Tensor, batch: Batch, generator: torch.Generator
    ) -> Loss:
        grid = int(features.shape[2]), int(features.shape[3])
        objects = Objects.of(sam, grid, batch)
        found = prompt_and_learn(sam, features, objects, self.settings, generator)
        total = found.pop("total").mean()
        return total, {name: value.detach().mean() for name, value in found.items()}

    def _features(self, sam: Sam, batch: Batch) -> Tensor:
        """[B, C, h, w]; without gradient where the encoder does not learn."""
        encoder, images = sam.image_encoder, batch["images"]
        most = self.settings.cached_features
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            if most:
                wanted = "0 where the encoder is trained (train the decoder alone for embeddings)"
                raise SettingError("cached_features", wanted, most)
            return cast(Tensor, encoder(images))
        indices = batch["index"].tolist()
        found = {i: self._kept[i].to(images.device) for i in indices if i in self._kept}
        if missing := [row for row, index in enumerate(indices) if index not in found]:
            with torch.no_grad():
                encoded = encoder(images[missing])
            for row, one in zip(missing, encoded, strict=True):
                found[indices[row]] = one
                if len(self._kept) < most:
                    self._kept[indices[row]] = one.cpu()
        return torch.stack([found[index] for index in indices])

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean IoU on the held-out part; ``predicted_iou_error`` is that at one click."""
        settings = EvaluateSettings(
            (1, 3), most_clicks=3, with_baselines=False, most_masks=self.settings.val_masks
        )
        report = evaluate_segment(SamPredictor(sam_of(model), fast=False), self.val, settings)
        if report.skipped and self.settings.on_broken == "error":
            raise ImageError(report.skipped[0])
        self.broken.update({text.partition(":")[0]: text for text in report.skipped})
        kinds = {"iou_1_click": "1 click", "iou_3_clicks": "3 clicks", "iou_box": "box"}
        ious = {name: report.ious[kind].value for name, kind in kinds.items()}
        error = report.calibrations["1 click"].mean_absolute_error
        return {"mean_iou": sum(ious.values()) / 3, **ious, "predicted_iou_error": error}

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the whole model under the names of segment-anything."""
        save_sam(sam_of(model), path)


class Taught(nn.Module):
    """A Sam that is compared with a teacher, and a 1x1 convolution for each further map of it."""

    def __init__(self, sam: Sam, teacher: Maps, size: tuple[int, int]) -> None:
        super().__init__()
        self.sam, encoder = sam, sam.image_encoder
        self._teacher = (teacher,)  # in a tuple, since it is no part of what is trained
        _, others = self._wanted(torch.zeros(1, 3, *size))
        if others and encoder.neck is None:
            raise ValueError("a teacher's further maps are compared before the neck; there is none")
        own = encoder.embed_dims[-1]
        self.heads = nn.ModuleList(nn.Conv2d(own, one.shape[1], 1) for one in others)

    def _wanted(self, images: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        with torch.no_grad():
            embedding, *others = self._teacher[0](images)
        maps = [one.to(images.device) for one in others if one is not None]
        return None if embedding is None else embedding.to(images.device), maps

    def compare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(embedding, its distance from the teacher's plus those of the other maps, a scalar)."""
        encoder, (wanted, others) = self.sam.image_encoder, self._wanted(images)
        last = encoder.forward_backbone(images)
        found: Tensor = last if encoder.neck is None else encoder.neck(last)
        distance = found.new_zeros(())
        if wanted is not None:
            distance = feature_loss(found, fit_grid(wanted, found.shape[2:]), "whitened")
        for head, other in zip(self.heads, others, strict=True):
            other = fit_grid(other, last.shape[2:])
            distance = distance + feature_loss(head(last), other, "cosine")
        return found, distance


def sam_of(model: nn.Module) -> Sam:
    """The Sam that a task trains, without what is beside it; TypeError where there is none."""
    sam = model.sam if isinstance(model, Taught) else model
    if not isinstance(sam, Sam):
        raise TypeError(f"wanted a Sam, got {type(sam).__name__}")
    return sam


def save_sam(model: Sam, path: str | os.PathLike[str]) -> Path:
    """Write a Sam as one ``.safetensors`` file, which ``build_sam`` and every command load."""
    encoder = model.image_encoder
    header = header_for("tinyvit_sam", encoder.strides, encoder.image_spec, None, model.thresholds)
    return write_state_dict(path, model.state_dict(), metadata=header)


def make_task(settings: SegmentSettings) -> Segment:
    """Open the data, build the model, and put both together."""
    data, val = _open(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sam = build_sam(settings.checkpoint, settings.model, img_size=settings.img_size)
    check_trainable(sam)
    teacher = open_maps(settings.teacher) if settings.teacher else None
    return Segment(sam, data, val, settings, teacher)


def _open(settings: SegmentSettings) -> tuple[MaskSet, MaskSet]:
    whole = open_mask_set(settings.data, settings.images, on_fault=settings.on_broken)
    if settings.val is not None:
        val = open_mask_set(settings.val, settings.val_images, on_fault=settings.on_broken)
        parts = whole.without(val), val
        if shared := len(whole) - len(parts[0]):
            _warn(
                f"{shared} of {len(whole)} images of {settings.data} are in {settings.val} too; "
                + ("they are not trained on" if len(parts[0]) else f"the same {_SAME}")
            )
        parts = parts if len(parts[0]) else (whole, val)
    elif len(whole) == 1:
        _warn(f"{settings.data} has only one image: it {_SAME}; name images to validate on (--val)")
        parts = whole, replace(whole, faults=())
    else:
        parts = whole.split(settings.val_part, settings.split_seed)
    for part in parts:
        if part.faults:
            _warn(part.describe())
    return parts


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


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
    """The box (x0, y0, x1, y1) around an object [H, W] as a person would draw it, in the input."""
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
    """A click in an error: ((x, y), 1 where the object was missed, else 0); None without errors."""
    regions, sizes, missing = error_regions(predicted, target)
    if not len(sizes):
        return None
    if rng.random() < _LARGEST_SHARE:
        chosen = int(sizes.argmax())
    else:
        chosen = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
    return first_click(regions == chosen + 1, rng), int(chosen < missing)


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

        ``masks`` are [B, K, H, W] in the model input, bool or in 0..1, ``sizes`` [B, 2] (height,
        width) of each image in it without padding, ``points`` [B, K, 2] and ``boxes`` [B, K, 4],
        NaN for objects that no box may stand for.
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
            F.adaptive_avg_pool2d(flat.float()[:, None], low_res)[:, 0],
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
    by_box &= objects.boxes.isfinite().all(1).cpu()
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
    previous: Tensor | None = None
    source, grid = features[objects.rows], (features.shape[2], features.shape[3])
    pe = sam.prompt_encoder.get_dense_pe(grid)

    def decode() -> tuple[Tensor, Tensor]:  # logits [N, K, h4, w4], predicted IoU [N, K]
        pair = (points, labels) if points.shape[1] else None
        sparse, dense = sam.prompt_encoder(pair, boxes, previous, grid)
        logits, ious = sam.mask_decoder.predict_masks(source, pe, sparse, dense)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(exact), ious.to(exact)

    for _ in range(corrections):
        with torch.no_grad():
            logits, ious = decode()
        wanted = _SINGLE if by_box or points.shape[1] > 1 else _MULTIPLE
        logits, best = logits[:, wanted], ious[:, wanted].argmax(1)
        previous = logits[torch.arange(len(best), device=best.device), best][:, None]
        new, kinds = _corrections(previous[:, 0], objects, logit_stride(sam), rng)
        points, labels = torch.cat((points, new), 1), torch.cat((labels, kinds), 1)
    logits, ious = decode()
    targets, weights = objects.targets.to(logits.dtype), objects.weights.to(logits.dtype)
    single = prompt_losses(settings, logits[:, _SINGLE], ious[:, _SINGLE], targets, weights)
    if by_box or corrections:  # else the last prompt is a single click
        return single
    found = prompt_losses(settings, logits[:, _MULTIPLE], ious[:, _MULTIPLE], targets, weights)
    return {**found, "total": (found["total"] + single["total"]) / 2}


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
