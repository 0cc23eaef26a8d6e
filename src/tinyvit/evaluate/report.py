"""What the evaluation of a segmenter found, as values: JSON for programs, a table for people.

Knows no model and no picture; ``segment.py`` fills it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from .certainty import Calibration, Figure, bootstrap, calibrate

__all__ = ["COLUMNS", "Case", "Cost", "SegmentReport", "summarise"]

COLUMNS = ("measure", "model", "95 % interval", "floors")
"""Headings of ``SegmentReport.rows``."""

_DASH = "-"


@dataclass(frozen=True)
class Case:
    """What became of one mask of the data set.

    Attributes:
        picture: Name of the picture.
        number: Which of the picture's masks, from 0.
        label: What it is called; empty where nothing is known.
        area: Its share of the picture.
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

    picture: str
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
        encode_seconds: Median time to encode a picture.
        prompt_seconds: Median time to answer one prompt on an encoded picture.
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
        pictures: That were measured.
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
    pictures: int
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
        return json.dumps(_plain(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)

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
        rows.append(("encode a picture", _time(self.cost.encode_seconds), _DASH, _DASH))
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
    pictures: int,
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
        pictures: That were measured.
        left_out: What was not, and why.
        cases: Every mask, at least one.
        groups: Of each case, which picture it is from: pictures are resampled, not masks.
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
        pictures=pictures,
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


def _plain(value: object) -> object:
    """Ready for JSON, which has no word for nan."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
