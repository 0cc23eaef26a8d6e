"""Two tasks: learning a teacher's stored feature maps, and learning its stored logits.

Features: a student's maps come near the teacher's, and, where the heads of a SAM are given, so do
the masks that the heads make of both for the same random points. The heads are frozen; gradients
flow through them into the embedding. Logits: cross entropy with the distribution of a stored view.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.checkpoints.files import header_for, write_state_dict
from tinyvit.factory import create_model
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_input
from tinyvit.modules import TinyViT
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder
from tinyvit.sam.model import Sam, build_sam
from tinyvit.train.data.images import fingerprint, hold_out
from tinyvit.train.data.lists import identity, some
from tinyvit.train.settings import SettingError
from tinyvit.train.store import Store
from tinyvit.train.task import Batch, Goal, Loss, Task, stack_samples

from . import classify, losses
from .classify import Classify
from .settings import DistillFeaturesRun, DistillFeaturesSettings, DistillLogitsSettings

_MEAN_MAP_IMAGES = 512


def random_points(placed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points (x, y) drawn uniformly over the images, not over their padding: [N, count, 2].

    ``placed`` [N, 2] is (height, width) of the images within the model input; both are parts of
    it, 0..1. The generator is on the CPU.
    """
    drawn = torch.rand(placed.shape[0], count, 2, generator=generator).to(placed.device)
    return drawn * placed.flip(1)[:, None]  # (height, width) -> (x, y)


