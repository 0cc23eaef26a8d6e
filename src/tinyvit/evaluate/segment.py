"""The best and the worst answers to one click, as one image to look at.

Each cell shows an image with what the model found (filled), the truth (white line) and the click,
and below it the IoU. Only the cells that can still be shown are held, in the size of a cell.

Shapes: H W an image.
"""

from __future__ import annotations

import json
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
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tinyvit.errors import ImageError
from tinyvit.images.draw import draw_masks, draw_points, save_png
from tinyvit.sam.build import build_sam
from tinyvit.sam.model import Sam
from tinyvit.sam.predictor import SamPredictor

from .baselines import box_floors, click_floors
from .metrics import (
    Calibration,
    Figure,
    Mask,
    Point,
    as_json,
    bootstrap,
    boundary_f,
    calibrate,
    iou,
    most_interior_point,
    next_click,
)

pass


RGB = NDArray[np.uint8]
Colour = tuple[int, int, int]

CELL_WIDTH, CELL_HEIGHT, GAP, MARGIN = 400, 300, 20, 36  # pixels
CAPTION, HEADING, TITLE = 46, 52, 64  # pixels high
PAPER, GROUND, INK, FAINT = (255, 255, 255), (240, 241, 244), (28, 32, 40), (118, 124, 136)
FOUND: Colour = (38, 110, 255)
TRUTH: Colour = (255, 255, 255)
STRENGTH = 0.5
SHEET_COLUMNS = 4


@dataclass(frozen=True)
class _Cell:
    iou: float
    order: int
    image: RGB
    words: str


