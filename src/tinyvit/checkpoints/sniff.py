"""Say what a file is from its bytes, before anything reads it as a checkpoint.

The suffix is never trusted. Either the file is one of three containers (``Kind``), or there is a
``CheckpointError`` that says what it looks like and what to do. Nothing is unpickled here: the
imports a pickle asks for are read off its opcodes, which runs no code. Knows no TinyViT.
"""

from __future__ import annotations

import codecs
import json
import math
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, TypeAlias

from tinyvit.errors import CheckpointError

__all__ = ["Kind", "kind_of", "looks_like_web_page", "wanted_imports"]

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
    (b"\x08\x03\x12", "an ONNX model"),
    (b"\x08\x04\x12", "an ONNX model"),
    (b"\x08\x06\x12", "an ONNX model"),
    (b"\x08\x07\x12", "an ONNX model"),
    (b"\x08\x08\x12", "an ONNX model"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
)

# What torch.save itself writes for tensors; everything else is worth naming.
_HARMLESS = ("torch._utils._rebuild", "torch.Size", "collections.OrderedDict", "torch._tensor.")


def kind_of(path: Path) -> Kind:
    """Return which container a file is.

    Args:
        path: The file.

    Returns:
        Its container.

    Raises:
        CheckpointError: If there is no such file, it is a folder, empty, cut off, or something
            else than a checkpoint (a web page, a git-LFS pointer, a TorchScript archive, …).
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
    """Tell whether a file's first bytes are those of a web page.

    Args:
        head: The first bytes of the file.

    Returns:
        True for HTML or XML.
    """
    return (
        head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml"))
    )


def wanted_imports(path: Path, kind: Kind) -> list[str]:
    """List what the pickle in a file would import, without unpickling it.

    Args:
        path: The file.
        kind: Its container.

    Returns:
        Sorted dotted names, without those that every saved tensor needs.
    """
    names: set[str] = set()
    if kind == "torch zip":
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(member) as file:
                names.update(_imports(file))
    else:
        with path.open("rb") as file:
            for _ in range(4):  # legacy files: magic, protocol, machine facts, the object
                names.update(_imports(file))
    return sorted(
        name
        for name in names
        if not name.startswith(_HARMLESS)
        and not (name.startswith("torch.") and name.endswith("Storage"))
    )


def _kind_of_zip(path: Path) -> Kind:
    """Tell torch's zip files from others; the folder of a cut-off one is missing."""
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
    """Tell whether this is safetensors, and refuse it if it is cut off.

    The format: 8 bytes of header length, a JSON header, then the data the header describes.
    """
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
    """Say what a file that is no checkpoint looks like, and what to do: completes "it …"."""
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
    what = "is a text file" if _is_text(head) else f"begins with the bytes {head[:8].hex(' ')}"
    return f"{what}, which is neither safetensors nor a file of torch.save"


def _is_text(head: bytes) -> bool:
    """Whether the first bytes are UTF-8 text; a last character may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n" for character in text)


def _imports(file: IO[bytes]) -> Iterator[str]:
    """Yield the dotted names that one pickle's opcodes import; stops at damage.

    A name is an argument of its own (GLOBAL), or the two texts on top of the stack (STACK_GLOBAL),
    which may come from the memo.
    """
    texts: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else ""
            elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[int(argument or 0)] = texts[-1] if texts else ""
            elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                texts.append(memo.get(int(argument or 0), ""))
            elif "UNICODE" in opcode.name:
                texts.append(str(argument))
    except (ValueError, IndexError, OverflowError):
        return  # a damaged pickle: what was read so far is all there is to name
