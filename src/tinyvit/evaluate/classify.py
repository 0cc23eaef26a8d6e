"""How good a classifier is: accuracy with intervals, calibration, which classes it confuses, cost.

Runs a ``tinyvit.Engine`` over labelled pictures of any kind and turns the logits into a report. How
pictures are listed is not known here: anything with the members of ``LabelledPictures`` will do.
The figures themselves are computed in ``classification_metrics.py``.

Letters: N pictures, K classes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.errors import ImageError
from tinyvit.images.decode import decode
from tinyvit.inference.engine import Engine
from tinyvit.inference.read_ahead import read_ahead

from .certainty import RESAMPLES, Figure
from .classification_metrics import (
    ClassConfusion,
    calibration_error,
    confusions,
    hits_in_top,
    share_of_hits,
)

__all__ = [
    "ClassifyReport",
    "LabelledPictures",
    "WrongPicture",
    "evaluate_classifier",
]

_TOP = 5
_MEBI = 1 << 20

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


class LabelledPictures(Protocol):
    """A list of pictures whose classes are known."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N], number of each picture's class."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a picture in messages."""
        ...

    def source(self, index: int) -> Path | bytes:
        """Where a picture is read from: a path, or the bytes of its file."""
        ...


@dataclass(frozen=True)
class WrongPicture:
    """A picture that is taken for another class, for a person to look at.

    Attributes:
        index: Its place in the list.
        name: Its name.
        label: Its class.
        predicted: The class it was taken for.
        probability: How sure the model was of that.
    """

    index: int
    name: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class ClassifyReport:
    """What was measured.

    Attributes:
        pictures: Pictures that were measured; broken ones are not among them.
        classes: Number of classes.
        top1: Part whose likeliest class is right.
        top5: Part whose class is among the five likeliest; None with five classes or fewer.
        loss: Mean cross entropy in nats.
        calibration_error: Expected difference of confidence and accuracy, 0 to 1.
        confidence: Mean probability of the likeliest class.
        confusions: The classes that are found least, worst first.
        wrong: The most confidently wrong pictures, worst first.
        broken: Reason by name of each picture that could not be read.
        seconds: Time for everything, reading included.
        milliseconds: The same for one picture.
        peak_memory: Most memory of the process in bytes, or None where it is not known.
        engine: What computed.
    """

    pictures: int
    classes: int
    top1: Figure
    top5: Figure | None
    loss: float
    calibration_error: float
    confidence: float
    confusions: tuple[ClassConfusion, ...]
    wrong: tuple[WrongPicture, ...]
    broken: dict[str, str]
    seconds: float
    milliseconds: float
    peak_memory: int | None
    engine: str

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, figure) for a table."""
        memory = "unknown" if self.peak_memory is None else f"{self.peak_memory / _MEBI:.0f} MiB"
        rows = [
            ("pictures", f"{self.pictures} in {self.classes} classes"),
            ("broken", str(len(self.broken))),
            ("top-1", _percent(self.top1)),
        ]
        if self.top5 is not None:
            rows.append(("top-5", _percent(self.top5)))
        rows += [
            ("cross entropy", f"{self.loss:.4f}"),
            ("calibration error", f"{self.calibration_error:.1%}"),
            ("mean confidence", f"{self.confidence:.1%}"),
            ("time", f"{self.seconds:.1f} s, {self.milliseconds:.2f} ms a picture"),
            ("peak memory", memory),
        ]
        return rows