class ContactSheet:
    """Collects answers; pass it to ``evaluate_segment`` as ``watch``.

    Args:
        count: How many of the best and how many of the worst are shown.

    Raises:
        ValueError: ``count`` is below 1.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, but is {count}")
        self.count = count
        self._seen = 0
        self._best: list[_Cell] = []
        self._worst: list[_Cell] = []

    def __call__(self, shown: Shown) -> None:
        """Look at one answer, and keep it if it is among the best or the worst so far."""
        iou = shown.case.click_ious[0]
        is_good = len(self._best) < self.count or iou > self._best[-1].iou
        is_bad = len(self._worst) < self.count or iou < self._worst[-1].iou
        self._seen += 1
        if not (is_good or is_bad):
            return
        words = shown.case.label or shown.case.image
        cell = _Cell(iou, self._seen, _draw(shown), words)
        if is_good:
            self._best.append(cell)
            self._best.sort(key=lambda one: (-one.iou, one.order))
            del self._best[self.count :]
        if is_bad:
            self._worst.append(cell)
            self._worst.sort(key=lambda one: (one.iou, one.order))
            del self._worst[self.count :]

    def draw(self, title: str = "One click") -> RGB:
        """The sheet; an answer is never shown twice.

        Args:
            title: The line at its top.

        Returns:
            RGB [H, W, 3] uint8.

        Raises:
            ValueError: Nothing was collected.
        """
        if not self._best:
            raise ValueError("there is nothing to show: no answer was collected")
        half = max(1, min(self.count, (self._seen + 1) // 2))
        best = self._best[:half]
        shown = {cell.order for cell in best}
        worst = [cell for cell in self._worst if cell.order not in shown]
        parts = [(name, cells) for name, cells in (("Best", best), ("Worst", worst)) if cells]
        columns = min(SHEET_COLUMNS, max(len(cells) for _, cells in parts))
        width = 2 * MARGIN + columns * CELL_WIDTH + (columns - 1) * GAP
        row = CELL_HEIGHT + CAPTION + GAP
        rows = sum(-(-len(cells) // columns) for _, cells in parts)
        height = MARGIN + TITLE + len(parts) * HEADING + rows * row + MARGIN - GAP
        sheet = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(sheet)
        _write(pen, (MARGIN, MARGIN), title, 30, INK)
        legend = "filled: found     white line: truth     dot: the click"
        right = width - MARGIN - pen.textlength(legend, font=ImageFont.load_default(size=16))
        if right > MARGIN + pen.textlength(title, font=ImageFont.load_default(size=30)) + GAP:
            _write(pen, (right, MARGIN + 13), legend, 16, FAINT)
        top = MARGIN + TITLE
        for name, cells in parts:
            pen.line((MARGIN, top, width - MARGIN, top), fill=GROUND, width=2)
            _write(pen, (MARGIN, top + 14), name, 22, INK)
            top += HEADING
            for place, cell in enumerate(cells):
                line, column = divmod(place, columns)
                _place(sheet, pen, cell, MARGIN + column * (CELL_WIDTH + GAP), top + line * row)
            top += -(-len(cells) // columns) * row
        return np.array(sheet)

    def save(self, path: str | os.PathLike[str], title: str = "One click") -> None:
        """Write the sheet as a PNG, whole or not at all.

        Raises:
            ValueError: Nothing was collected.
            OSError: The file cannot be written.
        """
        save_png(path, self.draw(title))


def _draw(shown: Shown) -> RGB:
    """One answer, in the size of a cell or smaller."""
    height, width = shown.image.shape[:2]
    scale = min(CELL_WIDTH / width, CELL_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.array(Image.fromarray(shown.image).resize(size, Image.Resampling.LANCZOS))
    drawn = draw_masks(small, [_shrunk(shown.predicted, size)], [FOUND], STRENGTH, outlines=False)
    target = _shrunk(shown.target, size)
    grown = np.asarray(Image.fromarray(target).convert("L").filter(ImageFilter.MaxFilter(3))) > 127
    drawn = draw_masks(drawn, [grown], [INK], 0.0)  # or the line would vanish on white
    drawn = draw_masks(drawn, [target], [TRUTH], 0.0)
    return draw_points(drawn, [[shown.point[0] * scale, shown.point[1] * scale]], [1])


def _shrunk(mask: Mask, size: tuple[int, int]) -> Mask:
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(grey.resize(size, Image.Resampling.BILINEAR)) > 127


def _place(sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: _Cell, left: int, top: int) -> None:
    """A cell on its ground, its caption below."""
    pen.rectangle((left, top, left + CELL_WIDTH - 1, top + CELL_HEIGHT - 1), fill=GROUND)
    height, width = cell.image.shape[:2]
    corner = left + (CELL_WIDTH - width) // 2, top + (CELL_HEIGHT - height) // 2
    sheet.paste(Image.fromarray(cell.image), corner)
    number = f"{cell.iou:.2f}"
    _write(pen, (left, top + CELL_HEIGHT + 8), number, 20, INK)
    after = left + pen.textlength(number, font=ImageFont.load_default(size=20)) + 12
    words, font = cell.words, ImageFont.load_default(size=16)
    while words and after + pen.textlength(words, font=font) > left + CELL_WIDTH:
        words = words[:-2].rstrip("…") + "…" if len(words) > 2 else ""
    _write(pen, (after, top + CELL_HEIGHT + 11), words, 16, FAINT)


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: Colour
) -> None:
    pen.text(place, text, fill=colour, font=ImageFont.load_default(size=size))


COLUMNS = ("measure", "model", "95 % interval", "floors")
"""Headings of ``SegmentReport.rows``."""

_DASH = "-"


@dataclass(frozen=True)
class Case:
    """What became of one mask of the data set.

    Attributes:
        image: Name of the image.
        number: Which of the image's masks, from 0.
        label: What it is called; empty where nothing is known.
        area: Its share of the image.
        click_ious: IoU after 1, 2, 3, ... clicks, as far as it went on.
        best_of_three: IoU of the best of the three masks that the first click gives.
        click_boundary_f: Boundary F after one click.
        click_predicted_iou: The model's own estimate after one click.
        box_iou: IoU with the box around the mask.
        box_boundary_f: Boundary F with the box.
        box_predicted_iou: The model's own estimate with the box.
        click_floors: IoU of each floor from the first click.
        box_floors: IoU of each floor from the box.
    """

    image: str
    number: int
    label: str
    area: float
    click_ious: tuple[float, ...]
    best_of_three: float
    click_boundary_f: float
    click_predicted_iou: float
    box_iou: float
    box_boundary_f: float
    box_predicted_iou: float
    click_floors: Mapping[str, float]
    box_floors: Mapping[str, float]


@dataclass(frozen=True)
class Cost:
    """What it took.

    Attributes:
        encode_seconds: Median time to encode an image.
        prompt_seconds: Median time to answer one prompt on an encoded image.
        peak_bytes: Most memory that the process has held so far, everything in it included; on a
            GPU the most that torch has held there. None where the system does not say.
    """

    encode_seconds: float
    prompt_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class SegmentReport:
    """How well a model segments by prompts.

    Attributes:
        model: What was measured.
        data: On what.
        images: That were measured.
        masks: That were measured.
        left_out: What was not, and why.
        ious: Mean IoU by kind of prompt: "1 click", "3 clicks", ..., "box", and "1 click, best of
            three masks", which a person would have to choose.
        boundary_fs: Mean boundary F: "1 click", "box".
        floors: Mean IoU without a network, by kind of prompt and name.
        target_iou: What ``clicks_to_target`` counts to.
        clicks_to_target: Mean number of clicks until that IoU; masks that never got there count
            with ``most_clicks``, so the true mean is higher.
        most_clicks: Where counting stops.
        missed_target: Share of the masks that never got there.
        calibrations: Predicted against true IoU: "1 click", "box".
        cost: Time and memory.
        cases: Every mask.
    """

    model: str
    data: str
    images: int
    masks: int
    left_out: tuple[str, ...]
    ious: Mapping[str, Figure]
    boundary_fs: Mapping[str, Figure]
    floors: Mapping[str, Mapping[str, Figure]]
    target_iou: float
    clicks_to_target: Figure
    most_clicks: int
    missed_target: float
    calibrations: Mapping[str, Calibration]
    cost: Cost
    cases: tuple[Case, ...]

    def to_json(self) -> str:
        """Everything, as JSON; numbers that there are none of are null."""
        return json.dumps(as_json(self), indent=2, ensure_ascii=False, allow_nan=False)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Lines of a table under ``COLUMNS``."""
        rows = [
            (f"mean IoU, {prompt}", *_shown(figure), self._floors_of(prompt))
            for prompt, figure in self.ious.items()
        ]
        rows += [
            (f"boundary F, {prompt}", *_shown(figure), _DASH)
            for prompt, figure in self.boundary_fs.items()
        ]
        clicks = self.clicks_to_target
        rows.append(
            (
                f"clicks to IoU {self.target_iou:g} (at most {self.most_clicks})",
                f"{clicks.value:.2f}",
                f"{clicks.low:.2f} to {clicks.high:.2f}",
                _DASH,
            )
        )
        rows.append(("never reached it", f"{100 * self.missed_target:.0f} %", _DASH, _DASH))
        for prompt, found in self.calibrations.items():
            rows += [
                (f"predicted IoU, {prompt}: correlation", f"{found.correlation:.2f}", _DASH, _DASH),
                (f"predicted IoU, {prompt}: mean error", f"{found.mean_error:+.3f}", _DASH, _DASH),
            ]
        rows.append(("encode an image", _time(self.cost.encode_seconds), _DASH, _DASH))
        rows.append(("answer a prompt", _time(self.cost.prompt_seconds), _DASH, _DASH))
        if self.cost.peak_bytes is not None:
            rows.append(("peak memory", f"{self.cost.peak_bytes / 2**20:.0f} MiB", _DASH, _DASH))
        return rows

    def _floors_of(self, prompt: str) -> str:
        floors = self.floors.get(prompt, {})
        return ", ".join(f"{name} {figure.value:.3f}" for name, figure in floors.items()) or _DASH


