import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.train import TrainSettings
from tinyvit.train.settings import ChangedSettingsError, SettingError, settings_of
from tinyvit.train.tasks.settings import (
    ClassifySettings,
    DistillFeaturesRun,
    DistillLogitsSettings,
    SegmentSettings,
)

ALL = (TrainSettings, ClassifySettings, DistillLogitsSettings, DistillFeaturesRun, SegmentSettings)


@pytest.mark.parametrize("cls", ALL)
def test_every_setting_is_explained(cls):
    assert [name for name, setting in settings_of(cls).items() if not setting.help] == []


def test_a_setting_is_read_from_its_field():
    batch_size = settings_of(TrainSettings)["batch_size"]
    assert (batch_size.kinds, batch_size.default, batch_size.is_free) == ((int,), 8, False)
    assert batch_size.help.startswith("Samples of one step, over all processes")
    trainable = settings_of(TrainSettings)["trainable"]
    assert trainable.choices == ("full", "decoder", "neck", "head", "lora")
    assert trainable.flag.flags == ("--trainable", "--move", "--moving")
    windows = settings_of(ClassifySettings)["window_sizes"]
    assert (windows.kinds, windows.is_optional) == ((tuple,), True)
    held_out = settings_of(DistillFeaturesRun)["held_out"]
    assert held_out.kinds == (float, str)
    assert settings_of(SegmentSettings)["data"].is_place


@pytest.mark.parametrize(
    "change, words",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"layer_decay": 1.5}, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1"),
        ({"final_rate": 2.0}, "final_rate must be at least 0 and at most 1, got 2.0"),
        ({"drop_path": 1.1}, "drop_path must be at least 0 and at most 1"),
        (
            {"trainable": "eyes"},
            "trainable must be one of full, decoder, neck, head, lora, got 'eyes'",
        ),
        ({"batch_stats": "some"}, "batch_stats must be one of auto, frozen, own, synchronised"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
        ({"folder": ""}, "folder must be the name of a folder"),
        ({"accumulate": 9}, "accumulate must be at most the batch size of 8.*, got 9"),
        ({"clip_norm": float("nan")}, "clip_norm must be a finite number"),
        ({"workers": -1}, "workers must be at least 0"),
    ],
)
def test_wrong_values(change, words):
    with pytest.raises(ValueError, match=words):
        TrainSettings(**{"folder": "run", **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"drop_last": 1}, "drop_last must be true or false, got 1"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"trainable": 3}, "trainable must be text, got 3"),
        ({"epochs": None}, "epochs must be a whole number, got None"),
    ],
)
def test_wrong_types(change, words):
    with pytest.raises(TypeError, match=words):
        TrainSettings(**{"folder": "run", **change})


@given(
    st.builds(
        TrainSettings,
        folder=st.text(
            st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20
        ),  # no control characters and half characters: no name of a folder has them
        epochs=st.integers(1, 10**6),
        steps=st.none() | st.integers(1, 10**6),
        learning_rate=st.floats(1e-12, 10),
        ema_decay=st.floats(0, 0.9999),
        drop_path=st.none() | st.floats(0, 1),
        drop_last=st.booleans(),
        trainable=st.sampled_from(["full", "decoder", "neck", "head", "lora"]),
    )
)
def test_toml_and_json_give_the_same_settings(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("toml") / "settings.toml"
    path.write_text(settings.to_toml(), encoding="utf-8")
    assert TrainSettings.from_toml(path) == settings
    values = json.loads(json.dumps(settings.to_dict()))
    assert TrainSettings.from_mapping(values) == settings


def test_the_command_line_goes_before_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('folder = "a"\nepochs = 3\nlearning_rate = 1\n')
    settings = TrainSettings.from_toml(path, epochs=5)
    assert (settings.folder, settings.epochs, settings.learning_rate) == ("a", 5, 1)


def test_files_that_are_wrong(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("folder = ")
    with pytest.raises(ValueError, match=r"mine.toml is no TOML file"):
        TrainSettings.from_toml(path)
    path.write_text('folder = "a"\nepoch = 3')
    with pytest.raises(ValueError, match=r"mine.toml: unknown settings epoch; known are .*epochs"):
        TrainSettings.from_toml(path)
    path.write_text("epochs = 3")
    with pytest.raises(ValueError, match="folder is missing"):
        TrainSettings.from_toml(path)


def test_what_stands_against_resuming():
    settings = TrainSettings(folder="a")
    same = replace(settings, folder="b", workers=4, save_every=7, device="cpu", accumulate=2)
    assert same.differences(settings) == []
    other = replace(settings, seed=1, epochs=20)
    assert other.differences(settings) == ["epochs was 10 and is 20", "seed was 0 and is 1"]


def test_the_former_name_of_trainable(tmp_path):
    settings = TrainSettings("a", moving="decoder")
    assert settings == TrainSettings("a", trainable="decoder")
    assert settings.moving == "decoder"
    assert replace(settings, trainable="neck").moving == "neck"
    path = tmp_path / "settings.toml"
    path.write_text('folder = "a"\nmoving = "decoder"\n')
    assert TrainSettings.from_toml(path) == settings
    assert "trainable = " in settings.to_toml() and "moving" not in settings.to_toml()


def test_settings_of_tasks(tmp_path):
    values = {"data": "d", "window_sizes": [4, 4, 2, 1], "mixup": 1}
    settings = ClassifySettings.from_mapping(values)
    assert settings.window_sizes == (4, 4, 2, 1)
    assert ClassifySettings.from_mapping(settings.to_dict()) == settings
    assert (
        SegmentSettings.from_mapping({"data": "d", "model": "tiny_vit_2m_sam"}).checkpoint is None
    )
    assert DistillFeaturesRun(data="a", features="b", held_out="val").held_out == "val"
    for cls, change, words in (
        (ClassifySettings, {"window_sizes": [4, "a"]}, "window_sizes must be whole numbers, such"),
        (ClassifySettings, {"augment": "much"}, "augment must be one of none, light, full"),
        (DistillFeaturesRun, {"features": "f", "held_out": [1]}, "must be a number or text"),
        (SegmentSettings, {"box_share": 2}, "box_share must be at least 0 and at most 1, got 2"),
    ):
        with pytest.raises(SettingError, match=words):
            cls.from_mapping({"data": "d", **change})
    with pytest.raises(ValueError, match=r"^features is missing: Folder of features that"):
        DistillFeaturesRun.from_mapping({"data": "d"})


def test_errors_can_name_options_and_pickle():
    for error, words in (
        (SettingError("epochs", "at least 1", 0), "--epochs must be at least 1, got 0"),
        (SettingError("epochs", "at least 1", 0, "a.toml"), "a.toml: epochs must be at least 1"),
        (ChangedSettingsError("r", [("epochs", 1, 2)]), "--epochs was 1 and is 2. Set them"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert words in again.said(lambda name: f"--{name}")


def test_settings_load_no_torch():
    code = (
        "import sys; import tinyvit.train.tasks.settings; from tinyvit.train import TrainSettings; "
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
