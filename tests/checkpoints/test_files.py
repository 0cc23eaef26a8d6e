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

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.families import assert_same
from tinyvit.checkpoints.files import (
    check_format,
    read_state_dict,
    weights_sha256,
    write_bytes,
    write_state_dict,
    write_text,
)
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