def summarise(
    model: str,
    data: str,
    images: int,
    left_out: Sequence[str],
    cases: Sequence[Case],
    groups: Sequence[int],
    cost: Cost,
    *,
    clicks: Sequence[int],
    target_iou: float,
    most_clicks: int,
) -> SegmentReport:
    """Means, intervals and calibration of cases.

    Args:
        model: What was measured.
        data: On what.
        images: That were measured.
        left_out: What was not, and why.
        cases: Every mask, at least one.
        groups: Of each case, which image it is from: images are resampled, not masks.
        cost: Time and memory.
        clicks: Numbers of clicks whose mean IoU is wanted.
        target_iou: Clicks are counted until this IoU.
        most_clicks: Where counting stopped.

    Returns:
        The report.
    """

    def mean(values: Iterable[float]) -> Figure:
        return bootstrap(list(values), groups)

    one = _clicks(1)
    ious = {_clicks(n): mean(case.click_ious[n - 1] for case in cases) for n in clicks}
    ious[f"{one}, best of three masks"] = mean(case.best_of_three for case in cases)
    ious["box"] = mean(case.box_iou for case in cases)
    floors = {
        one: {name: mean(c.click_floors[name] for c in cases) for name in cases[0].click_floors},
        "box": {name: mean(c.box_floors[name] for c in cases) for name in cases[0].box_floors},
    }
    needed = [_clicks_needed(case.click_ious, target_iou) for case in cases]
    return SegmentReport(
        model=model,
        data=data,
        images=images,
        masks=len(cases),
        left_out=tuple(left_out),
        ious=ious,
        boundary_fs={
            one: mean(case.click_boundary_f for case in cases),
            "box": mean(case.box_boundary_f for case in cases),
        },
        floors=floors,
        target_iou=target_iou,
        clicks_to_target=mean(most_clicks if n is None else n for n in needed),
        most_clicks=most_clicks,
        missed_target=sum(n is None for n in needed) / len(needed),
        calibrations={
            one: calibrate(
                [case.click_predicted_iou for case in cases], [c.click_ious[0] for c in cases]
            ),
            "box": calibrate(
                [case.box_predicted_iou for case in cases], [case.box_iou for case in cases]
            ),
        },
        cost=cost,
        cases=tuple(cases),
    )


