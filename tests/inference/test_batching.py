from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyvit.inference.engine import run_in_batches

Array = NDArray[np.float32]
Inputs = Iterator[tuple[Array, int]]


def images(widths: list[int]) -> list[tuple[Array, int]]:
    return [(np.full((3, 2, width), i, np.float32), i) for i, width in enumerate(widths)]


class Run:
    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, batch: Array) -> list[Array]:
        self.batches.append([int(image[0, 0, 0]) for image in batch])
        return [image.copy() for image in batch]


@given(st.lists(st.integers(1, 4), max_size=30), st.integers(1, 5), st.integers(1, 12))
def test_every_input_once_in_order(widths: list[int], size: int, window: int) -> None:
    run, given = Run(), images(widths)
    out = list(run_in_batches(iter(given), run, lambda _: size, window))
    assert [label for _, label in out] == list(range(len(widths)))
    for (result, _), (tensor, _) in zip(out, given, strict=True):
        np.testing.assert_array_equal(result, tensor)
    assert sorted(i for batch in run.batches for i in batch) == list(range(len(widths)))
    for batch in run.batches:
        assert len(batch) <= size
        assert len({widths[i] for i in batch}) == 1
        assert max(batch) - min(batch) < max(window, 1)


def test_one_shape_waits_for_its_own_batch_only() -> None:
    run, taken = Run(), []

    def inputs() -> Inputs:
        for item in images([4] * 9):
            taken.append(item[1])
            yield item

    for i, _ in enumerate(run_in_batches(inputs(), run, lambda _: 3, window=100)):
        assert len(taken) == i // 3 * 3 + 3
    assert run.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_shapes_are_put_together_within_the_window() -> None:
    run = Run()
    list(run_in_batches(iter(images([1, 2] * 4)), run, lambda _: 4, window=8))
    assert run.batches == [[0, 2, 4, 6], [1, 3, 5, 7]]
    run = Run()
    list(run_in_batches(iter(images([1, 2] * 4)), run, lambda _: 4, window=3))
    assert run.batches == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_the_largest_batch_may_depend_on_the_shape() -> None:
    run = Run()
    most = lambda tensor: 6 // tensor.shape[2]  # noqa: E731
    list(run_in_batches(iter(images([3, 3, 3, 2, 2, 2])), run, most, window=20))
    assert run.batches == [[0, 1], [3, 4, 5], [2]] or run.batches == [[0, 1], [2], [3, 4, 5]]


def test_errors_of_the_inputs_come_after_the_good_ones_and_of_the_run_at_once() -> None:
    def broken() -> Inputs:
        yield from images([1, 2, 1])
        raise OSError("gone")

    results = run_in_batches(broken(), Run(), lambda _: 4, window=8)
    assert [next(results)[1] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(results)

    def fail(batch: Array) -> list[Array]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        list(run_in_batches(iter(images([1])), fail, lambda _: 4, window=8))


def test_nothing() -> None:
    assert list(run_in_batches(iter(()), Run(), lambda _: 2, window=2)) == []
