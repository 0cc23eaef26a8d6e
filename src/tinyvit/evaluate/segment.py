"""How well a SAM segments by prompts: IoU by clicks and boxes, boundary F, calibration, cost.

A mask is asked for as a person would: by the most interior point, then by the click that corrects
the largest error, and by its box. ``evaluate_segment`` gives a ``SegmentReport``; ``Gallery`` draws
the best and the worst predictions.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from tinyvit.allocator import peak_memory
from tinyvit.errors import ImageError
from tinyvit.images import draw
from tinyvit.images.draw import RGB
from tinyvit.images.mask_ops import box_around
from tinyvit.sam.model import Sam, build_sam
from tinyvit.sam.predictor import SamPredictor

from .metrics import (
    Calibration,
    Figure,
    Mask,
    Point,
    as_json,
    baselines,
    bootstrap,
    boundary_f,
    calibrate,
    iou,
    most_interior_point,
    next_click,
)

COLUMNS = ("metric", "model", "95 % interval", "baselines")
"""Headings of ``SegmentReport.rows``."""

_DASH = "-"


@dataclass(frozen=True)
class Case:
    """What became of one mask of the data set; estimates are the model's own."""

    image: str  # its name
    number: int  # which of the image's masks, from 0
    label: str  # what it is called; empty where nothing is known
    area: float  # its share of the image
    click_ious: tuple[float, ...]  # IoU after 1, 2, 3, ... clicks, as far as it went on
    best_of_three: float  # IoU of the best of the three masks that the first click gives
    click_boundary_f: float  # after one click
    click_predicted_iou: float  # estimate after one click
    box_iou: float  # with the box around the mask
    box_boundary_f: float
    box_predicted_iou: float
    click_baselines: Mapping[str, float]  # IoU of each baseline from the first click
    box_baselines: Mapping[str, float]  # and from the box


@dataclass(frozen=True)
class Cost:
    """Time and memory."""

    encode_seconds: float  # median time to encode an image
    prompt_seconds: float  # median time of one prompt on an encoded image
    # most memory that the process has held so far, everything in it included; on a GPU the most
    # that torch has held there. None where the system does not say.
    peak_bytes: int | None


