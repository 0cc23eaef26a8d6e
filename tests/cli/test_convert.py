from __future__ import annotations

import torch

from checkpoints.families import small
from tinyvit.checkpoints import read_state_dict, write_state_dict
from tinyvit.checkpoints.families import LAYOUTS
from tinyvit.cli.weights import FAMILIES, matching_families


def test_the_families_are_those_of_the_library():
    assert set(FAMILIES) == set(LAYOUTS)


def test_says_what_was_written_and_what_was_dropped_and_why(run, tmp_path):
    target = tmp_path / "encoder.safetensors"
    result = run("convert", "tinyvit_starter", target, "--to", "tinyvit")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].endswith("starter.safetensors (tinyvit_sam)")
    assert lines[1] == f"wrote    {target} (tinyvit, safetensors, 271 tensors, 4.3 MB)"
    assert "has no prompt encoder (prompt_encoder." in lines[2]
    assert "has no mask decoder (mask_decoder." in lines[3]
    assert lines[3].endswith(", ...)")
    assert result.err == "--json names every tensor that was dropped\n"
    whole = read_state_dict(run("download", "tinyvit_starter").out.strip()).tensors
    part = read_state_dict(target).tensors
    assert all(torch.equal(part[key], whole[f"image_encoder.{key}"]) for key in part)


def test_nothing_dropped_is_said(run, tmp_path):
    source = write_state_dict(tmp_path / "a.safetensors", small("timm"))
    result = run("convert", source, tmp_path / "b.pth", "--to", "cream")
    assert result.code == 0
    assert "\ndropped" not in result.out
    assert result.err == "nothing was dropped\n"


def test_few_tensors_are_all_named(run, tmp_path):
    tensors = {**small("mobile_sam"), "image_encoder.layers.1.x.attention_bias_idxs": torch.ones(2)}
    tensors = {key: tensor for key, tensor in tensors.items() if "_decoder" not in key}
    tensors = {key: tensor for key, tensor in tensors.items() if "prompt" not in key}
    source = tmp_path / "a.pt"
    write_state_dict(source, {**small("mobile_sam"), **tensors}, "torch")
    result = run("convert", source, tmp_path / "b.pt", "--to", "mobile_sam")
    assert "dropped  1 tensor: index tables that no loader needs" in result.out
    assert "..." not in result.out
    assert result.err == ""


def test_notes_are_shown(run, tmp_path, checkpoints):
    result = run("convert", checkpoints / "five.safetensors", tmp_path / "b", "--to", "tinyvit")
    assert "note   there is no neck" in result.out


def test_json_names_everything(run, tmp_path):
    target = tmp_path / "b.safetensors"
    report = run("convert", "tinyvit_starter", target, "--to", "tinyvit", "--json").json
    assert report["target"] == str(target)
    assert report["family"] == "tinyvit"
    assert sum(len(keys) for keys in report["dropped"].values()) == 137


def test_an_existing_file_is_replaced_only_when_asked(run, tmp_path, checkpoints):
    target = tmp_path / "b.safetensors"
    target.write_text("mine")
    words = ("convert", checkpoints / "five.safetensors", target, "--to", "timm")
    result = run(*words)
    assert result.code == 1
    assert result.err.endswith("exists already; remove it, or convert with --overwrite\n")
    assert target.read_text() == "mine"
    assert run(*words, "--overwrite").code == 0
    assert run("inspect", target).out.split("family")[1].split()[0] == "timm:"


def test_what_cannot_be_is_one_line_and_writes_nothing(run, tmp_path, checkpoints):
    target = tmp_path / "b.pth"
    result = run("convert", checkpoints / "encoder.safetensors", target, "--to", "cream")
    assert result.code == 1
    assert "it has no head" in result.err
    assert result.err.count("\n") == 1
    assert run("convert", tmp_path / "none.pt", target, "--to", "cream").code == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_is_wrong_usage(run, tmp_path):
    result = run("convert", "a", "b", "--to", "Mobile-SAM")
    assert result.code == 2
    assert "unknown family 'Mobile-SAM'; did you mean 'mobile_sam'? Choose one of" in result.err
    assert "did you mean" not in run("convert", "a", "b", "--to", "qqq").err


def test_families_are_completed():
    assert matching_families("mobile") == ["mobile_sam", "mobile_sam_v2", "mobile_sam_v2_decoder"]
