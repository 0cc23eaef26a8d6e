"""What a run counts along the way and must not lose in a stop: plain numbers, fit for JSON.

No tensor and no file is known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .task import Goal

__all__ = ["Tally"]


@dataclass
class Tally:
    """The counts of a run.

    Attributes:
        step: Steps done.
        best: The best value of the task's figure.
        best_step: The step it was measured after.
        figures: Of the last validation.
        sums: Sums of the steps' figures since the last line of the log.
        counts: Steps in each of these sums.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, figures: Mapping[str, float]) -> None:
        """Take a step's figures into the next means; not every step must have the same ones."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def take(self, figures: Mapping[str, float], goal: Goal) -> bool:
        """Take the figures of a validation.

        Args:
            figures: By name; none at all where nothing was held out.
            goal: The figure that decides, and which way it is better.

        Returns:
            Whether it is better than ever; what is no number never is.

        Raises:
            ValueError: There are figures, and the deciding one is not among them.
        """
        self.figures = dict(figures)
        name, way = goal
        if not figures:
            return False
        if name not in figures:
            raise ValueError(
                f"the goal of this task is {name!r}, but its validation gives {', '.join(figures)}"
            )
        value = figures[name]
        if self.best is not None:
            is_better = value > self.best if way == "max" else value < self.best
        else:
            is_better = not math.isnan(value)
        if is_better:
            self.best, self.best_step = value, self.step
        return is_better