class Heads(nn.Module):
    """The frozen prompt encoder and mask decoder of a SAM: embeddings and points into masks."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        if isinstance(sam.mask_decoder, HQMaskDecoder):
            raise ValueError(
                "the mask decoder of Light HQ-SAM wants an early map beside the embedding, which "
                "no store holds; give a SAM with the plain decoder, or mask_weight=0"
            )
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder
        self.eval().requires_grad_(False)

    def forward(self, embeddings: Tensor, points: Tensor) -> Tensor:
        """All masks of single points: the one for clear prompts, and those for ambiguous ones.

        ``embeddings`` [N, C, h, w] are of any grid that covers the whole model input, ``points``
        [N, P, 2] parts of it, (x, y). Gives logits [N * P * M, 4h, 4w] of M masks a point.
        """
        self.to(embeddings.device)
        height, width = self.prompt_encoder.input_image_size
        grid = embeddings.shape[2], embeddings.shape[3]
        pixels = points.flatten(0, 1)[:, None] * points.new_tensor([width, height]) - 0.5
        labels = torch.ones(pixels.shape[:2], device=points.device)
        sparse, dense = self.prompt_encoder((pixels, labels), None, None, embedding_size=grid)
        positions = self.prompt_encoder.pe_layer(grid, grid)[None]  # tokens of a whole model input
        each = embeddings.repeat_interleave(points.shape[1], dim=0)  # [N * P, C, h, w]
        masks: Tensor = self.mask_decoder.predict_masks(each, positions, sparse, dense)[0]
        return masks.flatten(0, 1)


class Student(nn.Module):
    """An encoder whose channels are brought to the teacher's by a 1x1 convolution."""

    def __init__(self, image_encoder: TinyViT, channels: int) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        own = image_encoder.neck_dim or image_encoder.embed_dims[-1]
        self.adapter = nn.Conv2d(own, channels, kernel_size=1)  # dropped afterwards

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, C, h, w]."""
        return cast(Tensor, self.adapter(self.image_encoder.forward_features(x)))


class DistillFeatures:
    """Learns a teacher's features of the images below ``root``; a ``Task``.

    A SAM with the teacher's prompt encoder and mask decoder is for the masks' loss, for validating
    masks, and to save a whole SAM with the student as its encoder.
    """

    name: str = "distill-features"
    goal: Goal = ("cosine", "max")
    model: nn.Module

    def __init__(
        self,
        student: TinyViT,
        store: Store | str | os.PathLike[str],
        root: str | os.PathLike[str],
        settings: DistillFeaturesSettings | None = None,
        sam: Sam | None = None,
    ) -> None:
        store = store if isinstance(store, Store) else Store(store)
        if "image_spec" not in store.facts:
            raise ValueError(f"{store.folder} holds logits; wanted features")
        self.settings = settings = settings or DistillFeaturesSettings()
        self.store, self.root = store, Path(root)
        self.spec = _spec_of(student, ImageSpec.from_dict(store.facts["image_spec"]))
        if changed := store.missing(store.good, self.root):  # of other pixels: would teach nonsense
            raise ValueError(
                f"{len(changed)} images below {root} are gone or have changed since their features "
                f"were stored: {some(changed)}; store features again"
            )
        names, self.val_names = hold_out(store.good, settings.held_out, settings.split_seed)
        there = {identity(self.root / name) for name in self.val_names}
        self.train_names = [name for name in names if identity(self.root / name) not in there]
        if not self.train_names:
            raise ValueError(f"all images below {root} are links to those to validate on")
        channels = store.shapes["features"][0]
        own = student.neck_dim or student.embed_dims[-1]
        self.model = student if own == channels else Student(student, channels)
        self.heads = None if sam is None else Heads(sam)
        if self.heads is None and settings.mask_weight > 0:
            wanted = "0 without a SAM, whose heads predict the masks (give one with sam)"
            raise SettingError("mask_weight", wanted, settings.mask_weight)
        if sam is not None and (wants := sam.prompt_encoder.embed_dim) != channels:
            raise ValueError(
                f"the heads want embeddings of {wants} channels, but the teacher's have {channels}"
                "; give the teacher's own SAM"
            )

    def __len__(self) -> int:
        return len(self.train_names)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One image and its features; mirrored half of the time where those are stored."""
        flip = bool(self.store.facts["flips"]) and bool(rng.integers(2))
        return self._read(self.train_names[index], flip)

    collate = staticmethod(stack_samples)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Loss:
        """Distance of the maps, plus that of the masks at random points if it is weighted."""
        found = model(batch["images"])
        teacher = batch["features"].float()
        target = losses.fit_grid(teacher, found.shape[2:])
        loss = losses.feature_loss(found, target, self.settings.loss)
        cosine = losses.cosine_per_cell(found.detach(), target).mean()
        metrics = {"train_cosine": cosine, "feature_loss": loss.detach()}
        if self.heads is not None and self.settings.mask_weight > 0:
            points = random_points(batch["placed"], self.settings.points, generator)
            with torch.no_grad():
                wanted = self.heads(teacher, points)
            masks = self.heads(found.float(), points)
            wanted = losses.fit_grid(wanted[:, None], masks.shape[1:])[:, 0]
            distance = losses.mask_loss(masks, wanted)
            metrics["mask_loss"] = distance.detach()
            loss = loss + self.settings.mask_weight * distance
        return loss, metrics

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on images never trained on, over the grid cells that they cover.

        ``cosine`` is the mean over all cells of the cosine of the two channel vectors, nothing
        subtracted; ``cosine_floor`` the same for a student that always gives the teacher's mean map
        of the training images; ``cosine_centred`` that after the mean map has been subtracted from
        both; with heads ``mask_iou``, the mean IoU of clear and ambiguous prompts at random points.
        """
        values: dict[str, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(0)  # the same points at each validation
        device = next(model.parameters()).device
        size = self.settings.val_batch_size
        for start in range(0, len(self.val_names), size):
            names = self.val_names[start : start + size]
            batch = self.collate([self._read(name, flip=False) for name in names])
            images, teacher, placed = (
                batch[key].to(device) for key in ("images", "features", "placed")
            )
            found = model(images).float()
            grid = found.shape[2:]
            target = losses.fit_grid(teacher.float(), grid)
            mean = losses.fit_grid(self._mean.to(device), grid)
            cells = losses.covered_cells(placed, grid)
            maps = {
                "cosine": losses.cosine_per_cell(found, target)[cells],
                "cosine_floor": losses.cosine_per_cell(mean, target)[cells],
                "cosine_centred": losses.cosine_per_cell(found - mean, target - mean)[cells],
                "mse": (found - target).square().mean(1)[cells],
            }
            if self.heads is not None:
                points = random_points(placed, self.settings.val_points, generator)
                wanted = self.heads(teacher.float(), points) > 0
                maps["mask_iou"] = losses.mask_ious(self.heads(found, points), wanted.float())
            for key, value in maps.items():
                values.setdefault(key, []).append(value)
        return {key: float(torch.cat(found).double().mean()) for key, found in values.items()}

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the student: a whole SAM where heads were given and fit, else the encoder."""
        encoder = model.image_encoder if isinstance(model, Student) else model
        if not isinstance(encoder, TinyViT):
            raise TypeError(f"wanted a TinyViT to save, got {type(encoder).__name__}")
        family, state = "tinyvit", dict(encoder.state_dict())
        if self.heads is not None and not isinstance(model, Student):
            family = "tinyvit_sam"
            state = {f"image_encoder.{key}": value for key, value in state.items()}
            state.update(self.heads.state_dict())
        header = header_for(family, encoder.strides, self.spec)
        write_state_dict(path, state, metadata=header)

    def _read(self, name: str, flip: bool) -> dict[str, Any]:
        """``images`` [3, H, W], ``features`` [C, h, w] fp16, ``placed``: the part of the input."""
        image = decode(self.root / name)
        pixels, placement = to_input(image[:, ::-1] if flip else image, self.spec)
        parts = np.divide(placement.resized_size, placement.model_size).clip(max=1)
        features = self.store.read(name, "flipped" if flip else "features")
        return {"images": pixels, "features": features, "placed": parts.astype(np.float32)}

    @cached_property
    def _mean(self) -> Tensor:
        """The teacher's mean map of (at most 512) training images, [1, C, h, w]."""
        names = self.train_names[:: max(1, len(self.train_names) // _MEAN_MAP_IMAGES)]
        total = sum(self.store.read(name, "features").astype(np.float64) for name in names)
        return torch.as_tensor(total / len(names)).float()[None]


make_features_task = DistillFeatures


def _spec_of(student: TinyViT, teacher: ImageSpec) -> ImageSpec:
    """How the student's images are prepared: as the teacher's, at size, mean and std of its own."""
    own = student.image_spec
    if own is None:
        size = student.img_size
        own = replace(teacher, size=(size, size) if isinstance(size, int) else size)
        student.image_spec = own
    if own.resize == "longest_side":
        own = replace(own, pad=True)
    if replace(own, size=teacher.size, mean=teacher.mean, std=teacher.std) != teacher:
        raise ValueError(
            "teacher and student must prepare images alike, but for size, mean and std; the "
            f"teacher has {teacher}, the student {own}. Set student.image_spec"
        )
    (a, b), (c, d) = own.size, teacher.size
    if a * d != b * c:
        raise ValueError(
            f"the inputs of student {own.size} and teacher {teacher.size} must have one shape"
        )
    return own


@dataclass
class DistillLogits(Classify):
    """Learns a teacher's stored logits; a ``Task`` that validates and saves as ``Classify``."""

    name: str = "distill-logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store = Store(cast(DistillLogitsSettings, self.settings).logits)
        self.store.check(
            images=len(self.data.train),
            classes=self.data.classes,
            data=fingerprint(self.data.train),
            augmentation=self.view.augmentation.to_dict(),
        )

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One stored view of an image, which ``rng`` draws, with the teacher's k classes."""
        index, image, broken = self.read(index, rng)
        seed, probabilities, classes = (
            self.store.read(str(index), key) for key in ("seed", "probabilities", "classes")
        )  # [V], [V, k], [V, k]
        view = int(rng.integers(len(seed)))
        return {
            "images": self.view(image, np.random.default_rng(int(seed[view]))),
            "probabilities": probabilities[view].astype(np.float32),
            "classes": classes[view].astype(np.int64),
            "labels": self.data.train.labels[index],
            "broken": broken,
        }

    def image(self, index: int) -> NDArray[np.uint8]:
        """An image to train on, of which there are logits."""
        if str(index) not in self.store.entries:
            raise ValueError(
                f"it is without logits in {self.store.folder}; call write_logits again, which "
                "writes what is missing"
            )
        return super().image(index)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Loss:
        """Cross entropy with the teacher's distribution; ``as_teacher``: how often both agree."""
        self.broken.update(cast("dict[str, str]", batch.get("broken", {})))
        logits = model(batch["images"])
        choice = logits.detach().argmax(dim=1)
        metrics = {
            "train_top1": (choice == batch["labels"]).float().mean(),
            "as_teacher": (choice == batch["classes"][:, 0]).float().mean(),
        }
        loss = losses.sparse_cross_entropy(logits, batch["classes"], batch["probabilities"])
        return loss, metrics


def make_task(settings: DistillFeaturesRun | DistillLogitsSettings) -> Task[Any]:
    """The task of a whole run: images, what is stored, and the student; weights by the seed."""
    if isinstance(settings, DistillLogitsSettings):
        return classify.make_task(settings, DistillLogits)
    start = settings.checkpoint or (None if settings.model else DEFAULT_CHECKPOINT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        student = create_model(settings.model, start, img_size=settings.img_size)
    sam = None if settings.sam is None else build_sam(settings.sam)
    return make_features_task(student, settings.features, settings.data, settings, sam)
