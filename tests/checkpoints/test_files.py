from __future__ import annotations

import errno
import hashlib
import io
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

from checkpoints.families import assert_same
from tinyvit.checkpoints.files import (
    CLASSES,
    IMAGE_SPEC,
    THRESHOLDS,
    check_format,
    check_thresholds,
    classes_in,
    header_for,
    image_spec_in,
    kind_of,
    read_arrays,
    read_state_dict,
    thresholds_in,
    weights_sha256,
    write_bytes,
    write_state_dict,
    write_text,
)
from tinyvit.checkpoints.unwrap import looks_like_web_page, wanted_imports
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
HERE = os.system.__module__  # "posix" or "nt"


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
    assert "describes 72 bytes, the file has 40" in refusal(written(path, whole[:40]))


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


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def refusal(path: Path) -> str:
    """The one-line error a file gives; the folder must stay as it was."""
    before = sorted(path.parent.iterdir()) if path.parent.exists() else []
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert before == (sorted(path.parent.iterdir()) if path.parent.exists() else [])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def save(path: Path, content: object, **options: object) -> Path:
    with path.open("wb") as file:
        torch.save(content, file, **options)  # type: ignore[arg-type]
    return path


# --- what can be read -----------------------------------------------------------------------------


def test_safetensors_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_file(STATE, path, metadata={"format": "pt", "tinyvit.strides": "2,2,1"})
    found = read_state_dict(path)
    assert_same(found.tensors, STATE)
    assert found.container == "safetensors"
    assert found.metadata["tinyvit.strides"] == "2,2,1"
    assert found.size == path.stat().st_size


@pytest.mark.parametrize(("new", "kind"), [(True, "torch zip"), (False, "torch legacy")])
def test_torch_files(tmp_path: Path, new: bool, kind: str) -> None:
    path = save(tmp_path / "plain.pth", STATE, _use_new_zipfile_serialization=new)
    assert read_state_dict(path).container == kind
    content = {"model": STATE, "epoch": 7}
    path = save(tmp_path / "wrapped.pth", content, _use_new_zipfile_serialization=new)
    found = read_state_dict(path)
    assert_same(found.tensors, STATE)
    assert found.container == f"{kind}, {{'model': …}}"
    assert found.extras == ("epoch = 7",)
    assert found.size == path.stat().st_size


