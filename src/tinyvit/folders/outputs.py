"""Whether the files that are there for an image are what would be written now.

One dictionary of facts says how outputs came about. It is the header of a safetensors file (each
text there is JSON), or ``info`` in a JSON document. It names the files beside it too, so that a
file of the user's own is never taken for one of ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from .images import Item

if TYPE_CHECKING:
    from tinyvit.inference import Engine

_DECIDING = {  # fact -> what another value means
    "weights_sha256": "made by another model",
    "model_sha256": "made by another model",
    "strides": "made with other strides",
    "image_spec": "made with another preparation of images",
    "precision": "made in another precision",
    "picture": "made of another image",
    "picture_bytes": "made of an image that has changed since",
    "picture_mtime_ns": "made of an image that has changed since",
    "task": "made with other prompts or options",
}


class Existing(NamedTuple):
    """What is where outputs are to be."""

    # current: what would be written now; outdated: ours, but made otherwise; foreign: not ours
    state: Literal["nothing", "current", "outdated", "foreign"]
    reason: str = ""  # what makes it outdated or foreign, in words
    own: tuple[Path, ...] = ()  # beside the main file, named by it, whether there or not


NOTHING = Existing("nothing")


def find_existing(
    path: Path,
    beside: Sequence[Path],
    facts: Mapping[str, object],
    incomplete: str = "not all there any more",
) -> Existing:
    """Say what is there of a main file, which holds the facts, and of others ``beside`` it.

    ``facts`` are what it would say now; ``incomplete`` is said where one of ``beside`` is missing.
    """
    found = _read_facts(path, facts.get("made_by")) if path.exists() else {}
    own = tuple(path.with_name(name) for name in found["files"]) if found else ()
    foreign = [other for other in beside if other not in own and other.exists()]
    if found is None:
        foreign.insert(0, path)
    if foreign:
        reason = f"{foreign[0]} is there already and was not made by this command"
        return Existing("foreign", reason, own)
    if not found:
        return NOTHING
    if not found.get("is_complete"):
        return Existing("outdated", "left unfinished", own)
    for fact, meaning in _DECIDING.items():
        if fact in facts and found.get(fact) != facts[fact]:
            return Existing("outdated", meaning, own)
    if not all(other.exists() for other in beside):
        return Existing("outdated", incomplete, own)
    return Existing("current", "", own)


def facts_of_image(image: Item) -> dict[str, object]:
    """What tells whether an image is still the same file; an OSError where it is gone."""
    state = image.path.stat()
    return {
        "picture": image.name,
        "picture_bytes": state.st_size,
        "picture_mtime_ns": state.st_mtime_ns,
    }


def facts_of_engine(engine: Engine, checkpoint: str, **more: object) -> dict[str, object]:
    """How an engine computes, and what else is known of the model, as JSON gives it back."""
    facts = {
        "checkpoint": checkpoint,
        **more,
        "image_spec": engine.image_spec.to_dict(),
        "precision": getattr(engine.backend, "precision", "fp32"),
        "device": engine.backend.device,
        "tinyvit_version": version("tinyvit"),
    }
    plain: dict[str, object] = json.loads(json.dumps(facts))
    return plain


def _read_facts(path: Path, made_by: object) -> dict[str, Any] | None:
    """What one of our files says of itself, with ``files`` and ``is_complete``; else None."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                texts = file.metadata() or {}
            facts = {key: json.loads(text) for key, text in texts.items() if key != "format"}
            is_ours = "tinyvit_version" in facts
            facts |= {"files": [facts.get("drawing")], "is_complete": True}
        else:
            facts = json.loads(path.read_text(encoding="utf-8"))["info"]
            is_ours = isinstance(facts, dict) and facts.get("made_by") == made_by
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not is_ours:
        return None
    files = facts.get("files")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return {**facts, "files": [name for name in names if Path(name).name == name]}
