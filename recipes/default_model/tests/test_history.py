import json

import pytest

from .recipe_files import load

history = load("history")

TABLE = """
[learn]
start = "old"
batch_size = 4

[finish]
start = ""
batch_size = 10
"""


@pytest.fixture
def runs(tmp_path):
    """Two stages: the first one's log has a line that a kill cut off."""
    (tmp_path / "stages.toml").write_text(TABLE)
    lines = {
        "learn": [
            {"kind": "validate", "step": 0, "mean_iou": 0.1},
            {"kind": "train", "step": 90, "images_per_second": 2.0},
            {"kind": "train", "step": 100, "images_per_second": 1.0},
        ],
        "finish": [{"kind": "train", "step": 342, "images_per_second": 1.0}],
    }
    for name, rows in lines.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "log.jsonl").write_text(text + '{"kind": "tr')
        (folder / "settings.toml").write_text(f'folder = "{folder}"\n')
        (folder / "curves.png").write_bytes(b"an image")
    return tmp_path


def test_steps_images_and_hours_of_all_stages_add_up(runs):
    found = history.read_history(runs, runs / "stages.toml")
    # 90 steps of 4 at 2 a second, 10 of 4 at 1, and 342 of 10 at 1: 180 + 40 + 3420 = 3640 s.
    assert found == history.History("old", 442, 3820, pytest.approx(3640 / 3600))


def test_a_stage_that_has_not_begun_adds_nothing(tmp_path):
    (tmp_path / "stages.toml").write_text(TABLE)
    assert history.read_history(tmp_path, tmp_path / "stages.toml") == history.History(
        "old", 0, 0, 0.0
    )


def test_the_weights_are_the_best_of_the_last_stage(runs):
    folder = runs / "runs" / "finish"
    assert history.trained_by(runs, runs / "stages.toml") == folder / "best.safetensors"
    (folder / "last.safetensors").touch()
    assert history.trained_by(runs, runs / "stages.toml") == folder / "last.safetensors"
    (folder / "best.safetensors").touch()
    assert history.trained_by(runs, runs / "stages.toml") == folder / "best.safetensors"


def test_results_have_no_place_of_the_machine(runs):
    evaluation = runs / "evaluation"
    evaluation.mkdir()
    (evaluation / "evaluation.md").write_text("a table")
    written = history.keep_results(runs, runs / "stages.toml", evaluation, runs / "results")
    assert [path.name for path in written] == [
        *(f"learn_{name}" for name in history.KEPT),
        *(f"finish_{name}" for name in history.KEPT),
        "evaluation.md",
    ]
    assert all(path.is_file() for path in written)
    assert (runs / "results" / "learn_settings.toml").read_text() == 'folder = "WORK/runs/learn"\n'


def test_a_table_without_a_stage_is_refused(tmp_path):
    (tmp_path / "stages.toml").write_text("")
    with pytest.raises(ValueError, match=r"has no stage; write a table \[NAME\] for each"):
        history.read_stages(tmp_path / "stages.toml")


def test_what_stages_share_stands_once(tmp_path):
    (tmp_path / "base.toml").write_text("[common]\nsteps = 9\nseed = 1\n[other]\n")
    table = tmp_path / "stages.toml"
    table.write_text('[common]\nbase = "base.toml"\nseed = 2\n[learn]\n[finish]\nsteps = 4\n')
    assert history.read_stages(table) == {
        "learn": {"steps": 9, "seed": 2},
        "finish": {"steps": 4, "seed": 2},
    }
