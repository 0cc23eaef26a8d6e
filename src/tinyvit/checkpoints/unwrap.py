"""Take a model's tensors out of what a file holds, and put them in again for another family.

Training scripts wrap a state dict in ``{'model': …}``, ``{'state_dict': …}`` and so on, and
DistributedDataParallel, ``torch.compile`` and modules around the model put prefixes before its keys
or into them. All that is undone here and told. What a refused pickle would import is found without
unpickling it.
"""

from __future__ import annotations

import codecs
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tinyvit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


# What wrappers of torch put between the parts of a key, anywhere in it.
_WRAPPING = re.compile(
    r"(?:module|_orig_mod|_fsdp_wrapped_module|_forward_module|_checkpoint_wrapped_module)\."
)
_BEFORE = r"^((?:[^.]+\.)*?)"
_OF_TRUNK = re.compile(
    _BEFORE
    + r"(?:patch_embed\.(?:seq|conv[12])|(?:layers|stages)\.\d+\.(?:blocks|downsample))\..*"
    + r"(?:weight|bias|running_mean|running_var|num_batches_tracked|attention_biases)$"
)
_OF_HEADS = re.compile(_BEFORE + r"(?:prompt_encoder|mask_decoder)\.")
_AVERAGES = frozenset(
    ("ema", "shadow", "teacher", "swa")
)  # chosen only where nothing else is there
# EfficientSAM3's and mmpretrain's heads lie beside their backbones.
_BESIDE_BACKBONE = ("head.0.weight", "head.3.weight", "head.fc.weight")
_MAX_DEPTH = 4
_NAMED_AT_MOST = 6

# Files that keep the parts of SAM in dicts of their own. MobileSAMv2 spells it "PromtEncoder".
_PARTS = {
    "PromtEncoder": "prompt_encoder",
    "PromptEncoder": "prompt_encoder",
    "MaskDecoder": "mask_decoder",
    "image_encoder": "image_encoder",
    "prompt_encoder": "prompt_encoder",
    "mask_decoder": "mask_decoder",
    "decoder_state": "decoder_state",  # micro_sam's instance segmentation decoder, beside the rest
}


@dataclass(frozen=True)
class Unwrapped:
    """A flat state dict; what was taken off and what else the file holds, in words."""

    tensors: dict[str, Tensor]
    wrapping: str
    extras: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A value in nested dicts: the dicts' names, its own, both joined without inner wrappings."""

    path: tuple[str, ...]
    name: str
    key: str
    value: Any


def unwrap(loaded: object, origin: str) -> Unwrapped:
    """Find the model in what ``torch.load(..., weights_only=True)`` or a safetensors file gave.

    Whatever dicts and prefixes are around it: those are taken off with which its keys are those of
    a family. What lies beside is told. Without named tensors a CheckpointError names ``origin``.
    """
    if not isinstance(loaded, Mapping):
        what = "one tensor without a name" if _is_tensor(loaded) else type(loaded).__name__
        raise CheckpointError(
            f"{origin} holds {what} instead of a state dict (a dict of names and tensors); "
            "save it with torch.save(model.state_dict(), …)"
        )
    entries = list(_entries(loaded, ()))
    keys = [entry.key for entry in entries if _is_tensor(entry.value)]
    if not keys:
        extras = [_in_words(key, value) for key, value in loaded.items()]
        held = f"; it holds {', '.join(extras)}" if extras else ""
        raise CheckpointError(f"{origin} holds no tensors{held}; it is no file of weights")
    outer, encoder, parts = _locate(keys) or (_largest(entries), "", ())
    tensors: dict[str, Tensor] = {}
    kept: list[_Entry] = []
    for entry in entries:
        key = _key_in_model(entry, outer, encoder)
        if key is not None and key.startswith(parts or "") and _is_tensor(entry.value):
            value = entry.value
            tensors[key] = value.detach() if hasattr(value, "detach") else value
            kept.append(entry)
    words = _wrapping_in_words(kept, outer)
    if encoder not in ("", "image_encoder."):
        words.append(f"{encoder!r} read as 'image_encoder.'")
    return Unwrapped(tensors, ", ".join(words), tuple(_left_over(loaded, kept)))


