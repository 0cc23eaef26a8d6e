"""benchmarks/training.py: its table, its ratios, and a step of this package."""

import pytest


@pytest.fixture
def training(load_benchmark):
    return load_benchmark("training")


def a_row(name, rounds):
    spread = {"median": rounds[0], "lower": 0.5, "upper": 2.0}
    return {
        "name": name, "rounds": rounds, "seconds": spread, "page_faults": 7.0, "peak_memory": 3e9,
    }  # fmt: skip


def test_ratios_are_taken_round_by_round(training):
    rows = [a_row("timm", [2.0, 8.0, 4.0]), a_row("tinyvit", [1.0, 2.0, 4.0])]
    training.compare(rows, batch=8)
    assert rows[1]["times_as_fast"]["timm"]["median"] == 2.0  # of 2, 4 and 1
    assert "timm+mallopt" not in rows[1]["times_as_fast"]
    assert rows[1]["images_per_s"] == 8.0


def test_a_case_becomes_a_table(training):
    rows = [a_row("timm", [2.0]), a_row("tinyvit+mallopt", [1.0])]
    training.compare(rows, batch=8)
    case = {
        "model": "tiny_vit_5m_224", "size": 224, "batch": 8, "precision": "bf16", "threads": 1,
        "rounds": 1, "rows": rows, "left_out": {"other": "not here"},
        "machine": {"cpu": "A", "torch": "2", "timm": "1", "date": "today"},
    }  # fmt: skip
    text = training.markdown([case])
    assert "## tiny_vit_5m_224, 224 px, batch 8, bf16" in text
    assert "A; threads: 1; 1 rounds; torch 2, timm 1; today" in text
    assert "| tinyvit+mallopt | 1000 | 500-2000 | 8.00 | 2.00 | - | 7 | 3000 |" in text
    assert "Left out other: not here" in text


def test_a_step_trains(training):
    spec = {
        "name": "tinyvit", "model": "tiny_vit_5m_224", "size": 32, "batch": 2,
        "precision": "bf16", "threads": None,
    }  # fmt: skip
    step, facts = training.make(spec)
    assert facts["parameters"] == 5392764
    first = float(step())
    for _ in range(3):
        last = float(step())
    assert last < first  # the same images and labels each time
    with pytest.raises(ValueError, match="unknown contestant 'cream'"):
        training.make({**spec, "name": "cream"})
