"""How good a classifier is: accuracy, calibration, confusions, cost; its worst mistakes, drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.allocator import peak_memory
from tinyvit.errors import ImageError
from tinyvit.images import draw
from tinyvit.images.decode import decode
from tinyvit.inference.engine import Engine
from tinyvit.inference.read_ahead import read_ahead

from .metrics import RESAMPLES, Figure, as_json, calibrate

BINS = 15
_NAMED = 3
_TOP = 5

Loaded = TypeVar("Loaded")
Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


@dataclass(frozen=True)
class ClassConfusion:
    """A class that is taken for others."""

    name: str  # the class
    images: int  # how many images it has
    accuracy: float  # part of them that is found
    taken_for: tuple[tuple[str, int], ...]  # (other class, how often), the most frequent first


def hits_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each of the labels [N] is among the ``k`` largest logits of [N, K]: [N] bool."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices  # [N, k]
    return (best == labels[:, None]).any(dim=1)


def share_of_hits(hits: NDArray[np.bool_], resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """The part of hits and its 95 % interval over the choice of images.

    Drawing N images of which a part p are hits gives a binomial number of hits, so the bootstrap
    is drawn from that distribution at once.
    """
    count = len(hits)
    if not count:
        raise ValueError("wanted the hits of at least one image, got none")
    value = float(hits.mean())
    draws = np.random.default_rng(seed).binomial(count, value, size=resamples) / count
    low, high = np.percentile(draws, [2.5, 97.5])
    return Figure(value, float(low), float(high), count)


def calibration_error(confidence: NDArray[np.float64], hits: NDArray[np.bool_]) -> float:
    """Expected calibration error, 0 to 1: |confidence - accuracy| of each bin, weighted by images.

    ``confidence`` [N] is the probability of the class that was predicted, ``hits`` [N] whether it
    is the right one; the bins have equal width.
    """
    rows = calibrate(confidence, hits, BINS).bins
    gaps = (row.count * abs(row.predicted - row.true) for row in rows if row.count)
    return sum(gaps) / max(len(hits), 1)


def confusions(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    classes: tuple[str, ...],
    most: int = 10,
) -> tuple[ClassConfusion, ...]:
    """At most ``most`` classes that are found least, worst first; none without a mistake.

    ``labels`` [N] are the right classes, ``predicted`` [N] the model's.
    """
    found = []
    for number in np.unique(labels):
        found_as = predicted[labels == number]
        wrong = found_as[found_as != number]
        if len(wrong):
            others, counts = np.unique(wrong, return_counts=True)
            order = np.argsort(-counts, kind="stable")[:_NAMED]
            pairs = tuple((classes[others[i]], int(counts[i])) for i in order)
            accuracy = 1 - len(wrong) / len(found_as)
            found.append(ClassConfusion(classes[number], len(found_as), accuracy, pairs))
    return tuple(sorted(found, key=lambda row: row.accuracy)[:most])


class LabelledImages(Protocol):
    """A list of images whose classes are known."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N], number of each image's class."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in messages."""

    def source(self, index: int) -> Path | bytes:
        """Where an image is read from: a path, or the bytes of its file."""


@dataclass(frozen=True)
class WrongImage:
    """An image that is taken for another class, for a person to look at."""

    index: int  # its place in the list
    name: str  # its name
    label: str  # its class
    predicted: str  # the class it was taken for
    probability: float  # how sure the model was of that


@dataclass(frozen=True)
class ClassifyReport:
    """How good a classifier is."""

    images: int  # that were evaluated; unreadable ones are not among them
    classes: int  # how many
    top1: Figure  # part whose likeliest class is right
    top5: Figure | None  # among the five likeliest; None with five classes or fewer
    loss: float  # mean cross entropy in nats
    calibration_error: float  # expected difference of confidence and accuracy, 0 to 1
    confidence: float  # mean probability of the likeliest class
    confusions: tuple[ClassConfusion, ...]  # the classes that are found least, worst first
    wrong: tuple[WrongImage, ...]  # the most confidently wrong images, worst first
    broken: dict[str, str]  # reason by name of each image that could not be read
    seconds: float  # time for everything, reading included
    milliseconds: float  # the same for one image
    peak_memory: int | None  # most memory of the process in bytes, or None where it is not known
    engine: str  # what computed

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return as_json(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        memory = "unknown" if self.peak_memory is None else f"{self.peak_memory / 2**20:.0f} MiB"
        top5 = [] if self.top5 is None else [("top-5", _percent(self.top5))]
        return [
            ("images", f"{self.images} in {self.classes} classes"),
            ("unreadable", str(len(self.broken))),
            ("top-1", _percent(self.top1)),
            *top5,
            ("cross entropy", f"{self.loss:.4f}"),
            ("calibration error", f"{self.calibration_error:.1%}"),
            ("mean confidence", f"{self.confidence:.1%}"),
            ("time", f"{self.seconds:.1f} s, {self.milliseconds:.2f} ms an image"),
            ("peak memory", memory),
        ]


def evaluate_classifier(
    engine: Engine,
    images: LabelledImages,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    most_confusions: int = 10,
    most_wrong: int = 16,
    progress: Progress | None = None,
) -> ClassifyReport:
    """Evaluate a classifier on labelled images.

    Args:
        engine: Runs a model with as many classes as ``images``.
        images: The images; unreadable ones are named in the report and skipped.
        resamples: Draws for the intervals.
        seed: Of these draws.
        most_confusions: Classes to name.
        most_wrong: The most confidently wrong images to name.
        progress: Called as images are done.

    Returns:
        The report.

    Raises:
        ValueError: The model has another number of classes or gives no logits, or no image could
            be read.
    """
    began = time.perf_counter()
    indices, logits, broken = _run(engine, images, progress)
    seconds = time.perf_counter() - began
    classes = images.classes
    labels = np.asarray(images.labels)[indices]
    probabilities = logits.double().softmax(dim=1)
    confidence, predicted = (found.numpy() for found in probabilities.max(dim=1))
    first = predicted == labels
    own = probabilities[torch.arange(len(labels)), torch.from_numpy(labels)]
    top5 = None
    if len(classes) > _TOP:
        hits = hits_in_top(logits, torch.from_numpy(labels), _TOP).numpy()
        top5 = share_of_hits(hits, resamples, seed)
    wrong = np.flatnonzero(~first)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:most_wrong]
    rows = zip(indices[wrong], labels[wrong], predicted[wrong], confidence[wrong], strict=True)
    return ClassifyReport(
        images=len(labels),
        classes=len(classes),
        top1=share_of_hits(first, resamples, seed),
        top5=top5,
        loss=float(-own.clamp_min(1e-300).log().mean()),
        calibration_error=calibration_error(confidence, first),
        confidence=float(confidence.mean()),
        confusions=confusions(labels, predicted, classes, most_confusions),
        wrong=tuple(
            WrongImage(int(i), images.name(int(i)), classes[label], classes[found], float(sure))
            for i, label, found, sure in rows
        ),
        broken=broken,
        seconds=seconds,
        milliseconds=1000 * seconds / len(labels),
        peak_memory=peak_memory(engine.backend.device),
        engine=engine.explain(),
    )


def read_batches(
    images: LabelledImages,
    indices: Sequence[int],
    load: Callable[[int], Loaded],
    size: int,
    broken: dict[str, str],
    workers: int,
) -> Iterator[dict[int, Loaded]]:
    """What ``load`` makes of images, by index, ``size`` of them at a time; threads read ahead.

    Unreadable ones are left out, and named in ``broken`` with the reason.
    """

    def read(index: int) -> Loaded | ImageError:
        try:
            return load(index)
        except ImageError as err:
            return err

    jobs = (partial(read, index) for index in indices)
    found = zip(indices, read_ahead(jobs, workers=workers, ahead=size + workers), strict=True)
    while batch := dict(islice(found, size)):
        good = {index: one for index, one in batch.items() if not isinstance(one, ImageError)}
        broken |= {images.name(index): str(batch[index]) for index in batch if index not in good}
        yield good


def _run(
    engine: Engine, images: LabelledImages, progress: Progress | None
) -> tuple[NDArray[np.int64], Tensor, dict[str, str]]:
    """Indices of the images that could be read, their logits [N, K], and the unreadable ones."""
    broken: dict[str, str] = {}
    indices: list[int] = []
    rows: list[Tensor] = []
    size, count = engine.batch_size, len(images)
    batches = read_batches(
        images, range(count), lambda i: decode(images.source(i)), size, broken, engine.workers
    )
    for number, batch in enumerate(batches, 1):
        indices += batch
        if batch:
            logits = engine.classify(list(batch.values()))
            if logits.shape[1] != len(images.classes):
                raise ValueError(
                    f"the model has {logits.shape[1]} classes and the images have "
                    f"{len(images.classes)}; evaluate it on images of the classes it was trained on"
                )
            rows.append(logits)
        if progress is not None:
            progress(min(number * size, count), count)
    if not rows:
        first = next(iter(broken.items()), ("", "there is none"))
        raise ValueError(f"no image of {count} could be read; {first[0]}: {first[1]}")
    return np.array(indices, dtype=np.int64), torch.cat(rows), broken


def draw_error_gallery(
    report: ClassifyReport, images: LabelledImages, title: str = "Most confidently wrong"
) -> NDArray[np.uint8]:
    """Draw the wrong images of a report, with what each is and was taken for: RGB [H, W, 3]."""
    if not report.wrong:
        raise ValueError("there is nothing to show: no image was taken for another class")
    cells = [
        (
            draw.panel(decode(images.source(one.index))),
            f"is {one.label}\ntaken for {one.predicted}, {one.probability:.0%}",
        )
        for one in report.wrong
    ]
    return draw.gallery([("", cells)], title)


def _percent(figure: Figure) -> str:
    return f"{figure.value:.1%} ({figure.low:.1%} to {figure.high:.1%})"
