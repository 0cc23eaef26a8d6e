"""Figures of a classifier from its answers: hits, their interval, calibration, confusion.

The calibration error is that of Guo et al., 2017 (arXiv 1706.04599), with bins of equal width; the
intervals are percentiles of the bootstrap (Efron, 1979) over pictures. Numbers in, numbers out: no
model, no pictures, no files.

Letters: N pictures, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .certainty import RESAMPLES, Figure

__all__ = ["ClassConfusion", "calibration_error", "confusions", "hits_in_top", "share_of_hits"]

BINS = 15
_NAMED = 3


@dataclass(frozen=True)
class ClassConfusion:
    """A class that is taken for others.

    Attributes:
        name: The class.
        pictures: How many pictures it has.
        accuracy: Part of them that is found.
        taken_for: (other class, how often), the most frequent first.
    """

    name: str
    pictures: int
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
    """The part of hits and its 95 % interval over the choice of pictures.

    Drawing N pictures of which a part p are hits gives a binomial number of hits, so the bootstrap
    is drawn from that distribution at once.

    Args:
        hits: [N].
        resamples: How often the pictures are drawn.
        seed: Of the draws; the same hits always give the same interval.

    Returns:
        The part and its interval.

    Raises:
        ValueError: There are no pictures.
    """
    count = len(hits)
    if not count:
        raise ValueError("wanted the hits of at least one picture, got none")
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
        0 to 1: the difference in each bin, weighted by the pictures in it.

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