# --- what cannot ----------------------------------------------------------------------------------


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    row = {"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(row).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "looks like safetensors but is damaged" in refusal(path)


def test_truncated_torch_files(tmp_path: Path) -> None:
    for new in (True, False):
        path = save(tmp_path / f"{new}.pt", STATE, _use_new_zipfile_serialization=new)
        whole = path.read_bytes()
        for keep in (0.3, 0.6, 0.97):
            path.write_bytes(whole[: int(len(whole) * keep)])
            assert "cut off" in refusal(path) or "damaged" in refusal(path)


def test_damage_inside_a_torch_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00X\xff\xff")
        archive.writestr("archive/version", "3\n")
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("new", [True, False])
def test_a_malicious_file_is_named_and_not_run(tmp_path: Path, new: bool) -> None:
    mark = tmp_path / "mark"
    content = {"model": STATE, "hook": Harmful(mark)}
    path = save(tmp_path / "evil.pt", content, _use_new_zipfile_serialization=new)
    text = refusal(path)
    assert not mark.exists()
    assert "was refused and nothing in it was run" in text
    assert f"{os.system.__module__}.system" in text


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_malicious_plain_pickle_is_not_opened(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps([Harmful(mark), Harmful(mark)], protocol=protocol))
    text = refusal(path)
    assert not mark.exists()
    assert f"plain pickle that wants to import {os.system.__module__}.system" in text
    path.write_bytes(pickle.dumps({"a": [1]}, protocol=protocol))
    assert "is a plain pickle; it was not opened" in refusal(path)


def test_a_whole_pickled_module_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = save(tmp_path / "tinysam_w8a8.pth", torch.nn.Sequential(torch.nn.Linear(2, 2)))
    text = refusal(path)
    assert "a whole pickled model (an nn.Module), not a state dict" in text
    assert "torch.nn.modules.linear.Linear" in text


def test_many_imports_are_shortened(tmp_path: Path) -> None:
    layers = [getattr(torch.nn, n)() for n in ("ReLU", "GELU", "Tanh", "SiLU", "ELU", "CELU")]
    layers += [torch.nn.Linear(1, 1), torch.nn.Identity(), torch.nn.Flatten()]
    path = save(tmp_path / "a.pth", torch.nn.Sequential(*layers))
    assert " more. tinyvit reads tensors only" in refusal(path)


def test_safetensors_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    assert "holds no tensors" in refusal(tmp_path / "a.safetensors")


def test_torch_files_without_tensors(tmp_path: Path) -> None:
    assert "holds no tensors; it holds epoch = 3" in refusal(save(tmp_path / "a.pt", {"epoch": 3}))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.pt", STATE)

    def forbidden(*_: object, **__: object) -> object:
        raise PermissionError(13, "no")

    monkeypatch.setattr(torch, "load", forbidden)
    assert "may not be read by this user" in refusal(path)


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_written_files_come_back_bit_for_bit(tmp_path: Path, container: str) -> None:
    bits = torch.tensor([0x7FC00001, -1, 0, 1], dtype=torch.int32).view(torch.float32)  # NaNs
    big = torch.randn(100)
    state = {
        "nan": bits,
        "half": torch.randn(3).half(),
        "view": big[10:20],
        "turned": torch.randn(3, 4).T,
        "shared": big,
        "again": big,
        "scalar": torch.tensor(5),
        "nothing": torch.zeros(0, 3),
    }
    path = write_state_dict(tmp_path / "a.bin", state, container)  # type: ignore[arg-type]
    found = read_state_dict(path).tensors
    assert torch.equal(found["nan"].view(torch.int32), bits.view(torch.int32))
    state.pop("nan"), found.pop("nan")
    assert_same(found, state)
    assert path.stat().st_size < 6000
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    one = write_state_dict(tmp_path / "one.pt", STATE, "torch").read_bytes()
    two = write_state_dict(tmp_path / "two.pt", STATE, "torch").read_bytes()
    assert one == two
    notes = {name: f"{name} é" for name in "hgfedcba"}
    path = tmp_path / "a.safetensors"
    contents = {write_state_dict(path, STATE, metadata=notes).read_bytes() for _ in range(4)}
    assert len(contents) == 1
    assert read_state_dict(path).metadata == {"format": "pt", **notes}


def test_arguments_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a \.safetensors file is safetensors"):
        write_state_dict(tmp_path / "a.safetensors", STATE, "torch")
    with pytest.raises(ValueError, match="wrapper='model' is for torch files"):
        write_state_dict(tmp_path / "a", STATE, wrapper="model")
    with pytest.raises(ValueError, match="metadata is for safetensors"):
        write_state_dict(tmp_path / "a", STATE, "torch", metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, step: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(_: object, target: io.BufferedWriter | Path, **__: object) -> None:
        if isinstance(target, Path):
            target.write_bytes(b"half")
        else:
            target.write(b"half")
        full()

    if step == "write":
        monkeypatch.setattr("safetensors.torch.save_file", half)
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left"):
        write_state_dict(path, STATE, container)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_state_dict(tmp_path / "a.bin", STATE)
    assert list(tmp_path.iterdir()) == []


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .*missing to write a\.pt in; make it"):
        write_state_dict(tmp_path / "missing" / "a.pt", STATE, "torch")
    with pytest.raises(CheckpointError):
        write_state_dict(tmp_path / "missing" / "a.safetensors", STATE)


def test_text_and_bytes_are_written_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a.txt", "ä\n")
    write_bytes(tmp_path / "b.bin", memoryview(b"123"))
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"123"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.bin"]
    with pytest.raises(CheckpointError, match=r"no folder .* make it"):
        write_text(tmp_path / "none" / "a.txt", "")


def test_the_hash_of_weights_is_that_of_float32_bytes(make_tiny_vit):
    """Written out by hand: what engines hashed before there was one function for it."""
    state = make_tiny_vit().state_dict()
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert weights_sha256(state) == digest.hexdigest()
    assert weights_sha256({k: t.numpy() for k, t in state.items()}) == digest.hexdigest()


def test_the_hash_of_weights_sees_names_shapes_and_values_but_neither_layout_nor_precision():
    a = {"x": torch.arange(4.0), "y": torch.tensor(1)}
    same = weights_sha256(a)
    assert weights_sha256(dict(reversed(a.items()))) == same
    assert weights_sha256({**a, "x": torch.arange(4.0).bfloat16()}) == same
    assert weights_sha256({**a, "x": torch.arange(4.0).view(2, 2)}) != same
    assert weights_sha256({**a, "x": torch.arange(4)}) != same
    assert weights_sha256({**a, "x": -torch.arange(4.0)}) != same
    assert weights_sha256({"z": a["x"], "y": a["y"]}) != same
    plain = torch.randn(2, 3, 4, 5)
    last = plain.contiguous(memory_format=torch.channels_last)
    assert weights_sha256({"a": plain}) == weights_sha256({"a": last})


def test_the_older_hash_tells_precisions_apart():
    x = torch.arange(4.0)
    assert weights_sha256({"x": x}, older=True) != weights_sha256({"x": x.bfloat16()}, older=True)
    assert weights_sha256({"x": torch.tensor(1.5)}, older=True) == (
        hashlib.sha256(b"x torch.float32 []\n\x00\x00\xc0\x3f").hexdigest()
    )


def test_formats_up_to_the_newest_known_are_read():
    assert check_format(None, 2, None, "it") == 0
    assert check_format(2, 2, "0.3", "it") == 2
    wanted = r"it was written by tinyvit 9\.0, format 3; this reads up to 2; upgrade tinyvit"
    with pytest.raises(CheckpointError, match=wanted):
        check_format(3, 2, "9.0", "it")
    for wrong in ("2", 1.0, True, -1):
        with pytest.raises(CheckpointError, match="it: format must be a whole number"):
            check_format(wrong, 2, None, "it")


NAMES = ("ant", "bée", "cat \U0001f408")


def test_what_is_written_is_read(tmp_path):
    spec = ImageSpec.timm(48)
    header = header_for("tinyvit", (2, 2, 2), spec, NAMES)
    assert header["tinyvit.strides"] == "2,2,2"
    path = write_state_dict(
        tmp_path / "a.safetensors", {"x": torch.zeros(2, dtype=torch.bfloat16)}, metadata=header
    )
    found = read_state_dict(path).metadata
    assert header.items() <= found.items()
    assert image_spec_in(found) == spec
    assert classes_in(found) == NAMES


def test_files_of_others_say_nothing(tmp_path):
    plain = write_state_dict(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    torch_file = write_state_dict(tmp_path / "a.pt", {"x": torch.zeros(2)}, "torch")
    for path in (plain, torch_file):
        header = read_state_dict(path).metadata
        assert CLASSES not in header and IMAGE_SPEC not in header
        assert image_spec_in(header) is None and classes_in(header) is None


@pytest.mark.parametrize(
    "header, words",
    [
        ({CLASSES: "{"}, "a.pt: tinyvit.classes in the header is damaged"),
        ({CLASSES: '["a", 1]'}, "must be a JSON list of names"),
        ({CLASSES: '{"a": 1}'}, "must be a JSON list of names"),
    ],
)
def test_damaged_classes(header, words):
    with pytest.raises(CheckpointError, match=words):
        classes_in(header, "a.pt")


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"size": [1, 1]}), "null"])
def test_a_damaged_preparation(text):
    with pytest.raises(CheckpointError, match=r"tinyvit\.image_spec in the header is damaged"):
        image_spec_in({IMAGE_SPEC: text})


