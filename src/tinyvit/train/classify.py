"""The task of learning classes: pictures of named classes in, a classifier out.

Cross entropy with smoothed labels, mixup and cutmix, chance for each picture, top-1 and top-5 on
the held-out part; for the loop in ``loop.py``. Which files the pictures are in is known to
``data_sets.py``, how a classifier is built and kept to ``classifiers.py``.

Letters: B batch, K classes, h w height and width of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.errors import ImageError
from tinyvit.evaluate.classification_metrics import hits_in_top
from tinyvit.evaluate.classify import LabelledPictures
from tinyvit.image_spec import ImageSpec
from tinyvit.inference.pictures import prepare
from tinyvit.inference.read_ahead import choose_workers, read_ahead
from tinyvit.modules import TinyViT

from .augment import Strength, View, augmentation
from .classification_losses import one_hot, soft_cross_entropy
from .classifiers import build_classifier, save_classifier
from .data_sets import DataSet, OnBroken, open_data_set, read_one
from .mixing import Mixing, mix
from .task import Batch, Goal

__all__ = ["Classify", "ClassifySample", "ClassifySettings", "make_task", "measure", "spec_of"]

_TOP = 5


@dataclass(frozen=True)
class ClassifySettings:
    """The choices of learning classes; those of the loop are ``TrainSettings``.

    Attributes:
        data: A folder of classes, a CSV file, or tar files; see ``data_sets.open_data_set``.
        val: The part to measure on; None takes the one ``data`` names, or holds some out.
        val_part: Part of each class to hold out then.
        split_seed: Which pictures those are.
        model: A variant; None takes the checkpoint's. Without a checkpoint it starts from chance.
        checkpoint: What to start from; None, where no model is named either, takes the embedded
            encoder.
        img_size: Side of the pictures in pixels; None takes the checkpoint's or variant's.
        window_sizes: Window sides; None chooses for ``img_size``.
        augment: "none", "light" (small data sets) or "full" (TinyViT's recipe for ImageNet).
        flip: Mirror half of the pictures; False for letters and digits.
        mixup: Parameter of mixup; 0 for none, 0.8 in TinyViT's recipe.
        cutmix: Parameter of cutmix; 0 for none, 1.0 in TinyViT's recipe.
        smoothing: Part of a label that is spread over all classes.
        on_broken: "skip" names broken pictures and learns from others instead; "error" stops.
        val_batch_size: Pictures measured together.
        seed: Source of the weights that are new.
    """

    data: str
    val: str | None = None
    val_part: float = 0.1
    split_seed: int = 0
    model: str | None = None
    checkpoint: str | None = None
    img_size: int | None = None
    window_sizes: tuple[int, ...] | None = None
    augment: Strength = "light"
    flip: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    on_broken: OnBroken = "skip"
    val_batch_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class ClassifySample:
    """One picture to learn from.

    Attributes:
        pixels: [3, h, w] float32, normalised.
        label: Number of its class.
        broken: Reason by name of each broken picture met on the way.
    """

    pixels: NDArray[np.float32]
    label: int
    broken: dict[str, str]


@dataclass
class Classify:
    """Learns classes; a ``Task``.

    Attributes:
        model: The classifier, trained in place; its ``forward`` gives logits.
        data: What is learnt from and measured on.
        view: Makes an input of a picture, with chance.
        mixing: How pictures of a batch are mixed.
        smoothing: Part of a label that is spread over all classes.
        on_broken: What a broken picture does.
        val_batch_size: Pictures measured together.
        broken: Reason by name of each broken picture met so far, in this process.
    """

    model: nn.Module
    data: DataSet
    view: View
    mixing: Mixing = field(default_factory=Mixing)
    smoothing: float = 0.0
    on_broken: OnBroken = "skip"
    val_batch_size: int = 64
    broken: dict[str, str] = field(default_factory=dict)
    name: str = "classify"
    goal: Goal = ("top1", "max")

    def __len__(self) -> int:
        """Training pictures in an epoch."""
        return len(self.data.train)

    def sample(self, index: int, rng: np.random.Generator) -> ClassifySample:
        """One picture, as ``view`` makes it; another one that ``rng`` draws where it is broken.

        Args:
            index: 0 to ``len(self) - 1``.
            rng: The only source of chance.

        Raises:
            ImageError: The picture is broken and ``on_broken`` is "error", or many were in a row.
        """
        index, image, broken = read_one(self.data.train, index, rng, self.on_broken)
        return ClassifySample(self.view(image, rng), int(self.data.train.labels[index]), broken)

    def collate(self, samples: list[ClassifySample]) -> Batch:
        """``images`` [B, 3, h, w], ``labels`` [B], and ``broken``: reasons by name."""
        broken = {name: text for one in samples for name, text in one.broken.items()}
        batch: dict[str, Any] = {
            "images": torch.from_numpy(np.stack([one.pixels for one in samples])),
            "labels": torch.tensor([one.label for one in samples]),
            "broken": broken,
        }
        return batch

    def loss(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy with smoothed and mixed labels; ``train_top1`` counts the larger part.

        Args:
            model: Gives logits [B, K].
            batch: What ``collate`` gave.
            generator: Chance of the mixing.

        Returns:
            The mean loss, and figures to log.
        """
        self.broken.update(cast("dict[str, str]", batch.get("broken", {})))
        targets = one_hot(batch["labels"], len(self.data.classes), self.smoothing)
        images, targets = mix(batch["images"], targets, self.mixing, generator)
        logits = model(images)
        hits = logits.detach().argmax(dim=1) == targets.argmax(dim=1)
        return soft_cross_entropy(logits, targets), {"train_top1": hits.float().mean()}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """``top1``, ``loss`` and, with more than five classes, ``top5`` on the held-out part.

        Raises:
            ValueError: No picture of it can be read.
        """
        figures, broken = measure(model, self.data.val, self.view.spec, self.val_batch_size)
        if broken and self.on_broken == "error":
            name, reason = next(iter(broken.items()))
            raise ImageError(f"{name}: {reason}")
        self.broken.update(broken)
        return figures

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the classifier with the names of its classes.

        Raises:
            TypeError: ``model`` is no TinyViT.
            CheckpointError: The file cannot be written.
        """
        if not isinstance(model, TinyViT):
            raise TypeError(f"wanted a TinyViT to save, got {type(model).__name__}")
        save_classifier(model, path, self.data.classes)


def make_task(settings: ClassifySettings) -> Classify:
    """Open the data, build the classifier, and put both together.

    Args:
        settings: The choices.

    Returns:
        The task, for ``tinyvit.train.train``.

    Raises:
        ValueError: The data or a choice is wrong.
        CheckpointError: The checkpoint cannot be read or does not fit.
        DownloadError: The checkpoint cannot be fetched.

    Warns:
        UserWarning: A class has no picture to be measured on.
    """
    data = open_data_set(
        settings.data,
        settings.val,
        val_part=settings.val_part,
        split_seed=settings.split_seed,
    )
    if len(data.classes) < 2:
        raise ValueError(
            f"there is only one class, {data.classes[0]!r}, in {settings.data!r}; a classifier "
            "needs two or more"
        )
    chance = augmentation(settings.augment, settings.flip)
    start = settings.checkpoint or (None if settings.model else DEFAULT_CHECKPOINT)
    model = build_classifier(
        data.classes,
        model=settings.model,
        checkpoint=start,
        img_size=settings.img_size,
        window_sizes=settings.window_sizes,
        seed=settings.seed,
    )
    return Classify(
        model,
        data,
        View(chance, spec_of(model)),
        Mixing(settings.mixup, settings.cutmix),
        settings.smoothing,
        settings.on_broken,
        settings.val_batch_size,
    )


def spec_of(model: TinyViT) -> ImageSpec:
    """How pictures are prepared for a model.

    Raises:
        ValueError: The model does not say.
    """
    if model.image_spec is None:
        raise ValueError(
            "this model does not say how its pictures are prepared; set model.image_spec, for "
            "example to tinyvit.ImageSpec.timm(224)"
        )
    return model.image_spec


def measure(
    model: nn.Module, pictures: LabelledPictures, spec: ImageSpec, batch_size: int = 64
) -> tuple[dict[str, float], dict[str, str]]:
    """Accuracy and loss of a model as it is, without an engine around it.

    Args:
        model: In eval mode; gives logits [B, K].
        pictures: What to measure on.
        spec: How pictures are prepared.
        batch_size: Pictures computed together.

    Returns:
        ``top1``, ``loss`` and, with more than five classes, ``top5``; and the reason by name of
        each broken picture.

    Raises:
        ValueError: No picture can be read.
    """
    place = next(model.parameters())
    broken: dict[str, str] = {}
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.inference_mode():
        for images, numbers in _batches(pictures, spec, batch_size, broken):
            logits.append(model(images.to(place)).float().cpu())
            labels.append(numbers)
    if not logits:
        name, reason = next(iter(broken.items()), ("", "there is none"))
        raise ValueError(f"no picture to measure on can be read; {name}: {reason}")
    answers, right = torch.cat(logits), torch.cat(labels)
    figures = {
        "top1": float(hits_in_top(answers, right, 1).float().mean()),
        "loss": float(nn.functional.cross_entropy(answers, right)),
    }
    if answers.shape[1] > _TOP:
        figures["top5"] = float(hits_in_top(answers, right, _TOP).float().mean())
    return figures, broken


def _batches(
    pictures: LabelledPictures, spec: ImageSpec, batch_size: int, broken: dict[str, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prepared pictures [B, 3, h, w] and their labels [B], read ahead in threads."""
    labels = pictures.labels
    jobs = (partial(_prepared, pictures, index, spec) for index in range(len(pictures)))
    good: list[tuple[Tensor, int]] = []
    workers = choose_workers()
    for index, made in enumerate(read_ahead(jobs, workers=workers, ahead=batch_size + workers)):
        if isinstance(made, ImageError):
            broken[pictures.name(index)] = str(made)
        else:
            good.append((made, int(labels[index])))
        if len(good) == batch_size:
            yield torch.stack([tensor for tensor, _ in good]), torch.tensor([n for _, n in good])
            good = []
    if good:
        yield torch.stack([tensor for tensor, _ in good]), torch.tensor([n for _, n in good])


def _prepared(pictures: LabelledPictures, index: int, spec: ImageSpec) -> Tensor | ImageError:
    try:
        return prepare(pictures.source(index), spec)[0]
    except ImageError as err:
        return err
