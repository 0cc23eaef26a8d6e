from __future__ import annotations

import errno
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

from checkpoints.families import assert_same, small
from tinyvit.checkpoints import files
from tinyvit.checkpoints.files import read_state_dict, write_state_dict
from tinyvit.checkpoints.unwrap import wrap
from tinyvit.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)}


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


@pytest.mark.parametrize(
    ("wrapped", "words"),
    [
        (STATE, "torch zip"),
        ({"model": STATE}, "torch zip, {'model': …}"),
        ({"state_dict": {"model": STATE}}, "torch zip, {'state_dict': …}, {'model': …}"),
        ({"model_state": STATE, "epoch": 3}, "torch zip, {'model_state': …}"),
        (
            {f"module._orig_mod.{key}": value for key, value in STATE.items()},
            "torch zip, without the prefix 'module.', without the prefix '_orig_mod.'",
        ),
    ],
)
def test_wrappers_and_prefixes(tmp_path: Path, wrapped: object, words: str) -> None:
    found = read_state_dict(save(tmp_path / "a.pth", wrapped))
    assert_same(found.tensors, STATE)
    assert found.container == words


def test_legacy_torch_files(tmp_path: Path) -> None:
    path = save(tmp_path / "old.pth", {"model": STATE}, _use_new_zipfile_serialization=False)
    found = read_state_dict(path)
    assert_same(found.tensors, STATE)
    assert found.container == "torch legacy, {'model': …}"


def test_what_is_no_tensor_is_listed(tmp_path: Path) -> None:
    content = {"model": {**STATE, "note": "x"}, "epoch": 7, "optimizer": {"lr": 1, "m": 2}}
    found = read_state_dict(save(tmp_path / "a.pth", content))
    assert found.extras == ("epoch = 7", "optimizer (dict of 2)", "note = 'x'")


def test_parts_in_dicts_of_their_own(tmp_path: Path) -> None:
    content = {"PromtEncoder": {"p.weight": STATE["b"]}, "MaskDecoder": {"m.weight": STATE["b"]}}
    found = read_state_dict(save(tmp_path / "a.pt", content))
    assert set(found.tensors) == {"prompt_encoder.p.weight", "mask_decoder.m.weight"}


def test_a_second_decoder_beside(tmp_path: Path) -> None:
    state = small("micro_sam")
    nested = wrap(state, "model_state")
    assert set(nested) == {"model_state", "decoder_state"}
    nested["model_state"] = {f"sam.{key}": t for key, t in nested["model_state"].items()}
    found = read_state_dict(save(tmp_path / "vit_t.pt", nested))
    assert_same(found.tensors, state)


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"w": torch.nn.Parameter(torch.ones(2))})
    tensor = read_state_dict(path).tensors["w"]
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad


# --- what cannot ----------------------------------------------------------------------------------


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.pt")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refusal(tmp_path / "empty.pt")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_safetensors(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "is cut off" in refusal(path)
    path.write_bytes(whole[:40])
    assert "header of 64 bytes does not fit" in refusal(path)


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for header in (b'{"w": 3}', b'{"w": }}', b'{"w": {"dtype": "F32"}}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        assert "header is damaged" in refusal(path)
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


def test_web_page(tmp_path: Path) -> None:
    path = tmp_path / "mobile_sam.pt"
    path.write_bytes(b"\n <!DOCTYPE html><html><body>404</body></html>")
    assert "looks like a web page" in refusal(path)


def test_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "mobile_sam.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 40728226\n")
    assert "git-LFS pointer" in refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x1f\x8b\x08\x00", "gzip archive; unpack it first"),
        (b'{"error": "not found"}', "JSON text, perhaps an error message"),
        (b"just words\n", "is a text file, which is neither safetensors nor"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09", "begins with the bytes 00 01 02"),
        (b"\x80", "begins with the bytes 80"),
    ],
)
def test_other_things(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    text = refusal(path)
    assert "is not a checkpoint" in text
    assert words in text


def test_other_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    assert "a numpy .npz file" in refusal(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "a zip archive without a torch state dict" in refusal(tmp_path / "b.zip")


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
        archive.writestr("script/code/__torch__.py", b"")
    assert "TorchScript archive" in refusal(path)


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(2), "holds one tensor without a name"),
        ([1, 2], "holds list instead of a state dict"),
        ({"epoch": 3}, "holds no tensors; it holds epoch = 3"),
        ({}, "holds no tensors; it is no file of weights"),
    ],
)
def test_no_named_tensors(tmp_path: Path, content: object, words: str) -> None:
    assert words in refusal(save(tmp_path / "a.pt", content))


def test_safetensors_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    assert "holds no tensors" in refusal(tmp_path / "a.safetensors")


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
        monkeypatch.setattr(files, "save_file", half)
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
