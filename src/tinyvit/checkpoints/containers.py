"""Which container a file of weights is, from its first bytes; what other files are, in words."""

from __future__ import annotations

import codecs
import json
import math
import zipfile
from pathlib import Path
from typing import Literal, TypeAlias

from tinyvit.errors import CheckpointError

from .unwrap import wanted_imports

Kind: TypeAlias = Literal["safetensors", "torch zip", "torch legacy"]
"""The containers that can hold a state dict."""

_HEAD_BYTES = 512
_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit
_ZIP = b"PK\x03\x04"
# torch.save before 1.6: a pickle of this number (protocol 2) comes first.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_FOREIGN = (
    (b"\x89HDF", "an HDF5 file (Keras or h5py)"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy .npy file"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7-zip archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    *((bytes([8, version, 18]), "an ONNX model") for version in (3, 4, 6, 7, 8)),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
)


def kind_of(path: Path) -> Kind:
    """Which container a file is.

    Raises:
        CheckpointError: There is no such file, it is a folder, empty, cut off, or something else
            than a checkpoint (a web page, a git-LFS pointer, a TorchScript archive, …).
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the file of weights inside it")
    if not path.exists():
        raise CheckpointError(
            f"no such file: {path}; check the path, or name a checkpoint of "
            "tinyvit.list_checkpoints()"
        )
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty; the download or copy failed, fetch it again")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_ZIP):
        return _kind_of_zip(path)
    if head.startswith(_LEGACY_MAGIC):
        return "torch legacy"
    if _check_safetensors(path, head, size):
        return "safetensors"
    raise CheckpointError(f"{path} is not a checkpoint: it {_describe(path, head)}")


def looks_like_web_page(head: bytes) -> bool:
    """Whether a file's first bytes are HTML or XML."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return text.startswith((b"<!doctype", b"<html", b"<?xml"))


def _kind_of_zip(path: Path) -> Kind:
    """Torch's zip files from others; the folder of a cut-off one is missing."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is cut off: it begins like a torch file of {path.stat().st_size} bytes but "
            "its end is missing; fetch it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as err:
        raise CheckpointError(f"{path} is damaged ({err}); fetch it again") from err
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, a compiled program and not a state dict; export "
            "its weights with torch.save(torch.jit.load(path).state_dict(), …) where you trust it"
        )
    if not any(name.endswith("data.pkl") for name in names):
        what = "a numpy .npz file" if any(n.endswith(".npy") for n in names) else "a zip archive"
        raise CheckpointError(
            f"{path} is not a checkpoint: it is {what} without a torch state dict; unpack it and "
            "name the file of weights inside"
        )
    return "torch zip"


def _check_safetensors(path: Path, head: bytes, size: int) -> bool:
    """Whether this is safetensors (8 bytes of header length, JSON, data); refused if cut off."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or not 2 <= length <= _MAX_SAFETENSORS_HEADER:
        return False
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is cut off: a safetensors header of {length} bytes does not fit into the "
            f"file's {size} bytes; fetch it again"
        )
    with path.open("rb") as file:
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [row["data_offsets"][1] for key, row in header.items() if key != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as err:
        raise CheckpointError(
            f"{path} looks like safetensors but its header is damaged ({err}); fetch it again"
        ) from err
    if math.isfinite(wanted) and wanted > size:
        raise CheckpointError(
            f"{path} is cut off: its safetensors header describes {wanted} bytes, the file has "
            f"{size}; fetch it again"
        )
    return True


def _describe(path: Path, head: bytes) -> str:
    """What a file that is no checkpoint looks like, and what to do: completes "it …"."""
    if looks_like_web_page(head):
        return (
            "looks like a web page saved under a checkpoint's name; download the file itself "
            "(on GitHub the 'raw' link, on Hugging Face the 'resolve' link)"
        )
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a git-LFS pointer of a few lines, not the file it stands for; "
            "run 'git lfs pull' in its repository or download the file itself"
        )
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            return f"is {what}"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] in range(2, 6):
        names = wanted_imports(path, "torch legacy")
        wants = f" that wants to import {', '.join(names)}" if names else ""
        return (
            f"is a plain pickle{wants}; it was not opened, because a pickle can run code. Save "
            "the tensors with safetensors or torch.save(model.state_dict(), …) where you trust it"
        )
    if head.lstrip()[:1] in (b"{", b"["):
        return "is JSON text, perhaps an error message of a server; fetch the file again"
    what = f"begins with the bytes {head[:8].hex(' ')}"
    try:  # a last character may be cut
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        if all(character.isprintable() or character in "\t\r\n" for character in text):
            what = "is a text file"
    except UnicodeDecodeError:
        pass
    return f"{what}, which is neither safetensors nor a file of torch.save"
