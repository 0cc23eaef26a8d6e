"""The most confidently wrong images of a classifier, as one image to look at.

Each cell shows an image and below it what it is and what it was taken for, with the model's
probability. Small images are enlarged so that their pixels can be seen.

Shapes: H W an image.
"""

from __future__ import annotations

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
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tinyvit.errors import ImageError
from tinyvit.images.decode import decode
from tinyvit.inference.engine import Engine
from tinyvit.inference.read_ahead import read_ahead

from .metrics import RESAMPLES, Figure, as_json

pass


RGB = NDArray[np.uint8]

CELL, GAP, MARGIN, CAPTION, TITLE, COLUMNS = 220, 20, 36, 52, 56, 4  # pixels; cells in a row
PAPER, GROUND, INK, FAINT = (255, 255, 255), (240, 241, 244), (28, 32, 40), (118, 124, 136)


def draw_wrong(
    report: ClassifyReport, images: LabelledImages, title: str = "Most confidently wrong"
) -> RGB:
    """Draw the wrong images of a report.

    Args:
        report: What was measured.
        images: The list it was measured on.
        title: The line at the top.

    Returns:
        RGB [H, W, 3] uint8, for ``tinyvit.images.draw.save_png``.

    Raises:
        ValueError: No image is wrong.
        ImageError: An image cannot be read any more.
    """
    cells = report.wrong
    if not cells:
        raise ValueError("there is nothing to show: no image was taken for another class")
    columns = min(COLUMNS, len(cells))
    row = CELL + CAPTION + GAP
    font = ImageFont.load_default(size=24)
    width = 2 * MARGIN + max(columns * (CELL + GAP) - GAP, round(font.getlength(title)))
    height = MARGIN + TITLE + -(-len(cells) // columns) * row - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, font)
    for place, cell in enumerate(cells):
        line, column = divmod(place, columns)
        left, top = MARGIN + column * (CELL + GAP), MARGIN + TITLE + line * row
        image = _fitted(decode(images.source(cell.index)))
        pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=GROUND)
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        _write(pen, left, top + CELL + 6, cell)
    return np.array(sheet)


def _fitted(image: RGB) -> Image.Image:
    """Into a cell: shrunk smoothly, or enlarged pixel by pixel."""
    height, width = image.shape[:2]
    scale = min(CELL / width, CELL / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return Image.fromarray(image).resize(size, way)


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, cell: WrongImage) -> None:
    lines = (
        (f"is {cell.label}", INK),
        (f"taken for {cell.predicted}, {cell.probability:.0%}", FAINT),
    )
    font = ImageFont.load_default(size=16)
    for number, (text, colour) in enumerate(lines):
        while pen.textlength(text, font=font) > CELL and len(text) > 1:
            text = f"{text[:-4]}..." if len(text) > 4 else text[:-1]
        pen.text((left, top + 21 * number), text, colour, font)


BINS = 15
_NAMED = 3


@dataclass(frozen=True)
class ClassConfusion:
    """A class that is taken for others.

    Attributes:
        name: The class.
        images: How many images it has.
        accuracy: Part of them that is found.
        taken_for: (other class, how often), the most frequent first.
    """

    name: str
    images: int
    accuracy: float
    taken_for: tuple[tuple[str, int], ...]


