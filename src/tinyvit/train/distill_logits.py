"""The task of learning a teacher's answers that were written down before.

``logit_writer.py`` shows a teacher V views of each picture and keeps its answers in a
``LogitStore``, each with the seed of the chance that made the view. ``DistillLogits`` trains any
student with them: it makes the same view from the same seed and learns the teacher's distribution.
The teacher itself is not needed any more, and may have cost what it wants.

The method is TinyViT's (Wu et al., ECCV 2022, arXiv 2207.10666): sparse answers, the seed beside
them, cross entropy with the distribution that is made of them again. Two things differ. Each epoch
here draws one of the V views of a picture, where the paper keeps one view for each epoch; and
pictures are not mixed with each other, since answers are kept for single ones.

Letters: B batch, k classes that are kept, V views.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import classify
from .classification_losses import sparse_cross_entropy
from .classify import Classify, ClassifySettings
from .data_sets import fingerprint, read_one
from .logit_store import LogitStore
from .task import Batch, Goal

__all__ = ["DistillLogits", "DistillSample", "make_task"]

_TRIES = 20


@dataclass(frozen=True)
class DistillSample:
    """One view to learn from.

    Attributes:
        pixels: [3, h, w] float32, normalised for the student.
        probabilities: [k] float32, the teacher's.
        classes: [k] int64, whose they are.
        label: Number of the picture's own class.
        broken: Reason by name of each broken picture met on the way.
    """

    pixels: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    classes: NDArray[np.int64]
    label: int
    broken: dict[str, str]


@dataclass
class DistillLogits:
    """Learns a teacher's written answers; a ``Task``.

    Attributes:
        student: The same network learning from labels; it measures and saves.
        store: The answers.
        model: The network that is trained, in place.
    """

    student: Classify
    store: LogitStore
    name: str = "distill-logits"
    goal: Goal = ("top1", "max")
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        """Check that the answers belong to the data and the views.

        Raises:
            StoreMismatchError: They belong to something else.
        """
        data = self.student.data
        self.model = self.student.model
        self.store.check(
            pictures=len(data.train),
            classes=data.classes,
            data=fingerprint(data.train),
            augmentation=self.student.view.augmentation.to_dict(),
        )

    @property
    def broken(self) -> dict[str, str]:
        """Reason by name of each broken picture met so far, in this process."""
        return self.student.broken

    def __len__(self) -> int:
        """Training pictures in an epoch."""
        return len(self.student)

    def sample(self, index: int, rng: np.random.Generator) -> DistillSample:
        """One of the views of a picture with the teacher's answer; ``rng`` draws which.

        Args:
            index: 0 to ``len(self) - 1``.
            rng: The only source of chance here; the view's own chance is that of its stored seed.

        Raises:
            ImageError: The picture is broken and ``on_broken`` is "error", or many were in a row.
            ValueError: Many pictures in a row have no answer: the store is not finished.
        """
        pictures = self.student.data.train
        broken: dict[str, str] = {}
        for _ in range(_TRIES):
            index, image, found = read_one(pictures, index, rng, self.student.on_broken)
            broken.update(found)
            view = int(rng.integers(self.store.header.views))
            kept = self.store.read(view, index)
            if kept is not None:
                seed, probabilities, classes = kept
                pixels = self.student.view(image, np.random.default_rng(seed))
                label = int(pictures.labels[index])
                return DistillSample(pixels, probabilities, classes, label, broken)
            broken[pictures.name(index)] = f"no answer to view {view} in the store"
            if self.student.on_broken == "error":
                break
            index = int(rng.integers(len(pictures)))
        raise ValueError(
            f"pictures without an answer in {self.store.folder}, for example "
            f"{next(reversed(broken))!r}; call write_logits again, which writes what is missing"
        )

    def collate(self, samples: list[DistillSample]) -> Batch:
        """``images`` [B, 3, h, w], ``probabilities`` and ``classes`` [B, k], ``labels`` [B]."""
        batch: dict[str, Any] = {
            "images": torch.from_numpy(np.stack([one.pixels for one in samples])),
            "probabilities": torch.from_numpy(np.stack([one.probabilities for one in samples])),
            "classes": torch.from_numpy(np.stack([one.classes for one in samples])),
            "labels": torch.tensor([one.label for one in samples]),
            "broken": {name: text for one in samples for name, text in one.broken.items()},
        }
        return batch

    def loss(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy with the teacher's distribution; labels are only counted.

        Args:
            model: Gives logits [B, K].
            batch: What ``collate`` gave.
            generator: Not used: there is no chance left.

        Returns:
            The mean loss; ``train_top1``, and ``as_teacher``: how often both choose one class.
        """
        self.broken.update(cast("dict[str, str]", batch.get("broken", {})))
        logits = model(batch["images"])
        choice = logits.detach().argmax(dim=1)
        figures = {
            "train_top1": (choice == batch["labels"]).float().mean(),
            "as_teacher": (choice == batch["classes"][:, 0]).float().mean(),
        }
        return sparse_cross_entropy(logits, batch["classes"], batch["probabilities"]), figures

    def validate(self, model: nn.Module) -> dict[str, float]:
        """As ``Classify.validate``: against the labels of the held-out part."""
        return self.student.validate(model)

    def save(self, model: nn.Module, path: Path) -> None:
        """As ``Classify.save``."""
        self.student.save(model, path)


def make_task(settings: ClassifySettings, store: str | os.PathLike[str]) -> DistillLogits:
    """Open data and answers, and build the student.

    Args:
        settings: As for classification; the chance must be the store's, and there is no mixing and
            no smoothing.
        store: The folder of ``write_logits``.

    Returns:
        The task, for ``tinyvit.train.train``.

    Raises:
        ValueError: The data, the store or a choice is wrong.
        StoreMismatchError: The answers belong to something else.
        CheckpointError: The checkpoint cannot be read or does not fit.
        DownloadError: The checkpoint cannot be fetched.
    """
    if settings.mixup or settings.cutmix:
        raise ValueError(
            f"mixup={settings.mixup} and cutmix={settings.cutmix} cannot be used here: answers are "
            "kept for single pictures; leave them 0"
        )
    answers = LogitStore.open(store)
    return DistillLogits(classify.make_task(replace(settings, smoothing=0.0)), answers)
