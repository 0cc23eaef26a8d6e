"""The task of learning to segment by prompts, and its samples.

``MaskSampler`` turns an image with masks into a training sample: fitted into the model input, with
objects chosen and prompted; it runs in worker processes, without the model. ``Segment`` computes
the loss of the prompted objects (``prompting.py``) and validates by simulated clicks and boxes.
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
from tinyvit.evaluate.segment import (
    EvaluateSettings,
    LabelledImage,
    evaluate_segment,
)
from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import normalise_and_pad
from tinyvit.sam.build import build_sam
from tinyvit.sam.embedding import spec_of
from tinyvit.sam.model import Sam
from tinyvit.sam.predictor import SamPredictor
from tinyvit.train.data.augment import RGB, MaskAugment, Masks, fit_sample
from tinyvit.train.data.images import read_good
from tinyvit.train.data.masks import MaskSet, open_mask_set
from tinyvit.train.data.sampling import stack_samples
from tinyvit.train.settings import OnBroken, SettingError
from tinyvit.train.task import Batch, Goal

from .losses import MaskLosses
from .prompting import Objects, Prompting, check_trainable, first_click, noisy_box, prompt_and_learn
from .settings import SegmentSettings

_SAME = "is trained and validated on, so the metrics say nothing about others"


class MaskSamples(Protocol):
    """Images with masks by number: a ``MaskSet``, or images made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> LabelledImage: ...


