from __future__ import annotations

import io
import re
import sys
from dataclasses import replace

import pytest

from tinyvit.cli.console import Console
from tinyvit.cli.train import TrainScreen, figures_text, time_text
from tinyvit.train import Progress

BEGUN = Progress("train", 0, 20, 1, 2, None, 1e-3, 0.0, None, {})
STEP = replace(BEGUN, step=10, loss=0.51234, images_per_second=25.04, seconds_left=133.2)
MEASURED = replace(STEP, figures={"top1": 0.98765, "loss": 0.2})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_measurement_is_one_line(capsys):
    with TrainScreen(Console()) as screen:
        for progress in (BEGUN, STEP, replace(STEP, phase="validate"), MEASURED, MEASURED):
            screen(progress)
    assert capsys.readouterr() == (
        "",
        "step 10 of 20 (epoch 1 of 2): top1 0.9877, loss 0.2000; training loss 0.5123, "
        "25.0 images/s, 0:02:13 left\n",
    )


def test_a_measurement_before_the_first_step(capsys):
    with TrainScreen(Console()) as screen:
        screen(replace(BEGUN, phase="validate"))
        screen(replace(BEGUN, figures={"top1": 0.1}))
    assert capsys.readouterr().err == "step 0 of 20: top1 0.1000; training not begun\n"


def test_no_time_is_left_at_the_end(capsys):
    with TrainScreen(Console()) as screen:
        screen(replace(MEASURED, phase="validate", step=20))
        screen(replace(MEASURED, phase="done", step=20))
    assert capsys.readouterr().err.endswith("25.0 images/s\n")


def test_a_line_a_minute_where_nobody_looks(capsys, monkeypatch):
    clock = iter([0.0, 30.0, 61.0, 61.0, 62.0])
    monkeypatch.setattr("tinyvit.cli.train.monotonic", lambda: next(clock))
    with TrainScreen(Console()) as screen:
        for step in (1, 2, 3):
            screen(replace(STEP, step=step))
    assert re.findall(r"^step (\d+) of", capsys.readouterr().err, re.MULTILINE) == ["2"]


def test_words_are_told_and_quiet_is_quiet(capsys):
    with TrainScreen(Console()) as screen:
        screen(replace(BEGUN, words="a state was broken"))
    assert capsys.readouterr().err == "a state was broken\n"
    with TrainScreen(Console(is_quiet=True)) as screen:
        screen(replace(BEGUN, words="a state was broken", phase="validate"))
        screen(MEASURED)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_bar_on_a_terminal(monkeypatch, is_quiet):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with TrainScreen(Console(is_quiet=is_quiet)) as screen:
        screen(STEP)
        screen(replace(STEP, phase="validate"))
        screen(MEASURED)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    if is_quiet:
        assert text == ""
        return
    assert "10 of 20, loss 0.5123, 25.0 images/s, 0:02:13 left" in text
    assert "step 10 of 20 (epoch 1 of 2): top1 0.9877" in text  # stays above the bar


def test_texts():
    assert figures_text({}) == "nothing measured"
    assert figures_text({"a": 1, "b": 0.25}) == "a 1.0000, b 0.2500"
    assert time_text(3725.4) == "1:02:05"
