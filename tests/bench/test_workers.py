from __future__ import annotations

import sys

import numpy as np
import pytest

from tinyvit.bench import Worker, take_turns
from tinyvit.errors import MissingExtraError

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
