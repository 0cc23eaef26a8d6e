"""The files that ``tinyvit segment`` writes for one picture, and whether those there still hold.

``STEM.json`` is a document as COCO has them: ``info`` says how it came about and names all other
files, ``annotations`` has one entry for each mask. While these are written, ``info.is_complete`` is
false: so what an interruption leaves is known for ours, and made anew.

Knows no model and no prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tinyvit.checkpoints.files import replacing

__all__ = ["Found", "Names", "begin", "document", "finish", "look", "write_logits"]

MADE_BY = "tinyvit segment"

_DECIDE = {  # fact in the info -> what another value means
    "model_sha256": "made by another model",
    "image_spec": "made with another preparation of pictures",
    "precision": "made in another precision",
    "picture": "made of another picture",
    "picture_bytes": "made of a picture that has changed since",
    "picture_mtime_ns": "made of a picture that has changed since",
    "task": "made with other prompts or options",
}


@dataclass(frozen=True)
class Names:
    """Where the files of one picture go.

    Attributes:
        document: The JSON file.
        overlay: The picture with masks and prompts.
        masks: For each mask a picture, in the order of the annotations; may be empty.
        logits: For each object a file of low-res logits; may be empty.
    """

    document: Path
    overlay: Path
    masks: tuple[Path, ...] = ()
    logits: tuple[Path, ...] = ()

    @classmethod
    def of(cls, folder: Path, stem: str, objects: int, candidates: int, with_logits: bool) -> Names:
        """The names for a picture.

        Args:
            folder: Where to write.
            stem: What the outputs are called.
            objects: Number of objects whose masks are written.
            candidates: Masks of each object.
            with_logits: Whether logits are written.
        """
        endings = [
            f"{number}" if candidates == 1 else f"{number}-{candidate}"
            for number in range(1, objects + 1)
            for candidate in range(1, candidates + 1)
        ]
        logits = range(1, objects + 1) if with_logits else ()
        return cls(
            folder / f"{stem}.json",
            folder / f"{stem}.overlay.png",
            tuple(folder / f"{stem}.mask-{ending}.png" for ending in endings),
            tuple(folder / f"{stem}.logits-{number}.npy" for number in logits),
        )

    def beside(self) -> tuple[Path, ...]:
        """All files but the document."""
        return (self.overlay, *self.masks, *self.logits)


@dataclass(frozen=True)
class Found:
    """What is where outputs are to be.

    Attributes:
        state: ``"nothing"``; ``"current"``: what would be written now; ``"outdated"``: ours, but
            made otherwise; ``"foreign"``: not ours.
        reason: What makes it outdated or foreign, in words.
        own: Files beside the document that it names, whether they are there or not.
    """

    state: Literal["nothing", "current", "outdated", "foreign"]
    reason: str = ""
    own: tuple[Path, ...] = ()


def look(names: Names, facts: Mapping[str, object]) -> Found:
    """Say what is there already.

    Args:
        names: Where the files are to go.
        facts: What the document's ``info`` would say now.

    Returns:
        The answer.
    """
    info = _info(names.document) if names.document.exists() else {}
    own = () if info is None else tuple(names.document.with_name(n) for n in _names_in(info))
    strangers = [path for path in names.beside() if path not in own and path.exists()]
    if info is None:
        strangers.insert(0, names.document)
    if strangers:
        reason = f"{strangers[0]} is there already and was not made by this command"
        return Found("foreign", reason, own)
    if not info:
        return Found("nothing")
    if not info.get("is_complete"):
        return Found("outdated", "left unfinished", own)
    for fact, meaning in _DECIDE.items():
        if info.get(fact) != facts[fact]:
            return Found("outdated", meaning, own)
    if not all(path.exists() for path in names.beside()):
        return Found("outdated", "not all there any more", own)
    return Found("current", "", own)


def begin(names: Names, facts: Mapping[str, object], own: Sequence[Path]) -> None:
    """Say that the files of a picture are being written.

    Args:
        names: Where they go; the folder is made if need be.
        facts: For the document's ``info``.
        own: Files of an earlier answer.

    Raises:
        CheckpointError: The document cannot be written.
        OSError: The folder cannot be made.
    """
    names.document.parent.mkdir(parents=True, exist_ok=True)
    files = sorted({path.name for path in (*names.beside(), *own)})
    _write_json(names.document, {"info": {**facts, "files": files, "is_complete": False}})


def finish(names: Names, content: Mapping[str, object], own: Sequence[Path]) -> None:
    """Write the document, now that all files beside it are there, and remove what it replaces.

    Args:
        names: Where they went.
        content: From ``document``.
        own: Files of an earlier answer.

    Raises:
        CheckpointError: The document cannot be written.
        OSError: A file cannot be removed.
    """
    for path in set(own) - set(names.beside()):
        path.unlink(missing_ok=True)
    _write_json(names.document, content)


def document(
    names: Names,
    facts: Mapping[str, object],
    size: tuple[int, int],
    annotations: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """All that is known of a picture's masks, as COCO has it.

    Args:
        names: Where the files are.
        facts: For ``info``.
        size: (height, width) of the upright picture.
        annotations: One for each mask, without ``id``.

    Returns:
        Plain data.
    """
    height, width = size
    image = {"id": 1, "file_name": facts["picture"], "height": height, "width": width}
    files = sorted(path.name for path in names.beside())
    return {
        "info": {**facts, "files": files, "is_complete": True},
        "images": [image],
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations, 1)],
        "categories": [{"id": 1, "name": "object"}],
    }


def write_logits(path: Path, logits: NDArray[np.float32]) -> None:
    """Write low-res logits [h4, w4] as an array of numpy, whole or not at all.

    Raises:
        CheckpointError: The file cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, logits, allow_pickle=False)

    replacing(path, write)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    replacing(path, lambda temporary: _put(temporary, text))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _info(path: Path) -> dict[str, object] | None:
    """What one of our documents says of itself; None for any other file."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))["info"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    is_ours = isinstance(info, dict) and info.get("made_by") == MADE_BY
    return info if is_ours else None


def _names_in(info: Mapping[str, object]) -> list[str]:
    """Names of files that a document tells; nothing that leads out of its folder."""
    files = info.get("files")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return [name for name in names if Path(name).name == name]
