"""Take the tensors out of what ``torch.load`` gives, and put them in again for another family.

Training scripts wrap a state dict in ``{'model': …}``, ``{'state_dict': …}`` and so on, sometimes
twice, and DistributedDataParallel and ``torch.compile`` put a prefix before each key. Both are
undone here and told. What a refused pickle would import is found without unpickling it.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tinyvit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "model_ema", "ema", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "sam.")
_MAX_DEPTH = 4

# Files that keep the parts of SAM in dicts of their own. MobileSAMv2 spells it "PromtEncoder".
_PARTS = {
    "PromtEncoder": "prompt_encoder.",
    "PromptEncoder": "prompt_encoder.",
    "MaskDecoder": "mask_decoder.",
    "image_encoder": "image_encoder.",
    "prompt_encoder": "prompt_encoder.",
    "mask_decoder": "mask_decoder.",
}
_DECODER_STATE = "decoder_state"  # micro_sam keeps its instance segmentation decoder beside


@dataclass(frozen=True)
class Unwrapped:
    """A flat state dict and where it was found.

    Attributes:
        tensors: Key -> tensor.
        wrapping: What was taken off, in words, for example ``"{'model': …}"``; empty if nothing.
        extras: What else the file holds, in words.
    """

    tensors: dict[str, Tensor]
    wrapping: str
    extras: tuple[str, ...]


def unwrap(loaded: object, origin: str) -> Unwrapped:
    """Find the state dict in what ``torch.load(..., weights_only=True)`` gave.

    Raises:
        CheckpointError: There are no named tensors inside; ``origin`` is named.
    """
    if not isinstance(loaded, Mapping):
        what = "one tensor without a name" if _is_tensor(loaded) else type(loaded).__name__
        raise CheckpointError(
            f"{origin} holds {what} instead of a state dict (a dict of names and tensors); "
            "save it with torch.save(model.state_dict(), …)"
        )
    level: Mapping[Any, Any] = loaded
    layers: list[str] = []
    extras: list[str] = []
    beside: dict[str, Tensor] = {}
    while len(layers) < _MAX_DEPTH:
        inner = _wrapper_of(level)
        if inner is None:
            break
        for key, value in level.items():
            if key == _DECODER_STATE and isinstance(value, Mapping):
                beside.update(_flat(value, f"{_DECODER_STATE}.", extras))
            elif key != inner:
                extras.append(_in_words(key, value))
        layers.append(f"{{{inner!r}: …}}")
        level = level[inner]
    tensors = _flat(level, "", extras)
    tensors, prefixes = _without_prefixes(tensors)
    tensors.update(beside)
    if not tensors:
        held = f"; it holds {', '.join(extras)}" if extras else ""
        raise CheckpointError(f"{origin} holds no tensors{held}; it is no file of weights")
    layers += [f"without the prefix {prefix!r}" for prefix in prefixes]
    return Unwrapped(tensors, ", ".join(layers), tuple(extras))


def wrap(tensors: Mapping[str, Tensor], wrapper: str | None) -> dict[str, object]:
    """Nest a flat state dict as a family's own torch files do; the inverse of ``unwrap``.

    Args:
        tensors: Key -> tensor.
        wrapper: None for a plain dict, ``"PromtEncoder"`` for MobileSAMv2's decoder file, else
            the name the dict gets.
    """
    if wrapper is None:
        return dict(tensors)
    if wrapper == "PromtEncoder":
        names = {"PromtEncoder": "prompt_encoder.", "MaskDecoder": "mask_decoder."}
        return {name: _below(tensors, prefix) for name, prefix in names.items()}
    beside = _below(tensors, f"{_DECODER_STATE}.")
    main = {key: t for key, t in tensors.items() if not key.startswith(f"{_DECODER_STATE}.")}
    return {wrapper: main, _DECODER_STATE: beside} if beside else {wrapper: main}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _is_tensor(value: object) -> bool:
    """Whether this is a tensor of torch or an array of numpy; torch is not imported to tell."""
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _wrapper_of(loaded: Mapping[Any, Any]) -> str | None:
    """The name under which a dict holds the state dict, or None if it is the state dict itself."""
    if any(_is_tensor(value) for value in loaded.values()):
        return None
    return next((name for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)


def _flat(loaded: Mapping[Any, Any], prefix: str, extras: list[str]) -> dict[str, Tensor]:
    """Collect the tensors of a state dict; everything else is told in ``extras``."""
    tensors: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if _is_tensor(value):
            tensors[f"{prefix}{key}"] = value.detach() if hasattr(value, "detach") else value
        elif key in _PARTS and isinstance(value, Mapping):
            tensors.update(_flat(value, _PARTS[key], extras))
        else:
            extras.append(_in_words(key, value))
    return tensors


def _without_prefixes(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Take off what stands before every key, as often as something does."""
    taken: list[str] = []
    while tensors:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        taken.append(prefix)
    return tensors, taken


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
    """Dotted names that the pickle in a file would import, without those every tensor needs.

    Args:
        path: The file.
        kind: Its container, "torch zip" or "torch legacy".
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