def _clicks(number: int) -> str:
    return f"{number} click" if number == 1 else f"{number} clicks"


def _clicks_needed(ious: Sequence[float], target: float) -> int | None:
    return next((count for count, iou in enumerate(ious, 1) if iou >= target), None)


def _shown(figure: Figure) -> tuple[str, str]:
    return f"{figure.value:.3f}", f"{figure.low:.3f} to {figure.high:.3f}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


class LabelledImage(Protocol):
    """An image and its masks, wherever they come from; ``tinyvit.train.Scene`` is one."""

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
    """What is measured: ``SamPredictor`` is such, fast or not."""

    def set_image(self, image: RGB) -> None:
        """Encode an image."""
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
    images: Iterable[LabelledImage],
    settings: MeasureSettings | None = None,
    *,
    name: str | None = None,
    data: str = "",
    faults: Sequence[str] = (),
    watch: Callable[[Shown], None] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> SegmentReport:
    """Measure a model on images with masks.

    Args:
        model: A ``Sam``, a predictor, or the name or path of a checkpoint that holds a whole SAM.
        images: Such as a ``MaskSet``; broken ones are left out and named in the report.
        settings: How; None takes the defaults.
        name: What to call the model in the report; None takes the checkpoint's name.
        data: What to call the images.
        faults: What was left out already, for the report.
        watch: Called with each answer to one click, say by a ``ContactSheet``.
        progress: Called with (images done, all or None).

    Returns:
        The report.

    Raises:
        ValueError: There is not one good mask.
        CheckpointError: The checkpoint cannot be read, or holds no whole SAM.
    """
    settings = settings or MeasureSettings()
    called = name or (str(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__)
    asker = _Asker(_predictor(model), settings)
    total = len(images) if isinstance(images, Sequence) else None
    left_out = list(faults)
    cases: list[Case] = []
    groups: list[int] = []
    used = 0
    for number, image in enumerate(images):
        rest = None if settings.most_masks is None else settings.most_masks - len(cases)
        if rest is not None and rest <= 0:
            break
        try:
            rgb, masks = image.load()
        except (ImageError, ValueError) as err:
            left_out.append(f"{image.name}: {err}")
            continue
        found = list(islice(asker.measure(image, rgb, masks, watch, left_out), rest))
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
        image: LabelledImage,
        rgb: RGB,
        masks: NDArray[np.bool_],
        watch: Callable[[Shown], None] | None,
        left_out: list[str],
    ) -> Iterable[Case]:
        """The cases of one image, encoded once."""
        start = time.perf_counter()
        self.predictor.set_image(rgb)
        self.encode_seconds.append(time.perf_counter() - start)
        labels = image.labels
        for number, target in enumerate(masks):
            if not target.any():
                left_out.append(f"{image.name}, mask {number}: the mask is empty")
                continue
            label = labels[number] if number < len(labels) else ""
            shown = self._case(image.name, number, label, rgb, target)
            if watch is not None:
                watch(shown)
            yield shown.case

    def _case(self, image: str, number: int, label: str, rgb: RGB, target: Mask) -> Shown:
        point = most_interior_point(target)
        box = _box_around(target)
        first, ious = self._click(point, target)
        boxed = self._ask(None, None, np.array(box), None, False)
        floors: tuple[Mapping[str, float], Mapping[str, float]] = {}, {}
        if self.settings.with_floors:
            floors = (
                {name: iou(f(rgb, point), target) for name, f in click_floors().items()},
                {name: iou(f(rgb, box), target) for name, f in box_floors().items()},
            )
        case = Case(
            image=image,
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
        return Shown(case, rgb, target, first.mask, point)

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
