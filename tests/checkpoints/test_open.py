from __future__ import annotations

import json

import pytest
import torch

from tinyvit.catalog import get_checkpoint
from tinyvit.checkpoints import inspect
from tinyvit.checkpoints.files import write_state_dict
from tinyvit.checkpoints.open import find_checkpoint, misfits, open_checkpoint
from tinyvit.errors import CheckpointError


def test_the_embedded_checkpoint_is_there():
    path, row = find_checkpoint("tinyvit_sam_2m")
    assert path.is_file() and row == get_checkpoint("tinyvit_sam_2m")


def test_a_checkpoint_is_read_whole(tmp_path):
    opened = open_checkpoint("tinyvit_sam_2m")
    assert opened.found.has_encoder
    assert {"patch_embed.seq.0.c.weight", "mask_decoder.iou_token.weight"} <= opened.tensors.keys()
    path = write_state_dict(
        tmp_path / "a.safetensors", dict(opened.tensors), metadata={"tinyvit.family": "tinyvit"}
    )
    again = open_checkpoint(path)
    assert (again.path, again.row) == (path, None)
    assert again.metadata["tinyvit.family"] == "tinyvit"
    assert again.tensors.keys() == opened.tensors.keys()
    assert all(torch.equal(again.tensors[key], opened.tensors[key]) for key in again.tensors)


def test_a_file_that_does_not_add_up_names_what_is_missing(tmp_path):
    opened = open_checkpoint("tinyvit_sam_2m")
    tensors = dict(opened.tensors)
    del tensors["layers.1.blocks.0.attn.qkv.weight"]
    path = write_state_dict(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"1 missing: .*layers.1.blocks.0.attn.qkv.weight"):
        open_checkpoint(path)


def test_a_file_without_an_encoder(tmp_path):
    opened = open_checkpoint("tinyvit_sam_2m")
    tensors = {k: v for k, v in opened.tensors.items() if k.startswith("mask_decoder.")}
    path = write_state_dict(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_name_nobody_knows():
    with pytest.raises(CheckpointError, match=r"did you mean 'mobile_sam'"):
        find_checkpoint("mobilesam")


def test_a_folder_of_save_pretrained_says_how_to_load_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"load it with tinyvit\.from_pretrained"):
        find_checkpoint(tmp_path)


def test_what_does_not_fit_in_words():
    wrong = {"d": ((1, 2), (3,))}
    assert misfits(["a", "b"], ["c"], wrong) == [
        "2 missing: a, b",
        "1 unexpected: c",
        "d has shape [3] instead of [1, 2]",
    ]
    assert misfits([], [], {}) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value):
    tensors = dict(open_checkpoint("tinyvit_sam_2m").tensors)
    tensors["neck.0.weight"] = tensors["neck.0.weight"].clone()
    tensors["neck.0.weight"][0, 0] = value
    path = write_state_dict(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"no numbers \(nan or inf\) in neck\.0\.weight: "):
        open_checkpoint(path)
    assert "no numbers (nan or inf): neck (neck.0.weight)" in " ".join(inspect(path).remarks)


def split(folder, tensors, suffix, write):
    names = [f"model-{i:05}-of-00003{suffix}" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        write(folder / name, dict(list(tensors.items())[i::3]))
    return names


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("has_index", [True, False])
def test_a_model_in_parts_is_joined(tmp_path, suffix, has_index):
    """transformers writes large models so: some parts, and an index that says what is where."""
    whole = {f"module.{k}": t for k, t in open_checkpoint("tinyvit_sam_2m").tensors.items()}
    container = "safetensors" if suffix == ".safetensors" else "torch"
    names = split(tmp_path, whole, suffix, lambda path, t: write_state_dict(path, t, container))
    index = tmp_path / f"model{suffix}.index.json"
    if has_index:
        weight_map = {key: names[i % 3] for i, key in enumerate(whole)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (*((index,) if has_index else ()), tmp_path / names[1]):
        opened = open_checkpoint(path)
        assert {f"module.{key}" for key in opened.tensors} == whole.keys()
        assert all(torch.equal(t, whole[f"module.{key}"]) for key, t in opened.tensors.items())
    (tmp_path / names[0]).unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / names[1])
    assert f"{names[1]} is part 2 of 3 of a model, and {names[0]} is not beside it" in str(
        caught.value
    )
    if has_index:
        with pytest.raises(
            CheckpointError, match="is the index of the parts of a model, and model"
        ):
            open_checkpoint(index)


def test_an_index_of_something_else(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is no index of a model in parts; wanted JSON"):
        open_checkpoint(tmp_path / "model.safetensors.index.json")