@dataclass(frozen=True)
class SegmentReport:
    """How well a model segments by prompts; metrics by kind of prompt.

    These are "1 click", "3 clicks", ..., "box", and for IoU "1 click, best of three masks", which a
    person would have to choose.
    """

    model: str  # what was evaluated
    data: str  # on what
    images: int  # that were evaluated
    masks: int  # that were evaluated
    skipped: tuple[str, ...]  # what was not, and why
    ious: Mapping[str, Figure]  # mean IoU
    boundary_fs: Mapping[str, Figure]  # mean boundary F
    baselines: Mapping[str, Mapping[str, Figure]]  # mean IoU without a network, also by name
    target_iou: float  # what ``clicks_to_target`` counts to
    # mean number of clicks until that IoU; masks that never got there count with ``most_clicks``,
    # so the true mean is higher
    clicks_to_target: Figure
    most_clicks: int  # where counting stops
    missed_target: float  # share of the masks that never got there
    calibrations: Mapping[str, Calibration]  # predicted against true IoU
    cost: Cost  # time and memory
    cases: tuple[Case, ...]  # every mask

    def to_json(self) -> str:
        """Everything, as JSON; numbers that there are none of are null."""
        return json.dumps(as_json(self), indent=2, ensure_ascii=False, allow_nan=False)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Lines of a table under ``COLUMNS``."""
        clicks = self.clicks_to_target
        target = f"clicks to IoU {self.target_iou:g} (at most {self.most_clicks})"
        rows = [
            *((f"mean IoU, {k}", *_shown(v), self._baselines_of(k)) for k, v in self.ious.items()),
            *((f"boundary F, {k}", *_shown(v), _DASH) for k, v in self.boundary_fs.items()),
            (target, f"{clicks.value:.2f}", f"{clicks.low:.2f} to {clicks.high:.2f}", _DASH),
        ]
        single = [("never reached it", f"{100 * self.missed_target:.0f} %")]
        for prompt, found in self.calibrations.items():
            what = f"predicted IoU, {prompt}"
            single.append((f"{what}: correlation", f"{found.correlation:.2f}"))
            single.append((f"{what}: mean error", f"{found.mean_error:+.3f}"))
        single.append(("encode an image", f"{1000 * self.cost.encode_seconds:.1f} ms"))
        single.append(("predict for a prompt", f"{1000 * self.cost.prompt_seconds:.1f} ms"))
        if self.cost.peak_bytes is not None:
            single.append(("peak memory", f"{self.cost.peak_bytes / 2**20:.0f} MiB"))
        return rows + [(name, value, _DASH, _DASH) for name, value in single]

    def _baselines_of(self, prompt: str) -> str:
        found = self.baselines.get(prompt, {}).items()
        return ", ".join(f"{name} {figure.value:.3f}" for name, figure in found) or _DASH


def summarise(
    model: str,
    data: str,
    images: int,
    skipped: Sequence[str],
    cases: Sequence[Case],
    groups: Sequence[int],
    cost: Cost,
    settings: EvaluateSettings,
) -> SegmentReport:
    """Means, intervals and calibration of cases; ``groups`` are their images, for resampling."""

    def mean(values: Iterable[float]) -> Figure:
        return bootstrap(list(values), groups)

    one, first = _clicks(1), cases[0]
    ious = {_clicks(n): mean(case.click_ious[n - 1] for case in cases) for n in settings.clicks}
    ious[f"{one}, best of three masks"] = mean(case.best_of_three for case in cases)
    ious["box"] = mean(case.box_iou for case in cases)
    target, most = settings.target_iou, settings.most_clicks
    needed = [
        next((n for n, iou in enumerate(case.click_ious, 1) if iou >= target), None)
        for case in cases
    ]
    return SegmentReport(
        model=model,
        data=data,
        images=images,
        masks=len(cases),
        skipped=tuple(skipped),
        ious=ious,
        boundary_fs={
            one: mean(case.click_boundary_f for case in cases),
            "box": mean(case.box_boundary_f for case in cases),
        },
        baselines={
            one: {k: mean(c.click_baselines[k] for c in cases) for k in first.click_baselines},
            "box": {k: mean(c.box_baselines[k] for c in cases) for k in first.box_baselines},
        },
        target_iou=target,
        clicks_to_target=mean(most if n is None else n for n in needed),
        most_clicks=most,
        missed_target=sum(n is None for n in needed) / len(needed),
        calibrations={
            one: calibrate(
                [c.click_predicted_iou for c in cases], [c.click_ious[0] for c in cases]
            ),
            "box": calibrate([c.box_predicted_iou for c in cases], [c.box_iou for c in cases]),
        },
        cost=cost,
        cases=tuple(cases),
    )


def _clicks(number: int) -> str:
    return f"{number} click" if number == 1 else f"{number} clicks"


def _shown(figure: Figure) -> tuple[str, str]:
    return f"{figure.value:.3f}", f"{figure.low:.3f} to {figure.high:.3f}"


class LabelledImage(Protocol):
    """An image and its masks, wherever they come from; such as a ``MaskSample``."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def labels(self) -> tuple[str, ...]:
        """What each object is called."""

    def load(self) -> tuple[RGB, NDArray[np.bool_]]:
        """(RGB [H, W, 3] uint8, masks [N, H, W] bool)."""


class Predictor(Protocol):
    """What is evaluated: the two methods of ``SamPredictor`` that matter."""

    def set_image(self, image: RGB) -> None: ...  # noqa: D102

    def predict(
        self, *args: Any, **prompt: Any
    ) -> tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.float32]]:
        """(masks [K, H, W] bool, predicted IoU [K], low-res logits [K, h4, w4])."""


Model: TypeAlias = "Sam | Predictor | str | os.PathLike[str]"


@dataclass(frozen=True)
class EvaluateSettings:
    """How to evaluate."""

    clicks: tuple[int, ...] = (1, 3, 5)  # numbers of clicks whose mean IoU is wanted
    target_iou: float = 0.85  # clicks are counted until this IoU
    most_clicks: int = 10  # where counting stops; at least the most of ``clicks``
    feed_mask: bool = True  # give the model its last prediction together with the further clicks
    with_baselines: bool = True
    most_masks: int | None = None  # stop after so many; None takes all

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
class Prediction:
    """The prediction for one click, for whoever wants to draw it."""

    case: Case  # its metrics
    image: RGB  # RGB [H, W, 3] uint8
    target: Mask  # [H, W] bool
    predicted: Mask  # [H, W] bool, after one click
    point: Point  # (x, y) of the click


