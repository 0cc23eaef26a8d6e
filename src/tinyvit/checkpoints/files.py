"""Read and write files of weights.

Reading never runs code from a file: safetensors has none, and torch files are read with
``weights_only=True`` only; what such a file would have imported is named instead. Writing is
all or nothing: a temporary file in the same folder, flushed to the disk, then renamed. What the
tensors mean is not known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinyvit.checkpoints.sniff import Kind, kind_of, wanted_imports
from tinyvit.checkpoints.unwrap import unwrap, wrap
from tinyvit.errors import CheckpointError

__all__ = ["StateFile", "file_sha256", "read_state_dict", "replacing", "write_state_dict"]

_CHUNK = 1 << 20


@dataclass(frozen=True)
class StateFile:
    """What a file of weights holds.

    Attributes:
        path: The file.
        tensors: Key -> tensor on the CPU, in the file's own spelling, wrappers taken off. They may
            be backed by the file; copy it elsewhere only by writing, never truncate it in place.
        container: The container in words, for example ``"torch zip, {'model': …}"``.
        metadata: Text written into a safetensors header.
        extras: Entries that are no tensors of the model, in words.
        size: Bytes on disk.
    """

    path: Path
    tensors: dict[str, Tensor]
    container: str
    metadata: dict[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    size: int = 0


def read_state_dict(path: str | os.PathLike[str]) -> StateFile:
    """Read the tensors of a safetensors or torch file.

    Args:
        path: The file; its suffix does not matter.

    Returns:
        The tensors and what was found around them.

    Raises:
        CheckpointError: If the file is missing, damaged, no checkpoint, would have to run code to
            be read, or holds no named tensors.
    """
    path = Path(path)
    try:
        kind = kind_of(path)
        size = path.stat().st_size
        if kind == "safetensors":
            return _read_safetensors(path, size)
        found = unwrap(_load_torch(path, kind), str(path))
    except PermissionError as err:
        raise CheckpointError(f"{path} may not be read by this user; change its rights") from err
    container = f"{kind}, {found.wrapping}" if found.wrapping else kind
    return StateFile(path, found.tensors, container, {}, found.extras, size)


def write_state_dict(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    container: Literal["safetensors", "torch"] = "safetensors",
    wrapper: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write tensors to a file, whole or not at all.

    Tensors that share memory or are views of larger ones are written as tensors of their own.

    Args:
        path: The file; an existing one is replaced at the end.
        tensors: Key -> tensor; written from the CPU in their own dtype, bit for bit.
        container: What to write. A ``.safetensors`` suffix allows nothing else.
        wrapper: For torch: the name of the dict that holds the state dict; None for none.
        metadata: For safetensors: text for the header; ``format`` is added.

    Returns:
        The path.

    Raises:
        ValueError: If the container contradicts the suffix, or an argument of the other container
            is given.
        CheckpointError: If the file cannot be written (no such folder, no space, no right).
    """
    path = Path(path)
    if container == "torch" and path.suffix == ".safetensors":
        raise ValueError(
            f"container='torch' does not fit {path.name}: a .safetensors file is safetensors; "
            "choose another suffix"
        )
    if wrapper is not None and container == "safetensors":
        raise ValueError(f"wrapper={wrapper!r} is for torch files; safetensors is always flat")
    if metadata is not None and container == "torch":
        raise ValueError("metadata is for safetensors; a torch file has no header to put it in")
    own = _own_memory(tensors)
    if container == "safetensors":
        header = {"format": "pt", **(metadata or {})}
        replacing(path, lambda temporary: _save_safetensors(own, temporary, header))
    else:
        replacing(path, lambda temporary: _save_torch(wrap(own, wrapper), temporary))
    return path


def replacing(path: Path, write: Callable[[Path], None]) -> None:
    """Let a function write a temporary file in the same folder, then rename it.

    Args:
        path: Where the file ends up.
        write: Called with the temporary path; may fail, then nothing is left behind.

    Raises:
        CheckpointError: If the operating system or safetensors refuses to write.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _removed_on_failure(temporary):
            temporary.touch()
            mode = temporary.stat().st_mode  # the user's umask; safetensors would make it private
            write(temporary)
            temporary.chmod(mode)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except FileNotFoundError as err:
        raise CheckpointError(f"no folder {path.parent} to write {path.name} in; make it") from err
    except (OSError, SafetensorError, RuntimeError) as err:
        raise CheckpointError(
            f"{path} could not be written: {_first_line(err)}; free space or choose another "
            "folder. Nothing was changed"
        ) from err


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    """Remove the temporary file however the block fails, also by Ctrl-C."""
    try:
        yield
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _save_safetensors(
    tensors: dict[str, Tensor], temporary: Path, metadata: dict[str, str]
) -> None:
    """``save_file`` with the metadata in a fixed order, so that equal content is equal bytes."""
    save_file(tensors, temporary, metadata=metadata)
    with temporary.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))  # the format pads with spaces


def _save_torch(content: dict[str, object], temporary: Path) -> None:
    """``torch.save`` into an open file, so that the temporary name is not written into it."""
    with temporary.open("wb") as file:
        torch.save(content, file)


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor contiguous memory that no other tensor shares and nothing is left of."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        is_whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not is_whole or storage.data_ptr() in seen:
            tensor = tensor.clone()
        elif storage.nbytes():
            seen.add(storage.data_ptr())
        own[key] = tensor
    return own


def _read_safetensors(path: Path, size: int) -> StateFile:
    """Read a safetensors file whose length has been checked."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as err:
        raise CheckpointError(
            f"{path} looks like safetensors but is damaged ({_first_line(err)}); fetch it again"
        ) from err
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; it is no file of weights")
    return StateFile(path, tensors, "safetensors", metadata, (), size)


def _load_torch(path: Path, kind: Kind) -> object:
    """Read a torch file without running code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch zip")
    except PermissionError:
        raise
    except pickle.UnpicklingError as err:
        raise CheckpointError(_refusal(path, kind, err)) from err
    except Exception as err:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(
            f"{path} is damaged or cut off: torch could not read it "
            f"({type(err).__name__}: {_first_line(err)}); fetch it again"
        ) from err


def _refusal(path: Path, kind: Kind, err: Exception) -> str:
    """Say why a torch file is refused: what it wanted to import, or that it is damaged."""
    names = wanted_imports(path, kind)
    if not names:
        return f"{path} is damaged: its pickle cannot be read ({_first_line(err)}); fetch it again"
    if any(".nn." in name or "quant" in name.lower() for name in names):
        what = "it holds a whole pickled model (an nn.Module), not a state dict"
    else:
        what = "it holds more than tensors"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"{path} was refused and nothing in it was run: {what}, and reading it would import "
        f"{shown}. tinyvit reads tensors only; where you trust the file, load it with its own "
        "project's code and save torch.save(model.state_dict(), …)"
    )


def _first_line(err: BaseException) -> str:
    """An error's first line with words in it."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(err).__name__