def hits_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each label is among the ``k`` largest logits.

    Args:
        logits: [N, K].
        labels: [N] int64.
        k: How many count; more than K means all.

    Returns:
        [N] bool.

    Example:
        >>> import torch
        >>> hits_in_top(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]), 2)
        tensor([True])
    """
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices  # [N, k]
    return (best == labels[:, None]).any(dim=1)


def share_of_hits(hits: NDArray[np.bool_], resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """The part of hits and its 95 % interval over the choice of images.

    Drawing N images of which a part p are hits gives a binomial number of hits, so the bootstrap
    is drawn from that distribution at once.

    Args:
        hits: [N].
        resamples: How often the images are drawn.
        seed: Of the draws; the same hits always give the same interval.

    Returns:
        The part and its interval.

    Raises:
        ValueError: There are no images.
    """
    count = len(hits)
    if not count:
        raise ValueError("wanted the hits of at least one image, got none")
    value = float(hits.mean())
    draws = np.random.default_rng(seed).binomial(count, value, size=resamples) / count
    low, high = np.percentile(draws, [2.5, 97.5])
    return Figure(value, float(low), float(high), count)


def calibration_error(
    confidence: NDArray[np.float64], hits: NDArray[np.bool_], bins: int = BINS
) -> float:
    """Expected difference between how sure a model is and how often it is right.

    Args:
        confidence: [N], probability of the class that was chosen, 0 to 1.
        hits: [N], whether it is the right one.
        bins: Bins of equal width.

    Returns:
        0 to 1: the difference in each bin, weighted by the images in it.

    Example:
        >>> calibration_error(np.array([0.75, 0.75]), np.array([True, False]))
        0.25
    """
    numbers = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    sure = np.bincount(numbers, weights=confidence, minlength=bins)
    right = np.bincount(numbers, weights=hits.astype(np.float64), minlength=bins)
    return float(np.abs(sure - right).sum() / max(len(hits), 1))


def confusions(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    classes: tuple[str, ...],
    most: int = 10,
) -> tuple[ClassConfusion, ...]:
    """The classes that are found least.

    Args:
        labels: [N], right classes.
        predicted: [N], answers.
        classes: Names of all K classes.
        most: Classes to name at most; classes without a mistake are never named.

    Returns:
        Worst first; of equals the first by number.
    """
    found = []
    for number in np.unique(labels):
        answers = predicted[labels == number]
        wrong = answers[answers != number]
        if len(wrong):
            others, counts = np.unique(wrong, return_counts=True)
            order = np.argsort(-counts, kind="stable")[:_NAMED]
            pairs = tuple((classes[others[i]], int(counts[i])) for i in order)
            accuracy = 1 - len(wrong) / len(answers)
            found.append(ClassConfusion(classes[number], len(answers), accuracy, pairs))
    return tuple(sorted(found, key=lambda row: row.accuracy)[:most])


pass


_TOP = 5
_MEBI = 1 << 20

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


class LabelledImages(Protocol):
    """A list of images whose classes are known."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N], number of each image's class."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in messages."""
        ...

    def source(self, index: int) -> Path | bytes:
        """Where an image is read from: a path, or the bytes of its file."""
        ...


@dataclass(frozen=True)
class WrongImage:
    """An image that is taken for another class, for a person to look at.

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
        images: Images that were measured; broken ones are not among them.
        classes: Number of classes.
        top1: Part whose likeliest class is right.
        top5: Part whose class is among the five likeliest; None with five classes or fewer.
        loss: Mean cross entropy in nats.
        calibration_error: Expected difference of confidence and accuracy, 0 to 1.
        confidence: Mean probability of the likeliest class.
        confusions: The classes that are found least, worst first.
        wrong: The most confidently wrong images, worst first.
        broken: Reason by name of each image that could not be read.
        seconds: Time for everything, reading included.
        milliseconds: The same for one image.
        peak_memory: Most memory of the process in bytes, or None where it is not known.
        engine: What computed.
    """

    images: int
    classes: int
    top1: Figure
    top5: Figure | None
    loss: float
    calibration_error: float
    confidence: float
    confusions: tuple[ClassConfusion, ...]
    wrong: tuple[WrongImage, ...]
    broken: dict[str, str]
    seconds: float
    milliseconds: float
    peak_memory: int | None
    engine: str

    def to_json(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return as_json(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, figure) for a table."""
        memory = "unknown" if self.peak_memory is None else f"{self.peak_memory / _MEBI:.0f} MiB"
        rows = [
            ("images", f"{self.images} in {self.classes} classes"),
            ("broken", str(len(self.broken))),
            ("top-1", _percent(self.top1)),
        ]
        if self.top5 is not None:
            rows.append(("top-5", _percent(self.top5)))
        rows += [
            ("cross entropy", f"{self.loss:.4f}"),
            ("calibration error", f"{self.calibration_error:.1%}"),
            ("mean confidence", f"{self.confidence:.1%}"),
            ("time", f"{self.seconds:.1f} s, {self.milliseconds:.2f} ms an image"),
            ("peak memory", memory),
        ]
        return rows


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
    """Measure a classifier on labelled images.

    Args:
        engine: Runs a model with as many classes as ``images``.
        images: The images; broken ones are named in the report and not measured.
        resamples: Draws for the intervals.
        seed: Of these draws.
        most_confusions: Classes to name.
        most_wrong: Images to name.
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
    chances = logits.double().softmax(dim=1)
    confidence, predicted = (found.numpy() for found in chances.max(dim=1))
    first = predicted == labels
    own = chances[torch.arange(len(labels)), torch.from_numpy(labels)]
    top5 = None
    if len(classes) > _TOP:
        hits = hits_in_top(logits, torch.from_numpy(labels), _TOP).numpy()
        top5 = share_of_hits(hits, resamples, seed)
    return ClassifyReport(
        images=len(labels),
        classes=len(classes),
        top1=share_of_hits(first, resamples, seed),
        top5=top5,
        loss=float(-own.clamp_min(1e-300).log().mean()),
        calibration_error=calibration_error(confidence, first),
        confidence=float(confidence.mean()),
        confusions=confusions(labels, predicted, classes, most_confusions),
        wrong=_wrong(images, indices, labels, predicted, confidence, most_wrong),
        broken=broken,
        seconds=seconds,
        milliseconds=1000 * seconds / len(labels),
        peak_memory=_peak_memory(engine.backend.device),
        engine=engine.explain(),
    )


def _run(
    engine: Engine, images: LabelledImages, progress: Progress | None
) -> tuple[NDArray[np.int64], Tensor, dict[str, str]]:
    """Indices of the images that could be read, their logits [N, K], and the broken ones."""
    broken: dict[str, str] = {}
    indices: list[int] = []
    rows: list[Tensor] = []
    for batch in _batches(engine, images):
        good: list[NDArray[np.uint8]] = []
        for index, read in batch:
            if isinstance(read, ImageError):
                broken[images.name(index)] = str(read)
            else:
                indices.append(index)
                good.append(read)
        if good:
            logits = engine.classify(good)
            if logits.shape[1] != len(images.classes):
                raise ValueError(
                    f"the model has {logits.shape[1]} classes and the images have "
                    f"{len(images.classes)}; measure it on images of the classes it learnt"
                )
            rows.append(logits)
        if progress is not None:
            progress(batch[-1][0] + 1, len(images))
    if not rows:
        first = next(iter(broken.items()), ("", "there is none"))
        raise ValueError(f"no image of {len(images)} could be read; {first[0]}: {first[1]}")
    return np.array(indices, dtype=np.int64), torch.cat(rows), broken


_Read = tuple[int, "NDArray[np.uint8] | ImageError"]


def _batches(engine: Engine, images: LabelledImages) -> Iterator[list[_Read]]:
    """Images read ahead in threads, some at a time, in order."""
    jobs = (partial(_read, images, index) for index in range(len(images)))
    batch: list[_Read] = []
    for found in read_ahead(jobs, workers=engine.workers, ahead=engine.ahead):
        batch.append(found)
        if len(batch) == engine.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(images: LabelledImages, index: int) -> _Read:
    try:
        return index, decode(images.source(index))
    except ImageError as err:
        return index, err


def _wrong(
    images: LabelledImages,
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    confidence: NDArray[np.floating],
    most: int,
) -> tuple[WrongImage, ...]:
    classes = images.classes
    places = np.flatnonzero(labels != predicted)
    places = places[np.argsort(-confidence[places], kind="stable")][:most]
    return tuple(
        WrongImage(
            int(indices[i]),
            images.name(int(indices[i])),
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
