"""What files are that are no checkpoints, in words."""

from __future__ import annotations

import codecs
import zipfile
from pathlib import Path

from tinyvit.errors import CheckpointError

from .unwrap import wanted_imports

_FOREIGN = (
    (b"\x89HDF", "an HDF5 file (Keras or h5py)"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy .npy file"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7-zip archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (
        (b"\x08\x03\x12", b"\x08\x04\x12", b"\x08\x06\x12", b"\x08\x07\x12", b"\x08\x08\x12"),
        "an ONNX model",
    ),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
)


def looks_like_web_page(head: bytes) -> bool:
    """Whether a file's first bytes are HTML or XML."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return text.startswith((b"<!doctype", b"<html", b"<?xml"))


def check_zip(path: Path) -> None:
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


def describe(path: Path, head: bytes) -> str:
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
