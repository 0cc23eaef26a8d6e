from __future__ import annotations

import json

import pytest

from tinyvit.bench import Contestant, Result, Turn, contest, measure
from tinyvit.errors import CheckpointError


class FakeWorker:
    """A worker whose times are known: a model takes 1 s, then 2 s; a product takes 0.5 s."""

    started: list[dict] = []  # noqa: RUF012

    def __init__(self, command, spec, environment=None):
        if spec.get("model") == "none":
            raise CheckpointError("no such model")
        self.spec = spec
        self.started.append(spec)
        self.first_result_s = 5.0 - len(self.started)
        self.facts = {
            "chose": "as told", "backend": "torch", "precision": "fp32", "device": "cpu",
            "size": [64, 32], "threads": 2, "gflop": 0.5,
        }  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def fake_turns(workers, rounds, *, least_seconds, progress):
    times = [[0.5, 0.5] if "matmul" in worker.spec else [1.0, 2.0] for worker in workers]
    return [[Turn(seconds, 3, 7.0, 1000) for seconds in own[:rounds]] for own in times]


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(FakeWorker, "started", [])
    monkeypatch.setattr(contest, "Worker", FakeWorker)
    monkeypatch.setattr(contest, "take_turns", fake_turns)


def test_results_follow_from_the_turns(fakes):
    result, error = measure(
        [Contestant("tiny", batch=4), Contestant("none")], 2, starts=3, matmul_side=1000
    )
    assert isinstance(error, CheckpointError)
    assert result.rounds == (1.0, 2.0)
    assert result.seconds.median == 1.5
    assert result.size == (64, 32)
    assert result.images_per_s == 4 / 1.5
    assert result.gflops == 2.0 / 1.5
    assert result.matmul_gflops == 4.0  # 2 * 1000**3 operations in half a second
    assert result.share == 0.375  # the median of 2/1/4 and 2/2/4
    assert result.page_faults == 7.0
    assert result.peak_memory == 1000
    assert result.first_result_s == 2.0  # the quickest of 4, 3 and 2
    products = [spec for spec in FakeWorker.started if "matmul" in spec]
    assert products == [{"matmul": 1000, "precision": "fp32", "device": "cpu", "threads": 2}]
    assert json.loads(json.dumps(result.to_dict()))["contestant"]["model"] == "tiny"


@pytest.mark.parametrize("numbers", [{"rounds": 0}, {"starts": 0}])
def test_nothing_to_measure_is_an_error(fakes, numbers):
    with pytest.raises(ValueError, match="rounds and starts must be at least 1"):
        measure([Contestant("tiny")], **numbers)


def test_a_real_one_in_its_own_process():
    (result,) = measure(
        [Contestant(checkpoint="tinyvit_sam_2m", size=32, threads=1)],
        1,
        starts=1,
        matmul_side=64,
        least_seconds=0,
    )
    assert isinstance(result, Result)
    assert result.size == (32, 32)
    assert result.seconds.median > 0
    assert result.share > 0
    assert result.first_result_s > 0
