"""Measure how well a ``Sam`` segments what a click, several clicks or a box mean.

The first click is the object's most interior point. Each further click goes to the most interior
point of the largest error, missing or too much, as is usual in interactive segmentation (Sofiiuk et
al., 2021); the model gets all clicks so far and its own last answer. The box is the tightest one.
Of the three masks of the first click the one counts that the model itself thinks best. Beside it
stand the floors of ``floors.py``, which need no network.

Any sequence of pictures with masks will do. Letters: N masks of a picture, H W the picture.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tinyvit.errors import ImageError
from tinyvit.sam.build import build_sam
from tinyvit.sam.model import Sam
from tinyvit.sam.predictor import SamPredictor

from .floors import box_floors, click_floors
from .mask_metrics import Mask, Point, boundary_f, iou, most_interior_point, next_click
from .report import Case, Cost, SegmentReport, summarise

__all__ = ["LabelledPicture", "MeasureSettings", "Predictor", "Shown", "evaluate_segment"]

RGB = NDArray[np.uint8]


class LabelledPicture(Protocol):
    """A picture and its masks, wherever they come from; ``tinyvit.train.Scene`` is one."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """What each object is called."""
        ...

    def load(self) -> tuple[RGB, NDArray[np.bool_]]:
        """(RGB [H, W, 3] uint8, masks [N, H, W] bool)."""
        ...


class Predictor(Protocol):
    """What is measured: ``SamPredictor`` and ``PlainPredictor`` are such."""

    def set_image(self, image: RGB) -> None:
        """Encode a picture."""
        ...

    def predict(
        self,
        point_coords: NDArray[np.generic] | None = None,
        point_labels: NDArray[np.generic] | None = None,
        box: NDArray[np.generic] | None = None,
        mask_input: NDArray[np.generic] | None = None,
        multimask_output: bool = True,
    ) -> tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.float32]]:
        """(masks [K, H, W] bool, predicted IoU [K], low-res logits [K, h4, w4])."""
        ...


Model: TypeAlias = "Sam | Predictor | str | os.PathLike[str]"


@dataclass(frozen=True)
class MeasureSettings:
    """How to measure.

    Args:
        clicks: Numbers of clicks whose mean IoU is wanted.
        target_iou: Clicks are counted until this IoU.
        most_clicks: Where counting stops; at least the most of ``clicks``.
        feed_mask: Give the model its last answer together with the further clicks.
        with_floors: Measure the floors, too.
        most_masks: Stop after so many masks; None measures all.

    Raises:
        ValueError: A number is out of its range.
    """

    clicks: tuple[int, ...] = (1, 3, 5)
    target_iou: float = 0.85
    most_clicks: int = 10
    feed_mask: bool = True
    with_floors: bool = True
    most_masks: int | None = None

    def __post_init__(self) -> None:
        if not self.clicks or min(self.clicks) < 1:
            raise ValueError(f"clicks must be numbers of at least 1, but are {self.clicks}")
        if self.most_clicks < max(self.clicks):
            raise ValueError(
                f"most_clicks must be at least {max(self.clicks)}, the most of clicks="
                f"{self.clicks}, but is {self.most_clicks}"
            )
        if not 0 < self.target_iou <= 1:
            raise ValueError(f"target_iou must lie in 0 to 1, but is {self.target_iou}")
        if self.most_masks is not None and self.most_masks < 1:
            raise ValueError(f"most_masks must be at least 1, but is {self.most_masks}")


@dataclass(frozen=True)
class Shown:
    """One answer to one click, for whoever wants to draw it.

    Attributes:
        case: What was measured.
        image: RGB [H, W, 3] uint8.
        target: [H, W] bool.
        predicted: [H, W] bool, after one click.
        point: (x, y) of the click.
    """

    case: Case
    image: RGB
    target: Mask
    predicted: Mask
    point: Point


def evaluate_segment(
    model: Model,
    pictures: Iterable[LabelledPicture],
    settings: MeasureSettings | None = None,
    *,
    name: str | None = None,
    data: str = "",
    faults: Sequence[str] = (),
    watch: Callable[[Shown], None] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> SegmentReport:
    """Measure a model on pictures with masks.

    Args:
        model: A ``Sam``, a predictor, or the name or path of a checkpoint that holds a whole SAM.
        pictures: Such as a ``MaskSet``; broken ones are left out and named in the report.
        settings: How; None takes the defaults.
        name: What to call the model in the report; None takes the checkpoint's name.
        data: What to call the pictures.
        faults: What was left out already, for the report.
        watch: Called with each answer to one click, say by a ``ContactSheet``.
        progress: Called with (pictures done, all or None).

    Returns:
        The report.

    Raises:
        ValueError: There is not one good mask.
        CheckpointError: The checkpoint cannot be read, or holds no whole SAM.
    """
    settings = settings or MeasureSettings()
    called = name or (str(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__)
    asker = _Asker(_predictor(model), settings)
    total = len(pictures) if isinstance(pictures, Sequence) else None
    left_out = list(faults)
    cases: list[Case] = []
    groups: list[int] = []
    used = 0
    for number, picture in enumerate(pictures):
        rest = None if settings.most_masks is None else settings.most_masks - len(cases)
        if rest is not None and rest <= 0:
            break
        try:
            image, masks = picture.load()
        except (ImageError, ValueError) as err:
            left_out.append(f"{picture.name}: {err}")
            continue
        found = list(islice(asker.measure(picture, image, masks, watch, left_out), rest))
        cases += found
        groups += [number] * len(found)
        used += bool(found)
        if progress is not None:
            progress(number + 1, total)
    if not cases:
        reasons = f": {'; '.join(left_out[:5])}" if left_out else ""
        raise ValueError(f"there is not one good mask to measure on{reasons}")
    return summarise(
        called,
        data,
        used,
        left_out,
        cases,
        groups,
        asker.cost(),
        clicks=settings.clicks,
        target_iou=settings.target_iou,
        most_clicks=settings.most_clicks,
    )


def _predictor(model: Model) -> Predictor:
    if isinstance(model, (str, os.PathLike)):
        model = build_sam(model)
    return SamPredictor(model) if isinstance(model, Sam) else model


@dataclass
class _Answer:
    mask: Mask
    predicted_iou: float
    low_res_logits: NDArray[np.float32]
    all_masks: NDArray[np.generic]


@dataclass
class _Asker:
    """Asks a model, and takes the time."""

    predictor: Predictor
    settings: MeasureSettings
    encode_seconds: list[float] = field(default_factory=list)
    prompt_seconds: list[float] = field(default_factory=list)

    def measure(
        self,
        picture: LabelledPicture,
        image: RGB,
        masks: NDArray[np.bool_],
        watch: Callable[[Shown], None] | None,
        left_out: list[str],
    ) -> Iterable[Case]:
        """The cases of one picture, encoded once."""
        start = time.perf_counter()
        self.predictor.set_image(image)
        self.encode_seconds.append(time.perf_counter() - start)
        labels = picture.labels
        for number, target in enumerate(masks):
            if not target.any():
                left_out.append(f"{picture.name}, mask {number}: the mask is empty")
                continue
            label = labels[number] if number < len(labels) else ""
            shown = self._case(picture.name, number, label, image, target)
            if watch is not None:
                watch(shown)
            yield shown.case

    def _case(self, picture: str, number: int, label: str, image: RGB, target: Mask) -> Shown:
        point = most_interior_point(target)
        box = _box_around(target)
        first, ious = self._click(point, target)
        boxed = self._ask(None, None, np.array(box), None, False)
        floors: tuple[Mapping[str, float], Mapping[str, float]] = {}, {}
        if self.settings.with_floors:
            floors = (
                {name: iou(f(image, point), target) for name, f in click_floors().items()},
                {name: iou(f(image, box), target) for name, f in box_floors().items()},
            )
        case = Case(
            picture=picture,
            number=number,
            label=label,
            area=float(target.mean()),
            click_ious=tuple(ious),
            best_of_three=max(iou(np.asarray(mask, bool), target) for mask in first.all_masks),
            click_boundary_f=boundary_f(first.mask, target),
            click_predicted_iou=first.predicted_iou,
            box_iou=iou(boxed.mask, target),
            box_boundary_f=boundary_f(boxed.mask, target),
            box_predicted_iou=boxed.predicted_iou,
            click_floors=floors[0],
            box_floors=floors[1],
        )
        return Shown(case, image, target, first.mask, point)

    def _click(self, point: Point, target: Mask) -> tuple[_Answer, list[float]]:
        """The answer to the first click, and the IoU after each."""
        settings = self.settings
        points, labels = [point], [1]
        first = answer = self._ask(points, labels, None, None, True)
        ious = [iou(answer.mask, target)]
        while len(ious) < settings.most_clicks:
            if len(ious) >= max(settings.clicks) and max(ious) >= settings.target_iou:
                break
            click = next_click(answer.mask, target)
            if click is None:  # nothing left to correct
                ious.append(ious[-1])
                continue
            points.append(click[0])
            labels.append(click[1])
            low_res = answer.low_res_logits[None] if settings.feed_mask else None
            answer = self._ask(points, labels, None, low_res, False)
            ious.append(iou(answer.mask, target))
        return first, ious

    def _ask(
        self,
        points: list[Point] | None,
        labels: list[int] | None,
        box: NDArray[np.float64] | None,
        low_res: NDArray[np.float32] | None,
        is_ambiguous: bool,
    ) -> _Answer:
        """The answer that the model itself thinks best."""
        start = time.perf_counter()
        masks, scores, logits = self.predictor.predict(
            point_coords=None if points is None else np.array(points),
            point_labels=None if labels is None else np.array(labels),
            box=box,
            mask_input=low_res,
            multimask_output=is_ambiguous,
        )
        self.prompt_seconds.append(time.perf_counter() - start)
        best = int(np.argmax(scores))
        return _Answer(np.asarray(masks[best], bool), float(scores[best]), logits[best], masks)

    def cost(self) -> Cost:
        return Cost(
            statistics.median(self.encode_seconds) if self.encode_seconds else float("nan"),
            statistics.median(self.prompt_seconds) if self.prompt_seconds else float("nan"),
            _peak_bytes(),
        )


def _box_around(mask: Mask) -> tuple[float, float, float, float]:
    """The tightest box, xyxy."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _peak_bytes() -> int | None:
    """Most memory held: on a GPU by torch there, else by the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024  # macOS counts bytes, Linux kilobytes
