from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch

from checkpoints.families import small
from checkpoints.server import serving
from tinyvit.catalog import get_checkpoint
from tinyvit.checkpoints import file_sha256, read_state_dict, write_state_dict
from tinyvit.checkpoints.download import cache_folder
from tinyvit.checkpoints.families import LAYOUTS
from tinyvit.cli.weights import FAMILIES, to_option
from tinyvit.hub import save_pretrained

BODY = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()

# --- inspect -------------------------------------------------------------------------------------


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


def test_the_embedded_weights_and_folders_are_files_too(run, tmp_path, make_tiny_vit):
    result = run("inspect", "tinyvit_sam_2m")
    assert facts_of(result.out)["variant"] == "tiny_vit_2m_sam"
    assert facts_of(result.out)["head"] == "none"
    save_pretrained(make_tiny_vit(), tmp_path / "saved")
    assert facts_of(run("inspect", tmp_path / "saved").out)["head"] == "5 classes"


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


# --- convert -------------------------------------------------------------------------------------


def test_the_families_are_those_of_the_library():
    assert set(FAMILIES) == set(LAYOUTS)


def test_says_what_was_written_and_what_was_dropped_and_why(run, tmp_path):
    target = tmp_path / "encoder.safetensors"
    result = run("convert", "tinyvit_sam_2m", target, "--to", "tinyvit")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].endswith("sam_2m.safetensors (tinyvit_sam)")
    assert lines[1] == f"wrote    {target} (tinyvit, safetensors, 271 tensors, 4.3 MB)"
    assert "has no prompt encoder (prompt_encoder." in lines[2]
    assert "has no mask decoder (mask_decoder." in lines[3]
    assert lines[3].endswith(", ...)")
    assert result.err == "--json names every tensor that was dropped\n"
    assert len(read_state_dict(target).tensors) == 271


def test_nothing_dropped_is_said(run, tmp_path):
    source = write_state_dict(tmp_path / "a.safetensors", small("timm"))
    result = run("convert", source, tmp_path / "b.pth", "--to", "cream")
    assert result.code == 0
    assert "\ndropped" not in result.out
    assert result.err == "nothing was dropped\n"


def test_json_names_everything(run, tmp_path):
    target = tmp_path / "b.safetensors"
    report = run("convert", "tinyvit_sam_2m", target, "--to", "tinyvit", "--json").json
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
    odd = run("convert", checkpoints / "encoder.safetensors", tmp_path / "b.xyz", "--to", "tinyvit")
    assert odd.code == 1
    assert "b.xyz' has no suffix that says what to write; name it with one of .safeten" in odd.err
    assert "the name of the checkpoint is empty" in run("inspect", "").err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_is_wrong_usage(run, tmp_path):
    result = run("convert", "a", "b", "--to", "Mobile-SAM")
    assert result.code == 2
    assert "unknown family 'Mobile-SAM'; did you mean 'mobile_sam'? Choose one of" in result.err
    assert "did you mean" not in run("convert", "a", "b", "--to", "qqq").err


def test_families_are_completed():
    assert to_option.autocompletion("mobile") == [
        "mobile_sam",
        "mobile_sam_v2",
        "mobile_sam_v2_decoder",
    ]


# --- download ------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A mirror that has one file, of a checkpoint whose hash nobody states."""
    with serving() as server:
        server.files["tinysam_42.3.pth"] = BODY
        monkeypatch.setenv("TINYVIT_MIRROR", server.url("").rstrip("/"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.delenv("TINYVIT_OFFLINE")
        yield server


def test_the_embedded_file_s_path_is_printed(run):
    result = run("download", "tinyvit_sam_2m")
    assert (result.code, result.err) == (0, "")
    assert Path(result.out.removesuffix("\n")).is_file()


def test_fetches_prints_the_path_and_keeps_the_file(run, server):
    path = cache_folder() / "tinysam_42.3.pth"
    result = run("download", "tinysam", "--sha256", DIGEST)
    assert (result.code, result.out) == (0, f"{path}\n")
    assert result.err == (
        "fetching tinysam (Apache-2.0), published at https://github.com/xinghaochen/TinySAM\n"
    )
    assert path.read_bytes() == BODY
    again = run("download", "tinysam", "--sha256", DIGEST)
    assert (again.code, again.out, again.err) == (0, f"{path}\n", "")
    assert len(server.requests) == 1


def test_an_unpinned_file_is_a_warning_of_one_line(run, server):
    result = run("-q", "download", "tinysam")
    assert result.code == 0
    assert result.err.startswith("warning: nobody states a sha256 for tinysam_42.3.pth")
    assert result.err.count("\n") == 1
    assert "give it as --sha256 HASH to pin it" in result.err


def test_json_and_a_folder_of_one_s_own(run, server, tmp_path):
    words = ("--cache-dir", tmp_path / "mine", "--sha256", DIGEST, "--json")
    content = run("download", "tinysam", *words).json
    assert content["path"] == str(tmp_path / "mine" / "tinysam_42.3.pth")
    assert content["bytes"] == len(BODY)
    assert content["sha256"] == DIGEST
    assert content["licence"] == get_checkpoint("tinysam").licence
    assert set(content) == {
        *("name", "path", "bytes", "sha256", "variant", "family", "licence", "source"),
        *("embedded", "note"),
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mobile_sm"], "did you mean 'mobile_sam'? List them with 'tinyvit models'"),
        (["mobile_sam", "--sha256", "ab"], "sha256 must be 64 hexadecimal digits"),
        (["mobile_sam"], "TINYVIT_OFFLINE"),
        (["tinyvit_sam_2m", "--sha256", "0" * 64], "was changed"),
    ],
)
def test_errors_are_one_line(run, words, expected):
    result = run("download", *words, "-q")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert expected in result.err
    assert result.err.count("\n") == 1
