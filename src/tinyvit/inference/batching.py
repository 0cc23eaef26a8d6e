"""Prepared pictures -> results, those of one shape computed together, in the order given.

Knows tensors and a function that runs a batch; it knows no engine, no files and no threads.

Shapes: N pictures, H W height and width of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["run_in_batches"]

Label = TypeVar("Label")
Result = TypeVar("Result")


@dataclass
class _Slot(Generic[Label, Result]):
    """One picture's place in the order: its input until it is computed, then its result."""

    tensor: Tensor | None
    label: Label
    results: list[Result]


def run_in_batches(
    inputs: Iterable[tuple[Tensor, Label]],
    run: Callable[[Tensor], Sequence[Result]],
    most: Callable[[Tensor], int],
    window: int,
) -> Iterator[tuple[Result, Label]]:
    """Run inputs, grouped by shape within a window.

    A batch is run as soon as it is full, or when its oldest picture holds up a full window. So
    pictures of one shape wait for no more than their own batch.

    Args:
        inputs: (picture [3, H, W], what goes with it); may be a generator.
        run: [N, 3, H, W] -> N results.
        most: Most pictures of a shape in one batch, from one of them [3, H, W].
        window: Most pictures held: read and not yet yielded.

    Yields:
        (result, what goes with it) for each input, in order.

    Raises:
        Exception: What ``inputs`` raises, after the results before it; what ``run`` raises.
    """
    order: deque[_Slot[Label, Result]] = deque()
    groups: dict[tuple[int, ...], list[_Slot[Label, Result]]] = {}
    source = iter(inputs)
    error: Exception | None = None
    try:
        while True:
            try:
                tensor, label = next(source)
            except StopIteration:
                break
            except Exception as err:  # after the good ones before it
                error = err
                break
            slot = _Slot[Label, Result](tensor, label, [])
            order.append(slot)
            shape = tuple(tensor.shape)
            group = groups.setdefault(shape, [])
            group.append(slot)
            if len(group) >= most(tensor):
                _run_group(groups.pop(shape), run)
            if len(order) >= window and not order[0].results:
                _run_group(_group_of(order[0], groups), run)
            del tensor, label, slot, group
            while order and order[0].results:
                yield _taken(order)
        while order:
            if not order[0].results:
                _run_group(_group_of(order[0], groups), run)
            yield _taken(order)
        if error is not None:
            raise error
    finally:
        del error  # it refers to this frame, and this frame to it


def _group_of(
    slot: _Slot[Label, Result], groups: dict[tuple[int, ...], list[_Slot[Label, Result]]]
) -> list[_Slot[Label, Result]]:
    """Take out the group that holds a picture which has not been computed."""
    return [] if slot.tensor is None else groups.pop(tuple(slot.tensor.shape))


def _run_group(
    group: list[_Slot[Label, Result]], run: Callable[[Tensor], Sequence[Result]]
) -> None:
    tensors = [slot.tensor for slot in group if slot.tensor is not None]
    batch = tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
    del tensors
    for slot in group:
        slot.tensor = None  # the batch is a copy, and memory is bounded
    for slot, result in zip(group, run(batch), strict=True):
        slot.results.append(result)


def _taken(order: deque[_Slot[Label, Result]]) -> tuple[Result, Label]:
    slot = order.popleft()
    return slot.results[0], slot.label