def _entries(level: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[_Entry]:
    """Everything in nested dicts, the dicts of parts under their usual names."""
    for name, value in level.items():
        if isinstance(value, Mapping) and len(path) < _MAX_DEPTH:
            yield from _entries(value, (*path, str(name)))
            continue
        own = str(name)
        lead = ""  # taken for a prefix: what stands beside the wrapped model has none
        while match := _WRAPPING.match(own, len(lead)):
            lead = own[: match.end()]
        own = lead + re.sub(rf"(?<=\.){_WRAPPING.pattern}", "", own[len(lead) :])
        dicts = [_PARTS.get(part, part) for part in path]
        yield _Entry(path, str(name), ".".join((*dicts, own)), value)


def _locate(keys: Sequence[str]) -> tuple[str, str, tuple[str, ...]] | None:
    """What stands before the keys of the model, and behind that before those of its encoder.

    Third: how all keys of the model begin behind the first; nothing for any way.
    """
    trunks = Counter(match[1] for key in keys if (match := _OF_TRUNK.match(key)))
    heads = Counter(match[1] for key in keys if (match := _OF_HEADS.match(key)))
    if not trunks:
        return (_likeliest(heads), "", ()) if heads else None
    trunk = _likeliest(trunks)
    start = f".{trunk}".rfind(".image_encoder.")
    if start >= 0:
        return trunk[:start], trunk[start:], ()
    names = set(keys)
    for tail in ("backbone.model.", "backbone."):
        root = trunk.removesuffix(tail)
        if root != trunk and any(root + head in names for head in _BESIDE_BACKBONE):
            return root, "", (tail, "head.")
    around = [outer for outer in heads if trunk != outer and trunk.startswith(outer)]
    if around:
        outer = max(around, key=lambda outer: heads[outer])
        return outer, trunk[len(outer) :], ()
    return trunk, "", ()


def _likeliest(prefixes: Counter[str]) -> str:
    """Of several models in a file the largest, and averages only where nothing else is there."""

    def rank(prefix: str) -> tuple[bool, int]:
        return not _AVERAGES.isdisjoint(re.split(r"[._]", prefix)), -prefixes[prefix]

    return min(prefixes, key=rank)


def _largest(entries: Sequence[_Entry]) -> str:
    """Without a model of ours: the dict with the most tensors, and a wrapping before all of it."""
    counts = Counter(entry.path for entry in entries if _is_tensor(entry.value))
    path = max(counts, key=lambda path: counts[path])
    keys = [entry.key for entry in entries if entry.path == path and _is_tensor(entry.value)]
    outer = "".join(f"{name}." for name in path)
    while match := _WRAPPING.match(keys[0], len(outer)):
        if not all(key.startswith(keys[0][: match.end()]) for key in keys):
            break
        outer = keys[0][: match.end()]
    return outer


def _key_in_model(entry: _Entry, outer: str, encoder: str) -> str | None:
    """The key of an entry in the model, or None for one beside it."""
    if entry.path[-1:] == ("decoder_state",):
        return f"decoder_state.{entry.name}"
    below = entry.path[outer.count(".") :] if outer else entry.path
    is_inside = entry.key.startswith(outer) and all(name in _PARTS for name in below)
    if not is_inside or entry.name == "n_averaged":
        return None
    key = entry.key[len(outer) :]
    return f"image_encoder.{key[len(encoder) :]}" if encoder and key.startswith(encoder) else key


def _wrapping_in_words(kept: Sequence[_Entry], outer: str) -> list[str]:
    """The dicts and prefixes that were taken off."""
    names = outer.split(".")[:-1]
    path = next((e.path for e in kept if e.path[: len(names)] == tuple(names[: len(e.path)])), ())
    dicts = [name for name, there in zip(names, path, strict=False) if name == there]
    words = [f"{{{name!r}: …}}" for name in dicts]
    rest = names[len(dicts) :]
    if rest:
        words.append(f"without the prefix '{'.'.join(rest)}.'")
    inner = {
        match[0]
        for entry in kept
        for match in re.finditer(rf"(?<=\.){_WRAPPING.pattern}", entry.name)
        if f".{match[0]}" not in f".{outer}"
    }
    return words + [f"without {part!r} inside" for part in sorted(inner)]


def _left_over(loaded: Mapping[Any, Any], kept: Sequence[_Entry]) -> list[str]:
    """What lies beside the model, in words: whole dicts where nothing in them was taken."""
    taken = {
        (*entry.path, entry.name)[:depth] for entry in kept for depth in range(len(entry.path) + 2)
    }
    beside = list(_beside(loaded, (), taken))
    words = [_in_words(name, value) for name, value in beside if not _is_tensor(value)]
    tensors = [name for name, value in beside if _is_tensor(value)]
    if len(tensors) <= _NAMED_AT_MOST:
        return words + [f"{name} (tensor)" for name in tensors]
    groups = Counter(name.partition(".")[0] for name in tensors)
    return words + [f"{name}.… ({count} tensors)" for name, count in groups.items()]


def _beside(
    level: Mapping[Any, Any], path: tuple[str, ...], taken: set[tuple[str, ...]]
) -> Iterator[tuple[str, Any]]:
    """Names and values in nested dicts that are not taken and hold nothing that is."""
    for name, value in level.items():
        if (here := (*path, str(name))) not in taken:
            yield str(name), value
        elif isinstance(value, Mapping):
            yield from _beside(value, here, taken)


def wrap(tensors: Mapping[str, Tensor], wrapper: str | None) -> dict[str, object]:
    """Nest a flat state dict as a family's own torch files do; the inverse of ``unwrap``.

    ``wrapper`` is None for a plain dict, ``"PromtEncoder"`` for MobileSAMv2's decoder file, else
    the name the dict gets.
    """
    if wrapper is None:
        return dict(tensors)
    if wrapper == "PromtEncoder":
        names = {"PromtEncoder": "prompt_encoder.", "MaskDecoder": "mask_decoder."}
        return {name: _below(tensors, prefix) for name, prefix in names.items()}
    beside = _below(tensors, "decoder_state.")
    main = {key: t for key, t in tensors.items() if not key.startswith("decoder_state.")}
    return {wrapper: main, "decoder_state": beside} if beside else {wrapper: main}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _is_tensor(value: object) -> bool:
    """Whether this is a tensor of torch or an array of numpy; torch is not imported to tell."""
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _in_words(key: object, value: object) -> str:
    """An entry that is not used, for a person to read."""
    if isinstance(value, Mapping):
        return f"{key} (dict of {len(value)})"
    if isinstance(value, str | int | float | bool | None):
        return f"{key} = {value!r:.40}"
    return f"{key} ({type(value).__name__})"


# What torch.save itself writes for tensors; everything else is worth naming.
_HARMLESS = ("torch._utils._rebuild", "torch.Size", "collections.OrderedDict", "torch._tensor.")


def wanted_imports(path: Path, kind: str) -> list[str]:
    """Dotted names that the pickle in a file would import, without those every tensor needs."""
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


def _imports(file: IO[bytes]) -> Iterator[str]:
    """Yield the dotted names that one pickle's opcodes import; stops at damage.

    A name is an argument (GLOBAL) or the two texts on top of the stack, perhaps from the memo.
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


def refusal(path: Path, names: Sequence[str], err: Exception) -> str:
    """Why a torch file is refused: the names it wanted to import, or that it is damaged."""
    if not names:
        return f"{path} is damaged: its pickle cannot be read ({first_line(err)}); fetch it again"
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


def first_line(err: BaseException) -> str:
    """An error's first line with words in it."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(err).__name__


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
