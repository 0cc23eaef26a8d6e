"""The task of learning to segment by prompts, and its samples.

``Segment`` turns an image with masks into a training sample: fitted into the model input, with
objects chosen and prompted. It computes the loss of the prompted objects (``prompting.py``) and
validates by simulated clicks and boxes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from tinyvit.checkpoints import write_state_dict
from tinyvit.checkpoints.files import header_for
from tinyvit.errors import ImageError
from tinyvit.evaluate.segment import EvaluateSettings, LabelledImage, evaluate_segment
from tinyvit.images.preprocess import normalise_and_pad
from tinyvit.sam.build import build_sam
from tinyvit.sam.embedding import spec_of
from tinyvit.sam.model import Sam
from tinyvit.sam.predictor import SamPredictor
from tinyvit.train.data.augment import RGB, MaskAugment, Masks, fit_sample
from tinyvit.train.data.images import read_good
from tinyvit.train.data.masks import MaskSet, open_mask_set
from tinyvit.train.data.sampling import stack_samples
from tinyvit.train.settings import SettingError
from tinyvit.train.task import Batch, Goal

from .prompting import Objects, check_trainable, first_click, noisy_box, prompt_and_learn
from .settings import SegmentSettings

_SAME = "is trained and validated on, so the metrics say nothing about others"


class MaskSamples(Protocol):
    """Images with masks by number: a ``MaskSet``, or images made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> LabelledImage: ...


@dataclass
class Segment:
    """Learns to segment by prompts; a ``Task``."""

    model: nn.Module  # the Sam, trained in place
    data: MaskSamples  # what is trained on
    val: Iterable[LabelledImage]  # what is validated on
    settings: SegmentSettings  # all but the places of data and weights
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

    def __len__(self) -> int:
        """Training images in an epoch."""
        return len(self.data)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One image and some of its objects; those of an image with few come again.

        ``images`` [3, H, W] normalised and padded, ``sizes`` (height, width) of the image in it,
        ``masks`` [K, H, W] bool, ``points`` [K, 2] a first click for each object, ``boxes`` [K, 4],
        ``index`` which image, ``broken`` reasons by name.
        """
        index, (image, masks), broken = read_good(
            lambda i: self._fitted(i, rng),
            index,
            lambda i: self.data[i].name,
            len(self.data),
            rng,
            self.settings.on_broken,
        )
        areas = masks.sum((1, 2))
        good = np.flatnonzero(areas >= min(self.settings.least_pixels, int(areas.max())))
        chosen = masks[np.resize(rng.permutation(good), self.settings.objects)]
        height, width = image.shape[:2]
        padded = np.zeros((len(chosen), *self.spec.size), np.bool_)
        padded[:, :height, :width] = chosen
        return {
            "index": index,
            "broken": broken,
            "images": normalise_and_pad(torch.from_numpy(image).permute(2, 0, 1), self.spec)[0],
            "sizes": (height, width),
            "masks": padded,
            "points": np.array([first_click(mask, rng) for mask in chosen], np.float32),
            "boxes": np.array([noisy_box(mask, rng) for mask in chosen], np.float32),
        }

    def _fitted(self, index: int, rng: np.random.Generator) -> tuple[RGB, Masks]:
        """An image in the model input with at least one object that is large enough."""
        image, masks = self.data[index].load()
        if self.augment is not None:
            fitted = self.augment(image, masks, self.spec.size, rng)
            if (fitted[1].sum((1, 2)) >= self.settings.least_pixels).any():
                return fitted
        fitted = fit_sample(image, masks, self.spec.size)
        if not fitted[1].any():
            height, width = self.spec.size
            raise ValueError(f"all its objects vanish at {width} x {height} pixels")
        return fitted

    collate = staticmethod(stack_samples)

    def loss(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Focal, dice and IoU loss of every object's last prediction."""
        self.broken.update(cast("dict[str, str]", batch.get("broken", {})))
        sam = cast(Sam, model)
        features = self._features(sam, batch)
        grid = int(features.shape[2]), int(features.shape[3])
        objects = Objects.of(sam, grid, batch)
        found = prompt_and_learn(sam, features, objects, self.settings, generator)
        total = found.pop("total").mean()
        return total, {name: value.detach().mean() for name, value in found.items()}

    def _features(self, sam: Sam, batch: Batch) -> Tensor:
        """[B, C, h, w]; without gradient where the encoder does not learn."""
        encoder, images = sam.image_encoder, batch["images"]
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        if learns and (kept := self.settings.cached_features):
            wanted = "0 where the encoder is trained (train the decoder alone to keep embeddings)"
            raise SettingError("cached_features", wanted, kept)
        if learns:
            return cast(Tensor, encoder(images))
        indices = batch["index"].tolist()
        missing = [row for row, index in enumerate(indices) if index not in self._kept]
        fresh: dict[int, Tensor] = {}
        if missing:
            with torch.no_grad():
                encoded = encoder(images[missing])
            fresh = {indices[row]: one for row, one in zip(missing, encoded, strict=True)}
            for index, one in fresh.items():
                if len(self._kept) < self.settings.cached_features:
                    self._kept[index] = one.cpu()
        return torch.stack(
            [fresh[i] if i in fresh else self._kept[i].to(images.device) for i in indices]
        )

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean IoU on the held-out part, by the model as it is.

        ``predicted_iou_error`` is the mean distance of predicted and true IoU at one click.
        """
        settings = EvaluateSettings(
            (1, 3), most_clicks=3, with_baselines=False, most_masks=self.settings.val_masks
        )
        report = evaluate_segment(SamPredictor(cast(Sam, model), fast=False), self.val, settings)
        if report.skipped and self.settings.on_broken == "error":
            raise ImageError(report.skipped[0])
        self.broken.update({text.partition(":")[0]: text for text in report.skipped})
        ious = {
            "iou_1_click": report.ious["1 click"].value,
            "iou_3_clicks": report.ious["3 clicks"].value,
            "iou_box": report.ious["box"].value,
        }
        error = report.calibrations["1 click"].mean_absolute_error
        return {"mean_iou": sum(ious.values()) / 3, **ious, "predicted_iou_error": error}

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the whole model under the names of segment-anything."""
        if not isinstance(model, Sam):
            raise TypeError(f"wanted a Sam to save, got {type(model).__name__}")
        save_sam(model, path)


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
    return Segment(sam, data, val, settings)


def _open(settings: SegmentSettings) -> tuple[MaskSet, MaskSet]:
    """What to train on and what to validate on."""
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
