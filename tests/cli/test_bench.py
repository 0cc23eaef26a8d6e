from __future__ import annotations

from typing import get_args

import pytest

from tinyvit.bench import Result, Spread
from tinyvit.errors import MissingExtraError
from tinyvit.inference.backend import BackendName, Precision


@pytest.fixture
def heats(monkeypatch):
    """What was asked to be measured; only the torch backend is there."""
    asked = []

    def measure(contestants, rounds, *, progress):
        asked.append((contestants, rounds))
        progress(1, 2)
        return [outcome(contestant) for contestant in contestants]

    monkeypatch.setattr("tinyvit.bench.measure", measure)
    return asked


def outcome(contestant):
    if contestant.backend not in ("auto", "torch"):
        return MissingExtraError(f"{contestant.backend} is not here; pip install it")
    side = contestant.size or 1024
    return Result(
        contestant=contestant, chose="torch", backend="torch", precision=contestant.precision,
        size=(side, side), threads=2, gflop=77.5, seconds=Spread(12.3456, 12.0, 13.0),
        rounds=(12.0, 13.0), images_per_s=1234.5, gflops=150.4, matmul_gflops=199.9, share=0.75,
        page_faults=512345.0, peak_memory=1_700_000_000, first_result_s=12.34,
    )  # fmt: skip


def test_the_table_fits_80_columns_and_has_the_machine_above_it(run, heats):
    result = run("bench", "--size", "1024", "--precision", "all")
    assert result.code == 0, result.err
    facts, table = result.out.split("\n\n")
    assert facts.startswith("processor ")
    for name in ("cores", "system", "versions", "date"):
        assert f"\n{name} " in facts
    lines = table.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == [
        *("ms", "spread", "pictures/s", "GFLOP/s", "share", "MB", "faults", "start")
    ]
    assert lines[1] == "tiny_vit_2m_sam, 1024x1024, batch 1: 77.5 GFLOP an image"
    assert lines[2].split() == [
        *("torch", "fp32", "12345.6", "8%", "1234", "150", "75%", "1700", "512345", "12.3")
    ]
    assert next(line.split() for line in lines if "matmul" in line) == ["matmul", "fp32", "200"]
    assert "share: of the rate of large matrix products" in result.err
    assert "tiny_vit_5m_sam at 1024, batch 1: 2 contestants, 5 rounds" in result.err


def test_every_combination_is_a_heat_or_a_contestant(run, heats):
    words = ["--model", "tiny_vit_5m_224", "--size", 64, "--size", 96, "--batch", 1, "--batch", 2]
    assert run("bench", *words, "--repeats", 3, "--threads", 1, "-q").err == ""
    asked = [(heat[0].size, heat[0].batch, rounds) for heat, rounds in heats]
    assert asked == [(64, 1, 3), (64, 2, 3), (96, 1, 3), (96, 2, 3)]
    (first,) = heats[0][0]
    assert (first.model, first.backend, first.precision) == ("tiny_vit_5m_224", "auto", "fp32")
    assert first.threads == 1


def test_all_backends_leave_out_what_is_missing_with_a_word(run, heats):
    result = run("bench", "--model", "tiny_vit_2m_sam", "--backend", "all", "--json")
    assert result.code == 0
    others = [name for name in get_args(BackendName) if name not in ("auto", "torch")]
    content = result.json
    assert [row["backend"] for row in content["left_out"]] == others
    assert [row["backend"] for row in content["results"]] == ["torch"]
    assert content["results"][0]["contestant"]["model"] == "tiny_vit_2m_sam"
    assert content["machine"]["cpu"]
    assert content["repeats"] == 5
    for name in others:
        assert f"left out {name} fp32: {name} is not here" in result.err
        alone = run("bench", "--model", "tiny_vit_2m_sam", "--backend", name)
        assert alone.code == 1
        assert f"error: {name} is not here; pip install it" in alone.err


def test_all_precisions_are_the_engine_s_but_auto(run, heats):
    run("bench", "--model", "tiny_vit_2m_sam", "--precision", "all")
    wanted = [name for name in get_args(Precision) if name != "auto"]
    assert [contestant.precision for contestant in heats[0][0]] == wanted


def test_a_checkpoint_says_its_model(run, heats):
    result = run("bench", "--checkpoint", "tinyvit_sam_2m", "--size", 64)
    assert [contestant.model for contestant in heats[0][0]] == [None]
    assert "tinyvit_sam_2m, 64x64, batch 1" in result.out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "tiny_vit_5m"], "unknown model 'tiny_vit_5m'; did you mean"),
        (["--backend", "tensorrt"], "--backend must be one of auto, torch"),
        (["--precision", "fp8"], "--precision must be one of fp32, bf16"),
        (["--checkpoint", "mobile_sam"], "not on this machine yet; fetch it with: tinyvit"),
        (
            ["--checkpoint", "x.pt", "--model", "tiny_vit_5m_sam", "--model", "tiny_vit_2m_sam"],
            "one checkpoint fits one model, got 2",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(run, heats, words, named):
    result = run("bench", *words)
    assert result.code == 1
    assert named in result.err
    assert result.out == ""
    assert heats == []
