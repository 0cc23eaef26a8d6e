import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tinyvit.train.task import Order, derived_seed, load_batches

from .toy_task import ToyTask


@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 17),
    accumulate=st.integers(1, 4),
    ranks=st.integers(1, 4),
    drop_last=st.booleans(),
)
def test_no_sample_twice_in_an_epoch_and_none_missing(
    samples, batch_size, accumulate, ranks, drop_last
):
    assume(batch_size >= accumulate * ranks)
    assume(samples >= batch_size if drop_last else samples >= ranks)
    order = Order(samples, batch_size, accumulate, ranks, 3, drop_last)
    seen = []
    for step in range(order.steps_per_epoch, 2 * order.steps_per_epoch):
        per_rank = [order.parts(step, rank) for rank in range(ranks)]
        assert len({len(parts) for parts in per_rank}) == 1  # else processes wait for each other
        sizes = [len(part) for parts in per_rank for part in parts]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        keys = [key for parts in per_rank for part in parts for key in part]
        assert {epoch for epoch, _ in keys} == {1}
        assert sorted(index for _, index in keys) == sorted(order.group(step))
        seen += [index for _, index in keys]
    assert len(set(seen)) == len(seen)
    left_out = samples - len(seen)
    left = samples % batch_size
    assert left_out == (left if drop_last or left < ranks else 0)


def test_the_order_depends_on_seed_and_epoch_only():
    order = Order(20, 8, seed=1)
    split = Order(20, 8, accumulate=2, ranks=2, seed=1)
    assert all(np.array_equal(order.group(step), split.group(step)) for step in range(9))
    assert not np.array_equal(order.group(0), order.group(3))
    assert not np.array_equal(order.group(0), Order(20, 8, seed=2).group(0))
    assert [order.epoch_of(step) for step in (0, 2, 3)] == [0, 0, 1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0, 8), "holds no samples"),
        ((9, 3, 2, 2), "batch_size must be at least 4: a sample for each .* of 2 processes, got 3"),
        (
            (5, 8, 1, 1, 0, True),
            "batch_size is 8, and 5 samples give 1 processes no step; drop_last is True",
        ),
        ((1, 8, 1, 2), "batch_size is 8, and 1 samples give 2 processes no step"),
    ],
)
def test_too_little(arguments, words):
    with pytest.raises(ValueError, match=words):
        Order(*arguments)


def test_one_image_is_enough():
    order = Order(1, 8)
    assert order.steps_per_epoch == 1
    assert order.parts(4, 0) == [[(4, 0)]]


def test_derived_seeds_are_alike_for_equal_numbers_only():
    assert derived_seed(1, 2) == derived_seed(1, 2)
    seeds = {derived_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_batches_from_any_step_are_those_of_the_whole_run():
    task = ToyTask(noise=1.0)
    order = Order(len(task), 8, accumulate=2, seed=4)
    whole = list(load_batches(task, order, 0, range(6)))
    late = list(load_batches(task, order, 0, range(4, 6)))
    assert len(whole) == 12 and len(late) == 4
    for one, other in zip(whole[8:], late, strict=True):
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["images"], other["images"])
    first = {int(i): image for batch in whole[:6] for i, image in _rows(batch)}
    second = {int(i): image for batch in whole[6:] for i, image in _rows(batch)}
    assert not any(torch.equal(first[i], second[i]) for i in first)  # other chance each epoch


def _rows(batch):
    return zip(batch["index"], batch["images"], strict=True)


def test_loading_leaves_the_global_generator_alone():
    task = ToyTask()
    before = torch.get_rng_state()
    list(load_batches(task, Order(len(task), 8), 0, range(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_network_stays_behind():
    class Watching(ToyTask):
        def sample(self, index, rng):
            assert not list(self.model.parameters())
            return super().sample(index, rng)

    task = Watching()
    (batch,) = load_batches(task, Order(len(task), 8), 0, range(1))
    assert len(batch["index"]) == 8
    assert list(task.model.parameters())
