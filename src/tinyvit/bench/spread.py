"""The middle of some numbers and how far they lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread"]


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of some numbers."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """The spread of some numbers.

        Raises:
            ValueError: There are none.

        Example:
            >>> Spread.of([1.0, 2.0, 3.0, 4.0, 50.0])
            Spread(median=3.0, lower=2.0, upper=4.0)
        """
        if not numbers:
            raise ValueError("a spread wants at least one number, got none")
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, lower, upper)

    @property
    def relative(self) -> float:
        """The distance of the quartiles, as a share of the median."""
        return (self.upper - self.lower) / self.median if self.median else 0.0
