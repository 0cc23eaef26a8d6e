"""Workers that are timed in turn, and what runs in them."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from tinyvit.bench import Worker, take_turns
from tinyvit.bench.workers import count_gflop, fill_randomly, make
from tinyvit.catalog import get_variant
from tinyvit.checkpoints import write_state_dict
from tinyvit.errors import MissingExtraError
from tinyvit.factory import create_model

SCRIPT = """
import sys
from tinyvit.bench import serve
from tinyvit.errors import MissingExtraError

def make(spec):
    print("a library talks")
    if spec.get("raises"):
        raise eval(spec["raises"])("as asked")
    if spec.get("dies"):
        sys.exit("last words")
    calls = []
    def call():
        calls.append(1)
        if spec.get("breaks") and len(calls) > 1:
            raise RuntimeError("broken at work")
        return [float(len(calls)), 2.0]
    return call, {"name": spec["name"], "invented_s": spec.get("invented_s", 0)}

serve(make)
"""
COMMAND = [sys.executable, "-c", SCRIPT]


def test_a_worker_tells_its_facts_and_takes_its_turn():
    with Worker(COMMAND, {"name": "one"}) as worker:
        assert worker.facts == {"name": "one", "invented_s": 0}
        assert worker.first_result_s > 0
        turn = worker.turn(least_seconds=0)
        assert turn.calls == 1
        assert turn.seconds >= 0
        assert worker.turn(least_seconds=0.01).calls > 1


def test_time_to_invent_weights_does_not_count():
    with Worker(COMMAND, {"name": "one", "invented_s": 1000}) as worker:
        assert worker.first_result_s < 0


def test_what_it_computes_can_be_saved(tmp_path):
    with Worker(COMMAND, {"name": "one"}) as worker:
        worker.save(tmp_path / "output.npy")
    assert np.load(tmp_path / "output.npy").tolist() == [2.0, 2.0]  # the second call


def test_turns_go_round_and_the_first_round_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyvit.bench.workers._SETTLE_S", 0)
    seen = []
    with Worker(COMMAND, {"name": "a"}) as a, Worker(COMMAND, {"name": "b"}) as b:
        order = []
        for worker in (a, b):
            monkeypatch.setattr(worker, "turn", recording(worker, order))
        turns = take_turns(
            [a, b], 2, least_seconds=0, progress=lambda done, total: seen.append((done, total))
        )
    assert order == ["a", "b"] * 3
    assert [len(own) for own in turns] == [2, 2]
    assert seen[0] == (1, 6)
    assert seen[-1] == (6, 6)


def recording(worker, order):
    turn = worker.turn

    def call(least_seconds):
        order.append(worker.facts["name"])
        return turn(least_seconds)

    return call


def test_no_round_is_an_error():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        take_turns([], 0)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("MissingExtraError", MissingExtraError, "^as asked$"),
        ("TypeError", ValueError, "^as asked$"),
        ("FileNotFoundError", ChildProcessError, "^FileNotFoundError: as asked$"),
        ("RuntimeError", ChildProcessError, "exit code 1: RuntimeError: as asked$"),
    ],
)
def test_errors_of_a_start_come_over(name, kind, words):
    with pytest.raises(kind, match=words):
        Worker(COMMAND, {"name": "one", "raises": name})


def test_a_process_that_ends_leaves_its_last_words():
    with pytest.raises(ChildProcessError, match="ended with exit code 1: last words"):
        Worker(COMMAND, {"name": "one", "dies": True})
    with (
        Worker(COMMAND, {"name": "one", "breaks": True}) as worker,
        pytest.raises(ChildProcessError, match="RuntimeError: broken at work"),
    ):
        worker.turn(0)


SPEC = {
    "model": None, "checkpoint": None, "size": 64, "batch": 2, "backend": "torch",
    "precision": "fp32", "device": "cpu", "threads": None,
}  # fmt: skip


def test_every_tensor_becomes_random_and_the_same_each_time(make_tiny_vit):
    model, other = make_tiny_vit(seed=1), make_tiny_vit(seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fill_randomly(model)
    fill_randomly(other)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]) or not value.is_floating_point()
        if value.is_floating_point():
            assert not torch.equal(value, before[key]), key
            assert value.numel() == 1 or value.std() > 0, key
        if key.endswith("running_var"):
            assert value.min() > 0, key
    assert torch.isfinite(model(torch.ones(1, 3, 64, 64))).all()


def test_work_is_the_catalog_s_scaled_by_the_pixels(make_tiny_vit):
    row = get_variant("tiny_vit_2m_sam")
    assert count_gflop(make_tiny_vit(), (256, 256), row.name) == 2 * row.gmacs
    assert count_gflop(make_tiny_vit(), (128, 256), row.name) == row.gmacs


def test_work_of_an_unknown_model_is_counted():
    row = get_variant("tiny_vit_2m_sam")
    model = create_model(row.name)
    counted = count_gflop(model, (256, 256))
    # windows of 8 and 16 divide 256 px, so nothing is padded and both ways count the same
    assert math.isclose(counted, 2 * row.gmacs, rel_tol=0.02)


def test_a_variant_runs_on_random_weights():
    call, facts = make({**SPEC, "model": "tiny_vit_2m_sam"})
    assert call().shape == (2, 256, 4, 4)
    assert facts["backend"] == "torch"
    assert facts["precision"] == "fp32"
    assert facts["device"] == "cpu"
    assert facts["size"] == (64, 64)
    assert facts["gflop"] == 2 * 0.83 / 16
    assert facts["invented_s"] > 0


def test_a_checkpoint_of_no_variant_runs(make_tiny_vit, tmp_path):
    path = tmp_path / "own.safetensors"
    state = make_tiny_vit(head=False).state_dict()
    write_state_dict(path, state, metadata={"tinyvit.strides": "2,2,1"})
    call, facts = make({**SPEC, "checkpoint": str(path)})
    assert call().shape == (2, 16, 4, 4)
    assert 0 < facts["gflop"] < 0.1


def test_a_named_checkpoint_has_its_variant_s_work():
    _, facts = make({**SPEC, "checkpoint": "tinyvit_sam_2m"})
    assert facts["gflop"] == 2 * 0.83 / 16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_matrix_product_is_one(precision):
    call, facts = make({"matmul": 16, "precision": precision, "device": "cpu", "threads": None})
    assert call().numel() == 16 * 16
    assert facts["precision"] == precision


def test_threads_are_limited(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    make({"matmul": 4, "precision": "fp32", "device": "cpu", "threads": 1})
    make({**SPEC, "checkpoint": "tinyvit_sam_2m", "size": 32, "threads": 1})
    assert asked == [1, 1]


def test_no_threads_are_an_error():
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        make({**SPEC, "threads": 0})
