"""Find a checkpoint, by name or path, and read it once: what it is, and its tensors.

Names are those of the catalog; files are of any family. No model is built here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tinyvit.catalog import DEFAULT_CHECKPOINT, Checkpoint, get_checkpoint, list_checkpoints
from tinyvit.errors import CheckpointError

from .detection import Detection, detect_in
from .download import Progress, fetch
from .families import HEADS, ORDER, to_canonical
from .files import check_finite, read_state_dict, thresholds_in

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that was read once; tensors under canonical keys, the texts of its header.

    ``thresholds`` are those of the file, then of its row in the catalog.
    """

    path: Path
    row: Checkpoint | None
    found: Detection
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)


def find_checkpoint(
    checkpoint: str | os.PathLike[str], sha256: str | None = None, progress: Progress | None = None
) -> tuple[Path, Checkpoint | None]:
    """The file of a checkpoint, fetched if need be, and its row in the catalog if it has one."""
    text = os.fspath(checkpoint)
    path = Path(text)
    if text in list_checkpoints():
        row = get_checkpoint(text)
        return fetch(row, sha256=sha256, progress=progress), row
    if is_sam_folder(path):
        return path / "model.safetensors", None
    if path.is_dir() and (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a folder written by save_pretrained; load it with "
            f"tinyvit.from_pretrained({text!r})"
        )
    if path.exists() or path.suffix.lower() in {".pt", ".pth", ".safetensors", ".bin", ".ckpt"}:
        return path, None
    return path, get_checkpoint(text)  # raises, and names the nearest one


def is_sam_folder(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder of ``save_pretrained`` with a whole SAM."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        return bool(config["architectures"] == ["Sam"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_checkpoint(
    checkpoint: str | os.PathLike[str],
    sha256: str | None = None,
    progress: Progress | None = None,
    compare: bool = True,
) -> OpenedCheckpoint:
    """Find a checkpoint by name or path, read it, and refuse what is damaged or no encoder.

    Without ``compare`` the heads of a SAM are left to whoever loads them.
    """
    path, row = find_checkpoint(checkpoint, sha256, progress)
    file = read_state_dict(path)
    check_finite(file.tensors, path)
    thresholds = {**(row.thresholds if row else {}), **thresholds_in(file.metadata, path)}
    found = detect_in(file, compare)
    if not compare and (found.missing or found.unexpected or found.wrong_shapes):
        found = detect_in(file)  # names all at once
    check_encoder(found, path)
    tensors = to_canonical(file.tensors, found.family)
    return OpenedCheckpoint(path, row, found, tensors, file.metadata, thresholds)


def check_encoder(found: Detection, path: Path) -> None:
    """Refuse a file that is damaged, or no image encoder."""
    if found.missing or found.unexpected or found.wrong_shapes:
        problems = misfits(found.missing, found.unexpected, found.wrong_shapes)
        raise CheckpointError(
            f"{path} looks like {found.family}, but does not add up: {'; '.join(problems)}"
        )
    if "trunk" not in found.parts:
        raise CheckpointError(
            f"{path} holds no image encoder ({found.family}: {', '.join(found.parts)}); "
            f"give the file with the encoder"
        )


def check_parts(parts: Collection[str], path: Path, family: str) -> None:
    """Refuse a file without the heads that make an encoder a SAM."""
    lacking = [part for part in HEADS if part not in parts]
    if lacking:
        held = ", ".join(part for part in ORDER if part in parts)
        raise CheckpointError(
            f"{path} ({family}) holds no {' and no '.join(lacking)}, only "
            f"{held}: it is an encoder and no SAM; give a file with all parts, such as "
            f"{DEFAULT_CHECKPOINT!r}, or use tinyvit.create_model for the encoder alone"
        )


def misfits(
    missing: Sequence[str],
    unexpected: Sequence[str],
    wrong_shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
) -> list[str]:
    """In words what keeps tensors from being a model's; ``wrong_shapes`` are (wanted, found)."""
    absent_and_more = {"missing": missing, "unexpected": unexpected}
    shapes = [
        f"{k} has shape {[*its]} instead of {[*own]}" for k, (own, its) in wrong_shapes.items()
    ]
    return [f"{len(v)} {k}: {', '.join(v)}" for k, v in absent_and_more.items() if v] + shapes
