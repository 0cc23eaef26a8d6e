from __future__ import annotations

import pytest
import typer

from tinyvit.cli.settings_options import CLASSIFY, SEGMENT
from tinyvit.cli.train import Choices, gather, speaking_of_options, task_toml
from tinyvit.errors import CheckpointError
from tinyvit.train import TrainSettings


def choose(**given):
    return gather("classify", CLASSIFY, given)


@pytest.fixture
def begun(tmp_path):
    """A run's folder as a first call leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    choices = choose(folder=str(folder), data=["a"], mixup=0.8, window_sizes=[4, 4, 2, 1])
    (folder / "task.toml").write_text(task_toml("classify", choices), encoding="utf-8")
    settings = TrainSettings(str(folder), epochs=3, learning_rate=0.01)
    (folder / "settings.toml").write_text(settings.to_toml(), encoding="utf-8")
    return folder


def test_only_what_is_given_is_passed_on():
    found = choose(folder="run", data=["a"], epochs=3, mixup=0.8, resume=None, as_json=True)
    assert found == Choices(
        {"folder": "run", "epochs": 3}, {"data": "a", "mixup": 0.8}, resume=False, as_json=True
    )
    assert (found.seed, str(found.folder)) == (0, "run")
    assert choose(folder="run", data=["a"], seed=7).seed == 7


@pytest.mark.parametrize(("is_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_a_precision(is_bf16, precision):
    loop = choose(folder="run", data=["a"], bf16=is_bf16).loop
    assert loop == {"folder": "run", "precision": precision}


def test_options_go_before_a_file(tmp_path):
    file = tmp_path / "choices.toml"
    file.write_text('folder = "there"\ndata = "b"\nepochs = 5\nlearning_rate = 1\nflip = false\n')
    found = choose(config=str(file), epochs=9, folder="here")
    assert found.loop == {"folder": "here", "epochs": 9, "learning_rate": 1}
    assert found.task == {"data": "b", "flip": False}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch = 3\n", "choices.toml: unknown names epoch; known are accumulate, augment,"),
        ("bf16 = true\n", "unknown names bf16"),
        ('mixup = "much"\n', "choices.toml: mixup must be a number, got 'much'"),
        ('augment = "much"\n', "augment must be one of none, light, full, got 'much'"),
        ("epochs 3\n", "choices.toml is no TOML file: "),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, said):
    file = tmp_path / "choices.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        choose(config=str(file), folder="run", data=["a"])
    with pytest.raises(FileNotFoundError):
        choose(config=str(tmp_path / "none.toml"), folder="run", data=["a"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": ["a"]}, "name the folder of the run with -o RUN_FOLDER"),
        ({"folder": "run"}, "name the data to learn from"),
        ({"folder": "run", "resume": True}, "begun in run"),
        ({"folder": "run", "data": ["a.tar", "b.tar"]}, "2 places of data were named"),
    ],
)
def test_what_is_missing_is_wrong_usage(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.BadParameter, match=said):
        choose(**given)


def test_a_run_goes_on_by_its_folder_alone(begun):
    found = choose(folder=str(begun), resume=True, workers=2, data=["moved"])
    assert found.resume
    assert found.task == {"data": "moved", "mixup": 0.8, "window_sizes": [4, 4, 2, 1]}
    assert found.loop["epochs"] == 3
    assert found.loop["workers"] == 2
    assert found.loop["folder"] == str(begun)
    same = TrainSettings(str(begun), epochs=3, learning_rate=0.01)
    assert TrainSettings.from_mapping(found.loop).differences(same) == []


def test_without_resume_the_folder_s_choices_are_not_taken(begun):
    assert choose(folder=str(begun), data=["a"]).task == {"data": "a"}


def test_other_choices_of_the_task_are_refused(begun):
    with pytest.raises(ValueError, match=r"other choices.*--mixup was 0\.8 and is 0\.5\. Leave"):
        choose(folder=str(begun), resume=True, mixup=0.5)
    with pytest.raises(ValueError, match="--augment was 'light' and is 'full'"):
        choose(folder=str(begun), resume=True, augment="full")  # against the default
    assert choose(folder=str(begun), resume=True, mixup=0.8, augment="light", on_broken="error")


def test_another_task_s_run_is_refused(begun):
    with pytest.raises(ValueError, match="holds a run of 'tinyvit train classify', not of segment"):
        gather("segment", SEGMENT, {"folder": str(begun), "resume": True})


def test_places_that_exist_are_kept_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "söme \"'").mkdir()
    choices = choose(folder="run", data=["söme \"'"], checkpoint="tinyvit_starter")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/task.toml").write_text(task_toml("classify", choices), encoding="utf-8")
    found = choose(folder="run", resume=True).task
    assert found == {"data": str(tmp_path / "söme \"'"), "checkpoint": "tinyvit_starter"}


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("learning_rate must be above 0, got -1", "--lr must be above 0, got -1"),
        ("epochs must be at least 1, got 0", "--epochs must be at least 1, got 0"),
        ("wants moving='decoder'; or a lower learning_rate", "wants --move 'decoder'; or a lower "
         "--lr"),
        ("steps was 3 and is 4", "--steps was 3 and is 4"),
        ("go on with it by resume, or", "go on with it by --resume, or"),
        ("/a/batch_size/b.img_size of 'window_sizes'", "/a/batch_size/b.img_size of "
         "'window_sizes'"),
        ("the steps and the data", "the steps and the data"),
    ],
)  # fmt: skip
def test_errors_speak_of_options(text, spoken):
    for kind in (ValueError, TypeError, CheckpointError):
        with pytest.raises(kind) as caught, speaking_of_options(CLASSIFY):
            raise kind(text)
        assert str(caught.value) == spoken


def test_other_errors_stay_as_they_are():
    with pytest.raises(UnicodeDecodeError), speaking_of_options(CLASSIFY):
        b"\xff".decode()
    with pytest.raises(KeyError, match="batch_size"), speaking_of_options(CLASSIFY):
        raise KeyError("batch_size")
