"""How sure a figure is: bootstrap intervals, and a model's own estimate against the truth.

The intervals are percentile bootstrap intervals (Efron, 1979). Here are numbers only: no masks, no
model, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Calibration", "CalibrationBin", "Figure", "bootstrap", "calibrate"]

RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """A mean and its 95 % interval.

    Attributes:
        value: The mean; nan without any number.
        low: Lower end of the interval.
        high: Upper end.
        count: Numbers that went into it.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Sequence[float], groups: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> Figure:
    """The mean of some numbers with its 95 % interval, resampled by group.

    Masks of one picture are alike, so whole pictures are drawn, with replacement.

    Args:
        values: The numbers.
        groups: Of each number, which picture it is from.
        resamples: How often the pictures are drawn.
        seed: Of the draws; the same numbers always give the same interval.

    Returns:
        The mean over all numbers and its percentile interval.

    Raises:
        ValueError: Not one group for each number.
    """
    if len(values) != len(groups):
        raise ValueError(f"wanted a group for each of {len(values)} values; came {len(groups)}")
    if not len(values):
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    numbers = np.asarray(values, np.float64)
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(places, numbers), np.bincount(places)
    draws = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=resamples
    )  # [resamples, pictures]: how often each was drawn
    means = (draws @ sums) / (draws @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(float(numbers.mean()), float(low), float(high), len(numbers))


@dataclass(frozen=True)
class CalibrationBin:
    """Masks whose predicted IoU lies in one range.

    Attributes:
        low: Start of the range; the first one holds everything below, too.
        high: End of the range; the last one holds everything above, too.
        count: Masks in it.
        predicted: Their mean predicted IoU; nan without any.
        true: Their mean true IoU; nan without any.
    """

    low: float
    high: float
    count: int
    predicted: float
    true: float


@dataclass(frozen=True)
class Calibration:
    """How a model's own estimate of its masks' IoU goes with the truth.

    Attributes:
        correlation: Pearson's; nan where one of the two does not vary.
        mean_error: Mean of predicted minus true: above 0 the model thinks too well of itself.
        mean_absolute_error: Mean of their distance.
        bins: By predicted IoU.
    """

    correlation: float
    mean_error: float
    mean_absolute_error: float
    bins: tuple[CalibrationBin, ...]


def calibrate(predicted: Sequence[float], true: Sequence[float], bins: int = 10) -> Calibration:
    """Compare predicted with true IoU.

    Args:
        predicted: Of each mask; unbounded, as the network gives it.
        true: Of each mask, 0..1.
        bins: Ranges of equal width from 0 to 1.

    Returns:
        Correlation, errors and bins; all nan without any mask.

    Raises:
        ValueError: The numbers of both differ.
    """
    if len(predicted) != len(true):
        raise ValueError(f"wanted as many predicted as true; came {len(predicted)} and {len(true)}")
    ours, truth = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    places = np.clip((ours * bins).astype(np.int64), 0, bins - 1)
    rows = []
    for place in range(bins):
        inside = places == place
        rows.append(
            CalibrationBin(
                place / bins,
                (place + 1) / bins,
                int(inside.sum()),
                _mean(ours[inside]),
                _mean(truth[inside]),
            )
        )
    varies = len(ours) > 1 and float(ours.std()) > 0 and float(truth.std()) > 0
    correlation = float(np.corrcoef(ours, truth)[0, 1]) if varies else float("nan")
    return Calibration(correlation, _mean(ours - truth), _mean(np.abs(ours - truth)), tuple(rows))


def _mean(numbers: NDArray[np.float64]) -> float:
    return float(numbers.mean()) if len(numbers) else float("nan")
