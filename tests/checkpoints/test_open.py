from __future__ import annotations

import pytest
import torch

from tinyvit.catalog import get_checkpoint
from tinyvit.checkpoints.files import write_state_dict
from tinyvit.checkpoints.open import find_checkpoint, misfits, open_checkpoint
from tinyvit.errors import CheckpointError


def test_the_embedded_checkpoint_is_there():
    path, row = find_checkpoint("tinyvit_starter")
    assert path.is_file() and row == get_checkpoint("tinyvit_starter")


def test_a_checkpoint_is_read_whole(tmp_path):
    opened = open_checkpoint("tinyvit_starter")
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
    opened = open_checkpoint("tinyvit_starter")
    tensors = dict(opened.tensors)
    del tensors["layers.1.blocks.0.attn.qkv.weight"]
    path = write_state_dict(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"1 missing: .*layers.1.blocks.0.attn.qkv.weight"):
        open_checkpoint(path)


def test_a_file_without_an_encoder(tmp_path):
    opened = open_checkpoint("tinyvit_starter")
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
