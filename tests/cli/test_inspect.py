from __future__ import annotations

import re

import torch

from checkpoints.families import small
from tinyvit.checkpoints import file_sha256, write_state_dict
from tinyvit.hub import save_pretrained


def facts_of(out):
    """The lines of a report: name -> value."""
    lines = [line for line in out.split("\n\n")[0].splitlines() if line[:1] != " "]
    return {line[:12].strip(): line[12:] for line in lines}


def test_a_report_says_everything(run, tmp_path):
    path = tmp_path / "some file.pt"
    write_state_dict(path, small("mobile_sam"), "torch")
    result = run("inspect", path)
    assert result.code == 0
    assert result.err == ""
    facts = facts_of(result.out)
    assert {"tinysam", "ultralytics", "micro_sam"} <= set(facts.pop("same keys").split(", "))
    assert "float32" in facts.pop("dtype")
    assert re.fullmatch(r"[\d,]+ in \d+ tensors", facts.pop("parameters"))
    assert facts == {
        "file": str(path),
        "size": f"{path.stat().st_size / 1e6:.1f} MB, torch zip",
        "sha256": file_sha256(path),
        "family": "mobile_sam: MobileSAM",
        "variant": "none of the catalog",
        "parts": "trunk, head, neck, prompt encoder, mask decoder",
        "picture": "1024 x 1024, 3 channels",
        "stem": "conv",
        "strides": "2,2,1 assumed: no tensor shows strides, and MobileSAM is a SAM encoder",
        "head": "7 classes",
        "neck": "16 channels",
        "complete": "yes, nothing missing and nothing left over",
    }
    stages = [line.split() for line in result.out.split("\n\n")[1].splitlines()]
    assert stages == [
        ["stage", "of", "channels", "blocks", "heads", "window"],
        ["1", "convolution", "8", "1", "-", "-"],
        ["2", "attention", "16", "1", "2", "3"],
        ["3", "attention", "16", "2", "2", "4"],
        ["4", "attention", "32", "1", "4", "3"],
    ]
    remarks = result.out.split("\n\n")[2]
    assert remarks.startswith("remarks\n-  files of tinysam")
    assert "strides" not in remarks
    assert "-  the classification head of a SAM encoder was never trained" in remarks


def test_what_is_missing_left_over_or_misshapen_is_told(run, tmp_path):
    tensors = small("timm")
    del tensors["head.fc.bias"]
    tensors["extra.weight"] = torch.zeros(3)
    tensors["head.norm.bias"] = torch.zeros(5)
    path = write_state_dict(tmp_path / "odd.safetensors", tensors)
    result = run("inspect", path)
    assert result.code == 0
    words = "no: 1 missing, 1 left over, 1 of a wrong shape (--json names them)"
    assert facts_of(result.out)["complete"] == words
    assert "-  missing: head (head.fc.bias)\n" in result.out
    assert "-  left over: unknown (extra.weight)" in result.out
    found = run("inspect", path, "--json").json["detection"]
    assert found["missing"] == ["head.fc.bias"]
    assert found["unexpected"] == ["extra.weight"]
    assert found["wrong_shapes"] == {"head.norm.bias": {"wanted": [32], "found": [5]}}


def test_something_left_over_alone_is_still_complete(run, tmp_path):
    tensors = {**small("timm"), "extra.weight": torch.zeros(3)}
    path = write_state_dict(tmp_path / "odd.safetensors", tensors)
    assert facts_of(run("inspect", path).out)["complete"].startswith("yes: 1 left over")


def test_a_file_without_an_encoder_has_no_stages(run, tmp_path):
    path = tmp_path / "decoder.pt"
    write_state_dict(path, small("mobile_sam_v2_decoder"), "torch", "PromtEncoder")
    result = run("inspect", path)
    assert result.code == 0
    assert "stage" not in result.out
    assert "strides" not in facts_of(result.out)


def test_the_embedded_weights_and_folders_are_files_too(run, tmp_path, make_tiny_vit):
    result = run("inspect", "tinyvit_starter")
    assert facts_of(result.out)["variant"] == "tiny_vit_2m_sam"
    assert facts_of(result.out)["head"] == "none"
    save_pretrained(make_tiny_vit(), tmp_path / "saved")
    assert facts_of(run("inspect", tmp_path / "saved").out)["head"] == "5 classes"


def test_json_is_complete(run, checkpoints):
    content = run("inspect", checkpoints / "encoder.safetensors", "--json").json
    assert content["path"] == str(checkpoints / "encoder.safetensors")
    assert content["detection"]["architecture"]["embed_dims"] == [8, 12, 16, 24]
    assert content["detection"]["strides"] == [2, 2, 1]
    assert set(content) == {
        *("path", "size", "sha256", "container", "tensors", "extras", "metadata", "detection"),
        "remarks",
    }


def test_wrong_files_are_one_line(run, tmp_path, photo):
    empty = tmp_path / "empty.pt"
    empty.touch()
    for name, words in [
        (photo(tmp_path / "a.png"), "PNG image"),
        (empty, "empty"),
        (tmp_path / "none.pt", "no such file"),
        (tmp_path, "folder"),
        ("mobil_sam", "did you mean 'mobile_sam'? List them with 'tinyvit models'"),
        ("mobile_sam", "fetch it with: tinyvit download mobile_sam"),
    ]:
        result = run("inspect", name)
        assert result.code == 1
        assert result.out == ""
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert words in result.err
