from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tinyvit.checkpoints.files import kind_of, looks_like_web_page, wanted_imports
from tinyvit.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
HERE = os.system.__module__  # "posix" or "nt"


def refusal(path: Path) -> str:
    """The one-line error a file gives."""
    with pytest.raises(CheckpointError) as caught:
        kind_of(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


# --- containers -----------------------------------------------------------------------------------


def test_containers_under_any_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert kind_of(tmp_path / "a.pt") == "safetensors"
    assert kind_of(tmp_path / "a.safetensors") == "torch zip"
    assert kind_of(tmp_path / "old.bin") == "torch legacy"


def test_a_zip_with_a_damaged_directory(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry : entry + 4] = b"XXXX"
    with pytest.raises(CheckpointError, match=r"is damaged .*; fetch it again"):
        kind_of(written(tmp_path / "b.pt", bytes(content)))


def test_the_smallest_safetensors(tmp_path: Path) -> None:
    assert kind_of(written(tmp_path / "a", safetensors_bytes(b"{}"))) == "safetensors"
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    assert kind_of(written(tmp_path / "a", safetensors_bytes(header))) == "safetensors"


# --- what is none ---------------------------------------------------------------------------------


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.pt")
    assert "is a folder; name the file of weights inside it" in refusal(tmp_path)
    assert "is empty; the download or copy failed" in refusal(written(tmp_path / "empty.pt", b""))


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for keep in (len(whole) // 10, len(whole) // 2, len(whole) - 1):
        words = f"describes {len(whole)} bytes, the file has {keep}; fetch it again"
        assert words in refusal(written(path, whole[:keep]))
    assert "header of 64 bytes does not fit into the file's 40 bytes" in refusal(
        written(path, whole[:40])
    )


@pytest.mark.parametrize(
    "header",
    [b'{"w": 3}', b'{"w": }}', b'{"w": {"dtype": "F32"}}', b'{"w": {"data_offsets": [0]}}'],
)
def test_damaged_safetensors_header(tmp_path: Path, header: bytes) -> None:
    path = written(tmp_path / "a.safetensors", safetensors_bytes(header))
    assert "looks like safetensors but its header is damaged (" in refusal(path)


def test_truncated_torch_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    half = path.read_bytes()[: path.stat().st_size // 2]
    words = f"is cut off: it begins like a torch file of {len(half)} bytes but its end is missing"
    assert words in refusal(written(path, half))


def test_web_page(tmp_path: Path) -> None:
    page = b"\n <!DOCTYPE html><html><body>404</body></html>"
    text = refusal(written(tmp_path / "mobile_sam.pt", page))
    assert "looks like a web page saved under a checkpoint's name; download the file itself" in text


@pytest.mark.parametrize(
    ("head", "is_page"),
    [
        (b"<!doctype html>", True),
        (b"\xef\xbb\xbf\r\n\t <HTML lang=en>", True),
        (b"<?xml version='1.0'?><Error/>", True),
        (b"<svg>", False),
        (b"html", False),
        (b"PK\x03\x04<html>", False),
        (b"", False),
    ],
)
def test_what_looks_like_a_web_page(head: bytes, is_page: bool) -> None:
    assert looks_like_web_page(head) is is_page


def test_lfs_pointer(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 40728226\n"
    text = refusal(written(tmp_path / "mobile_sam.pt", pointer))
    assert "is a git-LFS pointer of a few lines" in text
    assert "run 'git lfs pull'" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"\x93NUMPY\x01\x00", "a numpy .npy file"),
        (b"\x1f\x8b\x08\x00", "gzip archive; unpack it first"),
        (b"\x08\x07\x12\x07pytorch", "an ONNX model"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b'{"error": "not found"}', "JSON text, perhaps an error message"),
        (b"just words\n", "is a text file, which is neither safetensors nor"),
        (("x" * 511 + "é").encode(), "is a text file, which is neither safetensors nor"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09", "begins with the bytes 00 01 02"),
        (b"\x80", "begins with the bytes 80"),
    ],
)
def test_other_things(tmp_path: Path, content: bytes, words: str) -> None:
    text = refusal(written(tmp_path / "a.pt", content))
    assert "is not a checkpoint" in text
    assert words in text


def test_other_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    assert "a numpy .npz file" in refusal(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "a zip archive without a torch state dict" in refusal(tmp_path / "b.zip")


@pytest.mark.parametrize("member", ["script/constants.pkl", "script/code/__torch__.py"])
def test_torchscript(tmp_path: Path, member: str) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr(member, b"")
    assert "is a TorchScript archive, a compiled program and not a state dict" in refusal(path)


def test_plain_pickle(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pkl", pickle.dumps({"a": [1]}, protocol=4))
    assert "is a plain pickle; it was not opened" in refusal(path)
    written(path, pickle.dumps(os.system, protocol=4))
    assert f"is a plain pickle that wants to import {HERE}.system; it was not" in refusal(path)


# --- imports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False])
def test_imports_of_torch_files(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({**STATE, "hook": os.system}, path, _use_new_zipfile_serialization=new)
    assert wanted_imports(path, kind_of(path)) == [f"{HERE}.system"]
    torch.save(STATE, path, _use_new_zipfile_serialization=new)
    assert wanted_imports(path, kind_of(path)) == []


@pytest.mark.parametrize("protocol", range(6))
def test_imports_of_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    # The second name takes its module's name from the memo, the repeated one is listed once.
    content = pickle.dumps([os.system, os.getcwd, os.system], protocol=protocol)
    path = written(tmp_path / "a.pkl", content)
    assert wanted_imports(path, "torch legacy") == [f"{HERE}.getcwd", f"{HERE}.system"]


def test_imports_by_the_oldest_opcode(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pkl", b"(ios\nsystem\n.")
    assert wanted_imports(path, "torch legacy") == ["os.system"]


def test_imports_before_the_damage_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pkl", b"\x80\x02cos\nsystem\n\xff\xff")
    assert wanted_imports(path, "torch legacy") == ["os.system"]