@pytest.mark.parametrize(
    "thresholds, words",
    [
        ([], "must be an object of numbers"),
        ({"score": 1}, "unknown threshold 'score'; there are mask_threshold, "),
        ({"mask_threshold": "0"}, "mask_threshold must be a finite number, got '0'"),
        ({"mask_threshold": True}, "must be a finite number"),
        ({"pred_iou_thresh": float("nan")}, "must be a finite number"),
    ],
)
def test_thresholds_that_are_none(thresholds, words):
    with pytest.raises(ValueError, match=words):
        check_thresholds(thresholds)
    with pytest.raises(CheckpointError, match=f"a.pt: tinyvit.thresholds .* damaged: .*{words}"):
        thresholds_in({THRESHOLDS: json.dumps(thresholds)}, "a.pt")


def test_thresholds_are_written_and_read():
    given = {"mask_threshold": -1, "pred_iou_thresh": 0.8}
    header = header_for("tinyvit_sam", (2, 2, 1), thresholds=given)
    assert thresholds_in(header) == {"mask_threshold": -1.0, "pred_iou_thresh": 0.8}
    none = header_for("tinyvit_sam", (2, 2, 1), thresholds={})
    assert THRESHOLDS not in none and thresholds_in(none) == {}


def test_safetensors_are_read_without_torch(tmp_path):
    state = {
        "a": torch.randn(2, 3),
        "b": torch.randn(5).bfloat16(),
        "c": torch.tensor(3),
        "d": torch.randn(2, 0).half(),
        "e": torch.tensor([True, False]),
    }
    path = write_state_dict(tmp_path / "a.safetensors", state, metadata={"x": "ä"})
    arrays, metadata = read_arrays(path)
    assert metadata == {"format": "pt", "x": "ä"}
    assert arrays.keys() == state.keys()
    for key, tensor in state.items():
        assert tuple(arrays[key].shape) == tuple(tensor.shape)
        assert arrays[key].tolist() == tensor.tolist()
    assert weights_sha256(arrays) == weights_sha256(state)
    assert weights_sha256(read_state_dict(path).tensors) == weights_sha256(state)


def test_only_torch_reads_files_of_torch(tmp_path):
    path = write_state_dict(tmp_path / "a.pt", {"x": torch.zeros(2)}, "torch")
    with pytest.raises(CheckpointError, match=r"which only torch can read; convert it"):
        read_arrays(path)
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(CheckpointError, match="x is of F8_E4M3, which numpy cannot hold"):
        read_arrays(path)
