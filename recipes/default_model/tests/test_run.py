import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from .recipe_files import RECIPE, load

run = load("run")


class Parts:
    """Stands for the files of the recipe; each leaves what its step leaves."""

    def __init__(self, work):
        self.places = run.Places(work)
        self.trained = run.trained_by(work, run.Choices(work).table)
        self.done = []

    def __call__(self, name):
        return SimpleNamespace(
            build=lambda *arguments, **others: self.do(name, arguments, others),
            named=lambda paths: {path: path for path in paths},
            Choices=lambda *arguments, **others: (arguments, others),
        )

    def do(self, name, arguments, others):
        self.done.append(name)
        self.arguments = arguments, others
        leaves = {
            "train": self.trained,
            "choose": self.places.chosen,
            "shrink": self.places.shipped,
            "evaluate": self.places.evaluation / "evaluation.json",
            "card": self.places.card,
        }
        if name in leaves and not (name == "train" and self.trained.exists()):
            leaves[name].parent.mkdir(parents=True, exist_ok=True)
            chosen = '{"weights": "x", "offsets": [], "thresholds": {}}'
            leaves[name].write_text(chosen if name == "choose" else f"{name} {len(self.done)}")
        if name == "evaluate":
            (self.places.evaluation / "evaluation.md").write_text("a table")
        if name == "choose":
            return SimpleNamespace(weights="x", before=(0.5,), after=(0.6,), offsets=(0.1,))
        if name == "shrink":
            return SimpleNamespace(bytes=1, sha256="0", embedding_error=0.0, logit_error=0.0)
        return None


@pytest.fixture
def parts(tmp_path, monkeypatch, make_supply):
    make_supply(tmp_path)
    found = Parts(tmp_path)
    monkeypatch.setattr(run, "_part", found)
    return found


ALWAYS = ["fetch", "objects", "backgrounds", "regions", "label", "train"]
LAST = ["choose", "shrink", "evaluate", "card"]


def test_all_steps_in_order_and_again_what_is_not_done(tmp_path, parts, capsys):
    assert run.main([str(tmp_path)]) == 0
    assert parts.done == [*ALWAYS, *LAST]
    out = capsys.readouterr().out
    assert "[1/10] fetch: fetch the packages that the images come from" in out
    parts.done.clear()
    assert run.main([str(tmp_path)]) == 0
    assert parts.done == ALWAYS  # these know themselves what is done
    out = capsys.readouterr().out
    for line in ("[7/10] choose: done before", "[8/10] shrink: done", "[10/10] card: done"):
        assert line in out
    parts.trained.write_text("trained anew")
    parts.done.clear()
    assert run.main([str(tmp_path)]) == 0
    assert parts.done == [*ALWAYS, *LAST]


def test_a_step_is_done_again_when_its_inputs_or_choices_change(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("one")
    done = []

    def step(*given):
        return run.Step("copy", "copies", lambda: done.append(1), (source,), (target,), given)

    assert not step(1).is_done(tmp_path)
    target.write_text("one")
    assert not step(1).is_done(tmp_path)  # made by somebody else
    step(1).note_done(tmp_path)
    assert step(1).is_done(tmp_path)
    assert not step(2).is_done(tmp_path)
    source.write_text("other")
    assert not step(1).is_done(tmp_path)
    step(1).note_done(tmp_path)
    target.unlink()
    assert not step(1).is_done(tmp_path)


def test_only_does_one_step_even_if_it_is_done(tmp_path, parts):
    run.main([str(tmp_path)])
    parts.done.clear()
    assert run.main([str(tmp_path), "--only", "card"]) == 0
    assert parts.done == ["card"]


def test_choices_reach_the_steps(tmp_path, parts):
    parts.places.shipped.parent.mkdir()
    parts.places.shipped.write_text("weights")
    arguments = ["--only", "evaluate", "--photographs", "photos", "--beside", "mine.safetensors"]
    assert run.main([str(tmp_path), *arguments, "--composites", "7"]) == 0
    (weights, (given, others), out), _ = parts.arguments
    assert list(weights) == [str(parts.places.shipped), "mine.safetensors"]
    assert [str(one) for one in given] == ["photos", str(tmp_path), "7", "256"]
    assert (others, out) == ({"most_masks": None}, parts.places.evaluation)


@pytest.mark.parametrize(
    "step, words",
    [
        ("choose", "best.safetensors is not there; the step 'train' makes it"),
        ("shrink", "chosen.json is not there; the step 'choose' makes it"),
        ("evaluate", "default.safetensors is not there; the step 'shrink' makes it"),
        ("card", "evaluation.json is not there; the step 'evaluate' makes it"),
        ("bake", "there is no step bake; the steps are fetch, objects, backgrounds, regions"),
    ],
)
def test_what_lacks_is_said(tmp_path, parts, capsys, step, words):
    assert run.main([str(tmp_path), "--only", step]) == 1
    assert words in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(tmp_path, parts, capsys):
    def stop(name, arguments, others):
        raise KeyboardInterrupt

    parts.do = stop
    assert run.main([str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_from_cut_outs_to_a_card(tmp_path, make_supply, make_photographs):
    work = make_supply(tmp_path / "work")
    photographs = make_photographs(tmp_path / "photographs")
    command = [sys.executable, "-W", "error", str(RECIPE / "run.py"), str(work), "--tiny"]
    steps = [f"--only={name}" for name in ("regions", "train", *LAST)]
    done = subprocess.run(
        [*command, *steps, "--photographs", str(photographs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((work / "evaluation" / "evaluation.json").read_text())
    assert set(results["sets"]) == {"photographs", "composites", "regions"}
    assert set(results["sets"]["photographs"]["models"]) == {"default", "previous"}
    assert (work / "results" / "learn_curves.png").is_file()
    assert str(work) not in (work / "results" / "learn_settings.toml").read_text()
    card = (work / "weights" / "MODEL_CARD.md").read_text()
    assert "| training | from scratch, 0.0 hours, 8 images in 4 steps |" in card
    assert results["weights"]["default"]["sha256"] in card
    assert "| objects: photo | things 1.0 | CC0-1.0 | 2 | 2 |" in card