def evaluate_segment(
    model: Model,
    images: Iterable[LabelledImage],
    settings: EvaluateSettings | None = None,
    *,
    name: str | None = None,
    data: str = "",
    faults: Sequence[str] = (),
    watch: Callable[[Prediction], None] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> SegmentReport:
    """Evaluate a model on images with masks.

    Args:
        model: A ``Sam``, a predictor, or the name or path of a checkpoint that holds a whole SAM.
        images: Such as a ``MaskSet``; unreadable ones are skipped and named in the report.
        settings: How; None takes the defaults.
        name: What to call the model in the report; None takes the checkpoint's name.
        data: What to call the images.
        faults: What was skipped already, for the report.
        watch: Called with each prediction for one click; such as a ``Gallery``.
        progress: Called with (images done, all or None).

    Returns:
        The report.

    Raises:
        ValueError: There is not one good mask.
        CheckpointError: The checkpoint cannot be read, or holds no whole SAM.
    """
    settings = settings or EvaluateSettings()
    called = name or (str(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__)
    loaded = build_sam(model) if isinstance(model, (str, os.PathLike)) else model
    asked = Timed(SamPredictor(loaded) if isinstance(loaded, Sam) else loaded)
    total = len(images) if isinstance(images, Sized) else None
    skipped = list(faults)
    cases: list[Case] = []
    groups: list[int] = []
    for number, image in enumerate(images):
        rest = None if settings.most_masks is None else settings.most_masks - len(cases)
        if rest is not None and rest <= 0:
            break
        try:
            rgb, masks = image.load()
        except (ImageError, ValueError) as err:
            skipped.append(f"{image.name}: {err}")
            continue
        asked.encode(rgb)
        for prediction in islice(_predictions(asked, settings, image, rgb, masks, skipped), rest):
            if watch is not None:
                watch(prediction)
            cases.append(prediction.case)
            groups.append(number)
        if progress is not None:
            progress(number + 1, total)
    if not cases:
        reasons = f": {'; '.join(skipped[:5])}" if skipped else ""
        raise ValueError(f"there is not one good mask to evaluate on{reasons}")
    peak = peak_memory("cuda" if torch.cuda.max_memory_allocated() else "cpu")
    cost = Cost(*asked.medians(), peak)
    return summarise(called, data, len(set(groups)), skipped, cases, groups, cost, settings)


class Answer(NamedTuple):
    """The mask of the highest predicted IoU, and all that were predicted."""

    mask: Mask
    predicted_iou: float
    low_res_logits: NDArray[np.float32]
    all_masks: NDArray[np.generic]


class Timed:
    """A predictor, and the time that it takes."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.encode_seconds: list[float] = []
        self.prompt_seconds: list[float] = []

    def encode(self, image: RGB) -> None:
        """Set the image [H, W, 3] uint8."""
        start = time.perf_counter()
        self.predictor.set_image(image)
        self.encode_seconds.append(time.perf_counter() - start)

    def predict(
        self,
        points: Sequence[Point] | None,
        labels: Sequence[int] | None = None,
        box: Sequence[float] | None = None,
        low_res: NDArray[np.float32] | None = None,
        is_ambiguous: bool = True,
    ) -> Answer:
        """Predict for one prompt."""
        start = time.perf_counter()
        masks, scores, logits = self.predictor.predict(
            point_coords=None if points is None else np.array(points),
            point_labels=None if labels is None else np.array(labels),
            box=None if box is None else np.array(box),
            mask_input=low_res,
            multimask_output=is_ambiguous,
        )
        self.prompt_seconds.append(time.perf_counter() - start)
        best = int(np.argmax(scores))
        return Answer(np.asarray(masks[best], bool), float(scores[best]), logits[best], masks)

    def medians(self) -> tuple[float, float]:
        """Seconds to encode an image, and to predict for a prompt."""
        return statistics.median(self.encode_seconds), statistics.median(self.prompt_seconds)


def _predictions(
    asked: Timed,
    settings: EvaluateSettings,
    image: LabelledImage,
    rgb: RGB,
    masks: NDArray[np.bool_],
    skipped: list[str],
) -> Iterator[Prediction]:
    """What is predicted for each mask of one image, which has been encoded."""
    labels = image.labels
    for number, target in enumerate(masks):
        if not target.any():
            skipped.append(f"{image.name}, mask {number}: the mask is empty")
            continue
        point = most_interior_point(target)
        x0, y0, x1, y1 = map(float, box_around(target))
        box = x0, y0, x1, y1
        first, ious = _click(asked, settings, point, target)
        boxed = asked.predict(None, box=box, is_ambiguous=False)
        by_click, by_box = {}, {}
        if settings.with_baselines:
            by_click = {k: iou(mask, target) for k, mask in baselines(rgb, point=point).items()}
            by_box = {k: iou(mask, target) for k, mask in baselines(rgb, box=box).items()}
        case = Case(
            image=image.name,
            number=number,
            label=labels[number] if number < len(labels) else "",
            area=float(target.mean()),
            click_ious=tuple(ious),
            best_of_three=max(iou(np.asarray(mask, bool), target) for mask in first.all_masks),
            click_boundary_f=boundary_f(first.mask, target),
            click_predicted_iou=first.predicted_iou,
            box_iou=iou(boxed.mask, target),
            box_boundary_f=boundary_f(boxed.mask, target),
            box_predicted_iou=boxed.predicted_iou,
            click_baselines=by_click,
            box_baselines=by_box,
        )
        yield Prediction(case, rgb, target, first.mask, point)


def _click(
    asked: Timed, settings: EvaluateSettings, point: Point, target: Mask
) -> tuple[Answer, list[float]]:
    """The answer to the first click, and the IoU after each."""
    points, labels = [point], [1]
    first = best = asked.predict(points, labels)
    ious = [iou(best.mask, target)]
    while len(ious) < settings.most_clicks:
        if len(ious) >= max(settings.clicks) and max(ious) >= settings.target_iou:
            break
        click = next_click(best.mask, target)
        if click is None:  # nothing left to correct
            ious.append(ious[-1])
            continue
        points.append(click[0])
        labels.append(click[1])
        low_res = best.low_res_logits[None] if settings.feed_mask else None
        best = asked.predict(points, labels, None, low_res, False)
        ious.append(iou(best.mask, target))
    return first, ious


FOUND, TRUTH = (38, 110, 255), (255, 255, 255)
LEGEND = "filled: found, white line: truth, dot: the click"
STRENGTH = 0.5


class Gallery:
    """Collects the best and the worst predictions; pass it to ``evaluate_segment`` as ``watch``.

    Each cell shows an image with what the model found (filled), the truth (white line) and the
    click, and below it the IoU. Only the ``count`` best and worst are held, in the size of a cell.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, but is {count}")
        self.count = count
        # (-IoU, order, panel, caption), best first
        self._kept: list[tuple[float, int, RGB, str]] = []
        self._seen = 0

    def __call__(self, prediction: Prediction) -> None:
        """Keep a prediction if it is among the best or the worst so far."""
        self._seen += 1
        rank, is_full = -prediction.case.click_ious[0], len(self._kept) == 2 * self.count
        if is_full and self._kept[self.count - 1][0] <= rank <= self._kept[self.count][0]:
            return
        self._kept.append((rank, self._seen, *_cell(prediction)))
        self._kept.sort(key=lambda one: one[:2])
        if is_full:
            del self._kept[self.count]

    def draw(self, title: str = "One click") -> RGB:
        """The gallery as RGB [H, W, 3] uint8; a prediction is never shown twice."""
        if not self._kept:
            raise ValueError("there is nothing to show: no prediction was collected")
        half = (len(self._kept) + 1) // 2
        parts = (("Best", self._kept[:half]), ("Worst", self._kept[half:][::-1]))
        sections = [(name, [cell[2:] for cell in kept]) for name, kept in parts if kept]
        return draw.gallery(sections, f"{title} ({LEGEND})")

    def save(self, path: str | os.PathLike[str], title: str = "One click") -> None:
        """Write the gallery as a PNG, whole or not at all."""
        draw.save_png(path, self.draw(title))


def _cell(shown: Prediction) -> tuple[RGB, str]:
    """One prediction as a panel, and its caption."""
    small = draw.panel(shown.image)
    target = _shrunk(shown.target, small)
    grown = np.asarray(Image.fromarray(target).convert("L").filter(ImageFilter.MaxFilter(3))) > 127
    found = [_shrunk(shown.predicted, small)]
    drawn = draw.draw_masks(small, found, [FOUND], STRENGTH, outlines=False)
    drawn = draw.draw_masks(drawn, [grown], [draw.INK], 0.0)  # or the line would vanish on white
    drawn = draw.draw_masks(drawn, [target], [TRUTH], 0.0)
    scale, case = small.shape[1] / shown.image.shape[1], shown.case
    drawn = draw.draw_points(drawn, [[shown.point[0] * scale, shown.point[1] * scale]], [1])
    return drawn, f"IoU {case.click_ious[0]:.2f}\n{case.label or case.image}"


def _shrunk(mask: Mask, like: RGB) -> Mask:
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(grey.resize(like.shape[1::-1], Image.Resampling.BILINEAR)) > 127