def evaluate_classifier(
    engine: Engine,
    pictures: LabelledPictures,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    most_confusions: int = 10,
    most_wrong: int = 16,
    progress: Progress | None = None,
) -> ClassifyReport:
    """Measure a classifier on labelled pictures.

    Args:
        engine: Runs a model with as many classes as ``pictures``.
        pictures: The pictures; broken ones are named in the report and not measured.
        resamples: Draws for the intervals.
        seed: Of these draws.
        most_confusions: Classes to name.
        most_wrong: Pictures to name.
        progress: Called as pictures are done.

    Returns:
        The report.

    Raises:
        ValueError: The model has another number of classes or gives no logits, or no picture could
            be read.
    """
    began = time.perf_counter()
    indices, logits, broken = _run(engine, pictures, progress)
    seconds = time.perf_counter() - began
    classes = pictures.classes
    labels = np.asarray(pictures.labels)[indices]
    chances = logits.double().softmax(dim=1)
    confidence, predicted = (found.numpy() for found in chances.max(dim=1))
    first = predicted == labels
    own = chances[torch.arange(len(labels)), torch.from_numpy(labels)]
    top5 = None
    if len(classes) > _TOP:
        hits = hits_in_top(logits, torch.from_numpy(labels), _TOP).numpy()
        top5 = share_of_hits(hits, resamples, seed)
    return ClassifyReport(
        pictures=len(labels),
        classes=len(classes),
        top1=share_of_hits(first, resamples, seed),
        top5=top5,
        loss=float(-own.clamp_min(1e-300).log().mean()),
        calibration_error=calibration_error(confidence, first),
        confidence=float(confidence.mean()),
        confusions=confusions(labels, predicted, classes, most_confusions),
        wrong=_wrong(pictures, indices, labels, predicted, confidence, most_wrong),
        broken=broken,
        seconds=seconds,
        milliseconds=1000 * seconds / len(labels),
        peak_memory=_peak_memory(engine.backend.device),
        engine=engine.explain(),
    )


def _run(
    engine: Engine, pictures: LabelledPictures, progress: Progress | None
) -> tuple[NDArray[np.int64], Tensor, dict[str, str]]:
    """Indices of the pictures that could be read, their logits [N, K], and the broken ones."""
    broken: dict[str, str] = {}
    indices: list[int] = []
    rows: list[Tensor] = []
    for batch in _batches(engine, pictures):
        good: list[NDArray[np.uint8]] = []
        for index, read in batch:
            if isinstance(read, ImageError):
                broken[pictures.name(index)] = str(read)
            else:
                indices.append(index)
                good.append(read)
        if good:
            logits = engine.classify(good)
            if logits.shape[1] != len(pictures.classes):
                raise ValueError(
                    f"the model has {logits.shape[1]} classes and the pictures have "
                    f"{len(pictures.classes)}; measure it on pictures of the classes it learnt"
                )
            rows.append(logits)
        if progress is not None:
            progress(batch[-1][0] + 1, len(pictures))
    if not rows:
        first = next(iter(broken.items()), ("", "there is none"))
        raise ValueError(f"no picture of {len(pictures)} could be read; {first[0]}: {first[1]}")
    return np.array(indices, dtype=np.int64), torch.cat(rows), broken


_Read = tuple[int, "NDArray[np.uint8] | ImageError"]


def _batches(engine: Engine, pictures: LabelledPictures) -> Iterator[list[_Read]]:
    """Pictures read ahead in threads, some at a time, in order."""
    jobs = (partial(_read, pictures, index) for index in range(len(pictures)))
    batch: list[_Read] = []
    for found in read_ahead(jobs, workers=engine.workers, ahead=engine.ahead):
        batch.append(found)
        if len(batch) == engine.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(pictures: LabelledPictures, index: int) -> _Read:
    try:
        return index, decode(pictures.source(index))
    except ImageError as err:
        return index, err


def _wrong(
    pictures: LabelledPictures,
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    confidence: NDArray[np.floating],
    most: int,
) -> tuple[WrongPicture, ...]:
    classes = pictures.classes
    places = np.flatnonzero(labels != predicted)
    places = places[np.argsort(-confidence[places], kind="stable")][:most]
    return tuple(
        WrongPicture(
            int(indices[i]),
            pictures.name(int(indices[i])),
            classes[labels[i]],
            classes[predicted[i]],
            float(confidence[i]),
        )
        for i in places
    )


def _percent(figure: Figure) -> str:
    return f"{figure.value:.1%} ({figure.low:.1%} to {figure.high:.1%})"


def _peak_memory(device: str) -> int | None:
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
