import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.train import TrainSettings


def test_every_setting_is_explained():
    listed = TrainSettings.__doc__.partition("Attributes:")[2]
    assert [
        one.name for one in fields(TrainSettings) if f"\n        {one.name}: " not in listed
    ] == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"layer_decay": 1.5}, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"ema_decay": 1.0}, "ema_decay must be from 0 to below 1"),
        ({"beta2": 1.0}, "beta2 must be from 0 to below 1"),
        ({"final_rate": 2.0}, "final_rate must be from 0 to 1"),
        ({"drop_path": 1.1}, "drop_path must be a probability"),
        ({"moving": "eyes"}, "moving must be one of full, decoder, neck, head, lora, got 'eyes'"),
        ({"batch_stats": "some"}, "batch_stats must be one of auto, frozen, own, synchronised"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
        ({"folder": ""}, "folder must be the name of a folder"),
        ({"accumulate": 9}, "accumulate=9 parts cannot be made of batch_size=8 samples"),
        ({"clip_norm": float("nan")}, "clip_norm must be a finite number"),
        ({"workers": -1}, "workers must be 0 or more"),
    ],
)
def test_wrong_values(change, words):
    with pytest.raises(ValueError, match=words):
        TrainSettings(**{"folder": "run", **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"epochs": 1.5}, r"epochs must be int, got 1.5 \(float\)"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"drop_last": 1}, "drop_last must be bool, got 1"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
        ({"moving": 3}, "moving must be str, got 3"),
        ({"epochs": None}, "epochs must be int, got None"),
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
        moving=st.sampled_from(["full", "decoder", "neck", "head", "lora"]),
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


def test_what_stands_against_going_on():
    settings = TrainSettings(folder="a")
    same = replace(settings, folder="b", workers=4, save_every=7, device="cpu", accumulate=2)
    assert same.differences(settings) == []
    other = replace(settings, seed=1, epochs=20)
    assert other.differences(settings) == ["epochs was 10 and is 20", "seed was 0 and is 1"]


def test_settings_load_no_torch():
    code = "import sys; from tinyvit.train import TrainSettings; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