@dataclass(frozen=True)
class MaskSampler:
    """Makes training samples of images with masks."""

    data: MaskSamples  # the images
    spec: ImageSpec  # how images are prepared; fitted by their longest side
    # changes images at random; None does not
    augment: MaskAugment | None = field(default_factory=MaskAugment)
    # objects of an image that are prompted; those of an image with fewer come again, with other
    # prompts
    objects: int = 4
    # objects with fewer pixels in the model input are not trained on, unless there is no larger one
    least_pixels: int = 64
    # what an unreadable image does: "skip" takes another one and gives the reason
    on_broken: OnBroken = "skip"

    def __post_init__(self) -> None:
        if self.objects < 1:
            raise ValueError(f"objects must be at least 1, but is {self.objects}")
        if self.spec.resize != "longest_side":
            raise ValueError(
                f"a SAM's images are fitted by their longest side, not {self.spec.resize!r}"
            )

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One image and some of its objects.

        ``images`` [3, H, W] normalised and padded, ``sizes`` (height, width) of the image in it,
        ``masks`` [K, H, W] bool, ``points`` [K, 2] a first click for each object, ``boxes`` [K, 4],
        ``index`` which image, ``broken`` reasons by name.
        """
        index, fitted, broken = read_good(
            lambda i: self._fitted(i, rng),
            index,
            lambda i: self.data[i].name,
            len(self.data),
            rng,
            self.on_broken,
        )
        return {"index": index, "broken": broken, **self._prompted(*fitted, rng)}

    def _fitted(self, index: int, rng: np.random.Generator) -> tuple[RGB, Masks]:
        """An image in the model input with at least one object that is large enough."""
        image, masks = self.data[index].load()
        if self.augment is not None:
            fitted = self.augment(image, masks, self.spec.size, rng)
            if (fitted[1].sum((1, 2)) >= self.least_pixels).any():
                return fitted
        fitted = fit_sample(image, masks, self.spec.size)
        if not fitted[1].any():
            height, width = self.spec.size
            raise ValueError(f"all its objects vanish at {width} x {height} pixels")
        return fitted

    def _prompted(self, image: RGB, masks: Masks, rng: np.random.Generator) -> dict[str, Any]:
        areas = masks.sum((1, 2))
        good = np.flatnonzero(areas >= min(self.least_pixels, int(areas.max())))
        order = rng.permutation(good)
        chosen = masks[np.resize(order, self.objects)]  # again from the start if too few
        height, width = image.shape[:2]
        padded = np.zeros((self.objects, *self.spec.size), np.bool_)
        padded[:, :height, :width] = chosen
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        return {
            "images": normalise_and_pad(pixels, replace(self.spec, pad=True))[0],
            "sizes": (height, width),
            "masks": padded,
            "points": np.array([first_click(mask, rng) for mask in chosen], np.float32),
            "boxes": np.array([noisy_box(mask, rng) for mask in chosen], np.float32),
        }


@dataclass
class Segment:
    """Learns to segment by prompts; a ``Task``."""

    model: nn.Module  # the network, trained in place
    sampler: MaskSampler  # makes samples of what is trained on
    val: Iterable[LabelledImage]  # what is validated on
    prompting: Prompting = field(default_factory=Prompting)  # how objects are prompted
    losses: MaskLosses = field(default_factory=MaskLosses)  # weights of the losses
    cached_features: int = 0  # images whose embeddings are kept
    val_masks: int = 200  # the most masks to validate on
    # reason by name of each unreadable image met so far, in this process
    broken: dict[str, str] = field(default_factory=dict)
    name: str = "segment"
    goal: Goal = ("mean_iou", "max")

    def __post_init__(self) -> None:
        if self.cached_features and self.sampler.augment is not None:
            raise ValueError(
                "embeddings can be kept only of images that stay the same: cached_features wants "
                "augment='none'"
            )
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Training images in an epoch."""
        return len(self.sampler.data)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One image and some of its objects, see ``MaskSampler``."""
        return self.sampler.sample(index, rng)

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
        found = prompt_and_learn(sam, features, objects, self.losses, self.prompting, generator)
        parts = {"focal": found.focal, "dice": found.dice, "iou_error": found.iou_error}
        metrics = {"train_iou": found.iou, **parts}
        return found.total.mean(), {name: x.detach().mean() for name, x in metrics.items()}

    def _features(self, sam: Sam, batch: Batch) -> Tensor:
        """[B, C, h, w]; without gradient where the encoder does not learn."""
        encoder, images = sam.image_encoder, batch["images"]
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        if learns and self.cached_features:
            wanted = "0 where the encoder is trained (train the decoder alone to keep embeddings)"
            raise SettingError("cached_features", wanted, self.cached_features)
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
                if len(self._kept) < self.cached_features:
                    self._kept[index] = one.cpu()
        return torch.stack(
            [fresh[i] if i in fresh else self._kept[i].to(images.device) for i in indices]
        )

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean IoU on the held-out part, by the model as it is.

        ``predicted_iou_error`` is the mean distance of predicted and true IoU at one click.
        """
        settings = EvaluateSettings(
            (1, 3), most_clicks=3, with_baselines=False, most_masks=self.val_masks
        )
        report = evaluate_segment(SamPredictor(cast(Sam, model), fast=False), self.val, settings)
        if report.skipped and self.sampler.on_broken == "error":
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
    header = {
        "tinyvit.family": "tinyvit_sam",
        "tinyvit.strides": ",".join(str(stride) for stride in model.image_encoder.strides),
        **header_for(model.image_encoder.image_spec, thresholds=model.thresholds),
    }
    return write_state_dict(path, model.state_dict(), metadata=header)


def make_task(settings: SegmentSettings) -> Segment:
    """Open the data, build the model, and put both together."""
    data, val = _open(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sam = build_sam(settings.checkpoint, settings.model, img_size=settings.img_size)
    check_trainable(sam)
    augment = MaskAugment() if settings.augment == "full" else None
    sampler = MaskSampler(
        data, spec_of(sam), augment, settings.objects, settings.least_pixels, settings.on_broken
    )
    return Segment(
        sam,
        sampler,
        val,
        Prompting(settings.box_share, settings.corrective_share, settings.most_corrections),
        MaskLosses(settings.focal, settings.dice, settings.iou),
        settings.cached_features,
        settings.val_masks,
    )


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
