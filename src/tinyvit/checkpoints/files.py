"""Files of weights: which container, reading without running code, writing whole or not at all.

Besides tensors a safetensors header may hold JSON texts of ours: preparation, classes, thresholds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec

from .unwrap import check_zip, describe, first_line, refusal, unwrap, wanted_imports, wrap

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

T = TypeVar("T")

CLASSES = "tinyvit.classes"
"""Entry of a safetensors header: a list of names, in the order of the classes' numbers."""

IMAGE_SPEC = "tinyvit.image_spec"
"""Entry of a safetensors header: the object of ``ImageSpec.to_dict``."""

THRESHOLDS = "tinyvit.thresholds"
"""Entry of a safetensors header: an object with some of ``THRESHOLD_NAMES``."""

THRESHOLD_NAMES = (
    "mask_threshold",
    "pred_iou_thresh",
    "stability_score_thresh",
    "stability_score_offset",
)


def header_for(
    family: str,
    strides: Sequence[int],
    image_spec: ImageSpec | None = None,
    classes: Sequence[str] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Entries of a safetensors header for what belongs to weights; nothing for None or nothing."""
    header = {"tinyvit.family": family, "tinyvit.strides": ",".join(map(str, strides))}
    if image_spec is not None:
        header[IMAGE_SPEC] = json.dumps(image_spec.to_dict())
    if classes is not None:
        header[CLASSES] = json.dumps(list(classes), ensure_ascii=False)
    if thresholds:
        header[THRESHOLDS] = json.dumps(check_thresholds(thresholds))
    return header


def image_spec_in(
    header: Mapping[str, str], path: str | os.PathLike[str] = "the file"
) -> ImageSpec | None:
    """How images are prepared, where the header says so; a CheckpointError where it is damaged."""
    return _entry(header, IMAGE_SPEC, path, ImageSpec.from_dict)


def classes_in(
    header: Mapping[str, str], path: str | os.PathLike[str] = "the file"
) -> tuple[str, ...] | None:
    """Names of the classes, where the header has them; errors as ``image_spec_in``'s."""

    def names(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError("it must be a JSON list of names")
        return tuple(value)

    return _entry(header, CLASSES, path, names)


def thresholds_in(
    header: Mapping[str, str], path: str | os.PathLike[str] = "the file"
) -> dict[str, float]:
    """Thresholds of the masks, where the header has some; errors as ``image_spec_in``'s."""
    return _entry(header, THRESHOLDS, path, check_thresholds) or {}


def check_thresholds(thresholds: object) -> dict[str, float]:
    """Thresholds as plain data; a ValueError refuses other names, and what is no finite number."""
    if not isinstance(thresholds, Mapping):
        raise ValueError(f"thresholds must be an object of numbers, got {thresholds!r}")
    for name, value in thresholds.items():
        if name not in THRESHOLD_NAMES:
            raise ValueError(f"unknown threshold {name!r}; there are {', '.join(THRESHOLD_NAMES)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"threshold {name} must be a finite number, got {value!r}")
    return {name: float(value) for name, value in thresholds.items()}


def _entry(
    header: Mapping[str, str], name: str, path: str | os.PathLike[str], read: Callable[[Any], T]
) -> T | None:
    if name not in header:
        return None
    try:
        return read(json.loads(header[name]))
    except (ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path}: {name} in the header is damaged: {err}") from err


Kind: TypeAlias = Literal["safetensors", "torch zip", "torch legacy"]
"""The containers that can hold a state dict."""

_HEAD_BYTES = 512
_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit
_ZIP = b"PK\x03\x04"
# torch.save before 1.6: a pickle of this number (protocol 2) comes first.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


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
        check_zip(path)
        return "torch zip"
    if head.startswith(_LEGACY_MAGIC):
        return "torch legacy"
    if _check_safetensors(path, head, size):
        return "safetensors"
    raise CheckpointError(f"{path} is not a checkpoint: it {describe(path, head)}")


def _check_safetensors(path: Path, head: bytes, size: int) -> bool:
    """Whether this is safetensors (8 bytes of header length, JSON, data); refused if cut off."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or not 2 <= length <= _MAX_SAFETENSORS_HEADER:
        return False
    wanted = 8 + length
    try:
        if wanted <= size:
            header, _ = _read_header(path)
            ends = [row["data_offsets"][1] for key, row in header.items() if key != "__metadata__"]
            wanted += max(ends, default=0)
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
        path: The file; its suffix does not matter. Or a folder of ``save_pretrained``, or the index
            or any part of a model in parts.

    Returns:
        The tensors and what was found around them.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, would have to run code to
            be read, or holds no named tensors.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    try:
        shards = _shards(path)
        loaded = [_load(file) for file in shards or [path]]
        size = sum(file.stat().st_size for file in shards or [path])
    except PermissionError as err:
        raise CheckpointError(f"{path} may not be read by this user; change its rights") from err
    content, kind, _ = loaded[0]
    header = {key: text for _, _, texts in loaded for key, text in texts.items()}
    if shards:
        content = {}
        for file, (part, kind, _) in zip(shards, loaded, strict=True):
            content |= part if kind == "safetensors" else unwrap(part, str(file)).tensors
    if not header.keys().isdisjoint(_AS_THEY_ARE):
        return StateFile(path, content, kind, header, (), size)
    found = unwrap(content, str(path))
    container = f"{len(shards)} parts" if shards else kind
    container = ", ".join(filter(None, (container, found.wrapping)))
    return StateFile(path, found.tensors, container, header, found.extras, size)


_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.[^.]+)$")
_INDEX = ".index.json"


def _shards(path: Path) -> list[Path]:
    """The files of a model in parts, if ``path`` is their index or one of them; else none."""
    match = _SHARD.match(path.name)
    if match is None and not path.name.endswith(_INDEX):
        return []
    index = path
    if match is not None:
        index = path.with_name(f"{match[1]}{match[4]}{_INDEX}")
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise CheckpointError(
                f"{index} is no index of a model in parts; wanted JSON with 'weight_map'"
            ) from err
    elif match is not None:
        count = int(match[3])
        names = [f"{match[1]}-{i:05}-of-{count:05}{match[4]}" for i in range(1, count + 1)]
    else:
        return []
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        what = f"part {int(match[2])} of {int(match[3])}" if match else "the index of the parts"
        verb = "is" if len(missing) == 1 else "are"
        raise CheckpointError(
            f"{path} is {what} of a model, and {', '.join(missing)} {verb} not beside it; fetch "
            "all parts into one folder"
        )
    return [path.with_name(name) for name in names]


def read_whole(path: Path) -> dict[str, Any]:
    """All that a file holds, wrappers and what lies beside the model included."""
    content = _load(path)[0]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__} instead of named tensors")
    return content


def non_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Names of the tensors, of torch or numpy, that hold a nan or an infinity."""
    return [
        key
        for key, tensor in tensors.items()
        if (
            tensor.is_floating_point() and not bool(tensor.isfinite().all())
            if hasattr(tensor, "isfinite")
            else tensor.dtype.kind == "f" and not np.isfinite(tensor).all()
        )
    ]


def check_finite(tensors: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse weights that are no numbers."""
    bad = non_finite(tensors)
    if bad:
        few = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise CheckpointError(
            f"{path} holds values that are no numbers (nan or inf) in {few}: the training that "
            "wrote it diverged, or the file is damaged; use an earlier checkpoint"
        )


_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays and the texts in the header of a safetensors file, without torch.

    Arrays are read-only and backed by the file; bfloat16, which numpy has not, comes as float32.
    """
    path = Path(path)
    if (kind := kind_of(path)) != "safetensors":
        raise CheckpointError(
            f"{path} is a file of torch.save ({kind}), which only torch can read; convert it with "
            "'tinyvit convert' where torch is installed"
        )
    header, start = _read_header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")[start:]
    metadata = header.pop("__metadata__", {})
    arrays: dict[str, NDArray[Any]] = {}
    for key, row in header.items():
        if row["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {key} is of {row['dtype']}, which numpy cannot hold")
        begin, end = row["data_offsets"]
        array = np.frombuffer(data[begin:end], dtype=_DTYPES[row["dtype"]])
        if row["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        arrays[key] = array.reshape(row["shape"])
    return arrays, metadata


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
        ValueError: The container contradicts the suffix, or an argument of the other container
            is given.
        CheckpointError: The file cannot be written (no such folder, no space, no right).
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

    def write(temporary: Path) -> None:
        import torch

        if container == "safetensors":
            _save_safetensors(own, temporary, {"format": "pt", **(metadata or {})})
        else:
            with temporary.open("wb") as file:  # a path would be written into the file
                torch.save(wrap(own, wrapper), file)

    replacing(path, write)
    return path


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _save_safetensors(
    tensors: dict[str, Tensor], temporary: Path, metadata: dict[str, str]
) -> None:
    """``save_file`` with the metadata in a fixed order: equal content is equal bytes."""
    from safetensors.torch import save_file

    save_file(tensors, temporary, metadata=metadata)
    header, start = _read_header(temporary)
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= start - 8:
        with temporary.open("rb+") as file:
            file.seek(8)
            file.write(text.ljust(start - 8))  # the format pads with spaces


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


def replacing(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file in the same folder, then rename it; nothing else stays.

    A CheckpointError says that the operating system or safetensors refuses to write.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
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
            f"{path} could not be written: {first_line(err)}; free space or choose another "
            "folder. Nothing was changed"
        ) from err
    finally:  # it is there after a failure only, Ctrl-C too
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder if need be; CheckpointError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CheckpointError(f"{folder} cannot be made a folder: {err}; choose another") from err


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file, whole or not at all; errors as ``replacing``'s."""
    replacing(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all; errors as ``replacing``'s."""
    write_bytes(path, text.encode())


def check_format(found: object, supported: int, writer: object, what: str) -> int:
    """The number of a file's format; None, as in files of the first versions, is 0.

    Raises:
        CheckpointError: It is newer than ``supported``, or no number; ``writer`` (the version of
            tinyvit that the file names) and ``what`` (the file) are named.
    """
    if found is None:
        return 0
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise CheckpointError(f"{what}: format must be a whole number, got {found!r}")
    if found > supported:
        raise CheckpointError(
            f"{what} was written by tinyvit {writer or '(unknown version)'}, format {found}; this "
            f"reads up to {supported}; upgrade tinyvit"
        )
    return found


def weights_sha256(tensors: Mapping[str, NDArray[Any] | Tensor], older: bool = False) -> str:
    """The one hash of weights: SHA-256 over the name, dtype, shape and bytes of every tensor.

    Floating-point tensors count as float32, so the same weights have the same hash in every
    container and precision they are exactly held in. ``older`` is the form of the first versions
    in LoRA files: each tensor of torch in its own dtype.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor: Any = tensors[key]
        if older:
            import torch

            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            array = _as_float32(tensor)
            digest.update(f"{key} torch.{array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _as_float32(tensor: Any) -> NDArray[Any]:
    """A tensor of torch or numpy as an array; float32 if it is of floating point."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    array = np.asarray(tensor)
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# Entries in headers of our own files, in which no model is wrapped: weights, states of a training,
# low-rank additions, stores of teachers.
_AS_THEY_ARE = ("tinyvit.family", "run", "tinyvit.lora", "tinyvit.store")


def _load(path: Path) -> tuple[Any, Kind, dict[str, str]]:
    """What a file holds, its container, and the texts in its header; runs no code of the file."""
    import torch

    kind = kind_of(path)
    try:
        if kind == "safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, kind, dict(file.metadata() or {})
        is_zip = kind == "torch zip"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip), kind, {}
    except PermissionError:
        raise
    except SafetensorError as err:
        raise CheckpointError(
            f"{path} looks like safetensors but is damaged ({first_line(err)}); fetch it again"
        ) from err
    except pickle.UnpicklingError as err:
        raise CheckpointError(refusal(path, wanted_imports(path, kind), err)) from err
    except Exception as err:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(
            f"{path} is damaged or cut off: torch could not read it "
            f"({type(err).__name__}: {first_line(err)}); fetch it again"
        ) from err
