"""The task of learning classes, and the classifiers it trains.

A batch is mixed by mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) where wanted. A
classifier starts from any TinyViT: of a SAM's encoder the neck goes, of other classes the head.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyvit.catalog import DEFAULT_CHECKPOINT, get_variant
from tinyvit.checkpoints.files import classes_in, header_for, image_spec_in, write_state_dict
from tinyvit.checkpoints.open import OpenedCheckpoint, open_checkpoint
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.evaluate.classify import hits_in_top, read_batches
from tinyvit.factory import create_model
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import prepare
from tinyvit.inference.read_ahead import choose_workers
from tinyvit.modules import TinyViT
from tinyvit.train.data.augment import View, augmentation
from tinyvit.train.data.images import DataSet, open_data_set, read_good
from tinyvit.train.task import Batch, Goal, Loss, stack_samples

from .losses import one_hot, soft_cross_entropy
from .settings import ClassifySettings, LabelledSettings

_TOP = 5


def mix(
    images: Tensor, targets: Tensor, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix images [B, 3, H, W] and their distributions over the classes, targets [B, K].

    ``mixup`` and ``cutmix`` are parameters of Beta distributions, 0 for none; where both are on,
    half of the batches get cutmix. New tensors, or the given ones where nothing is mixed. A target
    is mixed by the areas that are really seen. The generator is on the CPU.
    """
    if len(images) < 2 or not (mixup or cutmix):
        return images, targets
    seed = int(torch.randint(2**62, (), generator=generator))
    rng = np.random.default_rng(seed)  # torch has no public Beta with a generator
    is_cut = cutmix > 0 and (not mixup or rng.random() < 0.5)
    alpha = cutmix if is_cut else mixup
    keep = float(rng.beta(alpha, alpha))
    order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    if is_cut:  # a rectangle of 1 - keep of the area, cut at the borders
        height, width = images.shape[2:]
        h, w = (int(side * (1 - keep) ** 0.5) for side in (height, width))
        y, x = int(rng.integers(height)), int(rng.integers(width))
        rows = slice(max(y - h // 2, 0), min(y + h - h // 2, height))
        columns = slice(max(x - w // 2, 0), min(x + w - w // 2, width))
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[order, :, rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        keep = 1 - area / (height * width)
    else:
        mixed = torch.lerp(images[order], images, keep)
    return mixed, torch.lerp(targets[order], targets, keep)


_USUAL_SIZE = 224
_REDUCTIONS = (4, 8, 16, 32)  # side of an image over that of each stage's map
_LEAST_WINDOWS = (7, 7, 14, 7)  # those of 224, below which windows are only as small as the map


def windows_for(img_size: int) -> tuple[int, ...]:
    """Window sides in tokens of a four-stage classifier, one a stage, for a side of images.

    The published rows follow this rule: 7, 7, 14, 7 at 224; 12, 12, 24, 12 at 384; 16, 16, 32, 16
    at 512. The maps are cut into whole windows where possible; none is larger than its map.

    Examples:
        >>> windows_for(384), windows_for(32)
        ((12, 12, 24, 12), (4, 4, 2, 1))
    """
    if img_size < 1:
        raise ValueError(f"img_size must be at least 1 pixel, got {img_size}")
    windows = []
    for reduction, least in zip(_REDUCTIONS, _LEAST_WINDOWS, strict=True):
        side = -(-img_size // reduction)
        count = max(1, round(side / max(least, round(img_size * least / _USUAL_SIZE))))
        windows.append(-(-side // count))
    return (windows[1], *windows[1:])  # the first stage has no attention and no windows


def build_classifier(
    classes: Sequence[str],
    *,
    model: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    window_sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> TinyViT:
    """A classifier to train, whose ``forward`` gives logits [B, K].

    Of a SAM's checkpoint the encoder is taken, without the neck and with classifiers' strides, at
    224 pixels by default. The head is new unless the checkpoint's classes are these (or unnamed
    and as many). Window sides are those of ``windows_for`` where the size is another one.
    """
    source: OpenedCheckpoint | None = None
    natural: ImageSpec | None = None
    usual: int | None = None  # the side that its windows are made for
    if checkpoint is not None:
        source = open_checkpoint(_file_of(checkpoint))
        is_sam = source.found.has_neck
        if not is_sam and (natural := image_spec_in(source.metadata, source.path)) is not None:
            usual = natural.size[0]
        size = img_size or (_USUAL_SIZE if is_sam else usual)
    elif model is not None:
        variant = get_variant(model)
        is_sam, usual = variant.task != "classification", variant.img_size
        size = img_size or (_USUAL_SIZE if is_sam else None)
    else:
        raise ValueError(
            "wanted a model or a checkpoint to train, for example checkpoint='tinyvit_sam_2m' "
            "or model='tiny_vit_5m_224'"
        )
    is_usual = size == usual or not (is_sam or img_size)
    if window_sizes is None and not is_usual:
        window_sizes = windows_for(size or _USUAL_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = create_model(
            model,
            source,
            num_classes=len(classes),
            img_size=size,
            window_sizes=window_sizes,
            strides=(2, 2, 2) if is_sam else None,
            head=True,
        )
        known = None if source is None else classes_in(source.metadata, source.path)
        if source is not None and (is_sam or known not in (None, tuple(classes))):
            built.reset_classifier(len(classes))
    if built.neck is not None:
        built.neck = built.neck_dim = built.neck_size = None
        built.image_spec = ImageSpec.timm(size or _USUAL_SIZE)
    elif natural is not None:
        before, now = natural.size[0], size or natural.size[0]
        shorter = natural.shorter_side and max(natural.shorter_side * now // before, now)
        resized = replace(natural, size=(now, now), shorter_side=shorter)
        built.image_spec = natural if now == before else resized
    return built


def save_classifier(model: TinyViT, path: str | os.PathLike[str], classes: Sequence[str]) -> Path:
    """Write a classifier with the names of its classes as ``.safetensors``."""
    if len(classes) != model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, but {len(classes)} names came"
        )
    header = header_for("tinyvit", model.strides, model.image_spec, classes)
    return write_state_dict(path, model.state_dict(), metadata=header)


def load_classifier(path: str | os.PathLike[str]) -> tuple[TinyViT, tuple[str, ...] | None]:
    """Load a classifier's checkpoint: the model in eval mode, its classes' names if any."""
    opened = open_checkpoint(_file_of(path))
    if not opened.found.has_head:
        raise CheckpointError(f"{opened.path} has no classification head; train one first")
    return create_model(checkpoint=opened), classes_in(opened.metadata, opened.path)


def _file_of(checkpoint: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file of weights in a folder of ``save_pretrained``; anything else as it is."""
    inner = Path(checkpoint) / "model.safetensors"
    return inner if inner.is_file() else checkpoint


@dataclass
class Classify:
    """Learns classes; a ``Task``."""

    model: nn.Module  # the classifier, trained in place; its ``forward`` gives logits
    data: DataSet  # what is trained and validated on
    settings: LabelledSettings  # all but the places of data and weights
    # reason by name of each unreadable image met so far, in this process
    broken: dict[str, str] = field(default_factory=dict)
    name: str = "classify"
    goal: Goal = ("top1", "max")

    def __post_init__(self) -> None:
        augment = augmentation(self.settings.augment, self.settings.flip)
        self.view = View(augment, spec_of(cast(TinyViT, self.model)))  # makes an input of an image

    def __len__(self) -> int:
        return len(self.data.train)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``images`` [3, h, w] as ``view`` makes it, ``labels`` and ``broken``: reasons by name."""
        index, image, broken = self.read(index, rng)
        label = self.data.train.labels[index]
        return {"images": self.view(image, rng), "labels": label, "broken": broken}

    def image(self, index: int) -> NDArray[np.uint8]:
        """An image to train on."""
        return decode(self.data.train.source(index))

    def read(
        self, index: int, rng: np.random.Generator
    ) -> tuple[int, NDArray[np.uint8], dict[str, str]]:
        """As ``read_good``: an image to train on, or another one in the place of a broken one."""
        images = self.data.train
        return read_good(self.image, index, images.name, len(images), rng, self.settings.on_broken)

    collate = staticmethod(stack_samples)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Loss:
        """Cross entropy with smoothed and mixed labels; ``train_top1`` counts the larger part."""
        self.broken.update(cast("dict[str, str]", batch.get("broken", {})))
        own = cast(ClassifySettings, self.settings)
        targets = one_hot(batch["labels"], len(self.data.classes), own.smoothing)
        images, targets = mix(batch["images"], targets, own.mixup, own.cutmix, generator)
        logits = model(images)
        hits = logits.detach().argmax(dim=1) == targets.argmax(dim=1)
        return soft_cross_entropy(logits, targets), {"train_top1": hits.float().mean()}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """``top1``, ``loss`` and, with more than five classes, ``top5``, by the model as it is."""
        images, place = self.data.val, next(model.parameters())
        broken: dict[str, str] = {}
        logits: list[Tensor] = []
        indices: list[int] = []

        def load(index: int) -> NDArray[np.float32]:
            return prepare(images.source(index), self.view.spec)[0]

        size, every = self.settings.val_batch_size, range(len(images))
        batches = read_batches(images, every, load, size, broken, choose_workers())
        with torch.inference_mode():
            for batch in batches:
                if broken and self.settings.on_broken == "error":
                    raise ImageError(": ".join(next(iter(broken.items()))))
                if batch:
                    inputs = torch.from_numpy(np.stack(list(batch.values())))
                    logits.append(model(inputs.to(place)).float().cpu())
                    indices += batch
        if not logits:
            name, reason = next(iter(broken.items()), ("", "there is none"))
            raise ValueError(f"no image to validate on can be read; {name}: {reason}")
        self.broken.update(broken)
        found, right = torch.cat(logits), torch.from_numpy(images.labels[indices])
        metrics = {
            "top1": float(hits_in_top(found, right, 1).float().mean()),
            "loss": float(nn.functional.cross_entropy(found, right)),
        }
        if found.shape[1] > _TOP:
            metrics["top5"] = float(hits_in_top(found, right, _TOP).float().mean())
        return metrics

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the classifier with the names of its classes."""
        if not isinstance(model, TinyViT):
            raise TypeError(f"wanted a TinyViT to save, got {type(model).__name__}")
        save_classifier(model, path, self.data.classes)


def make_task(settings: LabelledSettings, task: type[Classify] = Classify) -> Classify:
    """Open the data, build the classifier, and put both together."""
    data = open_data_set(
        settings.data, settings.val, val_part=settings.val_part, split_seed=settings.split_seed
    )
    if len(data.classes) < 2:
        raise ValueError(
            f"there is only one class, {data.classes[0]!r}, in {settings.data!r}; a classifier "
            "needs two or more"
        )
    start = settings.checkpoint or (None if settings.model else DEFAULT_CHECKPOINT)
    model = build_classifier(
        data.classes,
        model=settings.model,
        checkpoint=start,
        img_size=settings.img_size,
        window_sizes=settings.window_sizes,
        seed=settings.seed,
    )
    return task(model, data, settings)


def spec_of(model: TinyViT) -> ImageSpec:
    """How images are prepared for a model."""
    if model.image_spec is None:
        raise ValueError(
            "this model does not say how its images are prepared; set model.image_spec, for "
            "example to tinyvit.ImageSpec.timm(224)"
        )
    return model.image_spec
