"""Read a file and report what it is, for a person or as JSON.

Puts ``files`` and ``detection`` together and adds the remarks a user needs before trusting the
weights. Builds no model and changes no file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from tinyvit.checkpoints.detection import Detection, detect
from tinyvit.checkpoints.families import ORDER, part_of
from tinyvit.checkpoints.files import StateFile, file_sha256, read_state_dict
from tinyvit.checkpoints.keymap import key_to_canonical

__all__ = ["Inspection", "in_groups", "inspect", "remarks"]

_NAMED_AT_MOST = 6


@dataclass(frozen=True)
class Inspection:
    """What a file of weights is.

    Attributes:
        path: The file.
        size: Bytes on disk.
        sha256: Hash of the file.
        container: The container in words.
        tensors: Number of tensors.
        extras: Entries that are no tensors of the model, in words.
        metadata: Text of a safetensors header.
        detection: Family, sizes, what is missing or left over.
        remarks: Sentences a user should read before using the weights.
    """

    path: str
    size: int
    sha256: str
    container: str
    tensors: int
    extras: tuple[str, ...]
    metadata: dict[str, str]
    detection: Detection
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain data for ``json.dumps``.

        Returns:
            Nested dicts and lists of numbers and text. ``detection.wrong_shapes`` maps a key to
            ``{"wanted": …, "found": …}``.
        """
        facts = asdict(self)
        facts["detection"]["wrong_shapes"] = {
            key: {"wanted": list(wanted), "found": list(found)}
            for key, (wanted, found) in self.detection.wrong_shapes.items()
        }
        return facts


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Say what a file of weights is.

    Args:
        path: A safetensors or torch file.

    Returns:
        The report.

    Raises:
        CheckpointError: If the file cannot be read, or is no TinyViT.
    """
    file = read_state_dict(path)
    found = detect(file.tensors, filename=file.path.name, metadata=file.metadata)
    return Inspection(
        path=str(file.path),
        size=file.size,
        sha256=file_sha256(file.path),
        container=file.container,
        tensors=len(file.tensors),
        extras=file.extras,
        metadata=file.metadata,
        detection=found,
        remarks=tuple(remarks(file, found)),
    )


def remarks(file: StateFile, found: Detection) -> list[str]:
    """Collect the sentences a user should read before using the weights.

    Args:
        file: The file as read.
        found: What it is.

    Returns:
        Sentences, the most important first.
    """
    lines: list[str] = []
    if found.wrong_shapes:
        key, (wanted, came) = next(iter(found.wrong_shapes.items()))
        lines.append(
            f"{len(found.wrong_shapes)} tensors have a shape that does not fit the others, "
            f"for example {key}: {list(came)} instead of {list(wanted)}"
        )
    if found.missing:
        lines.append(f"missing: {in_groups(found.missing, found.family)}")
    if found.unexpected:
        lines.append(f"left over: {in_groups(found.unexpected, found.family)}")
    if found.ignored:
        lines.append(
            f"{len(found.ignored)} index tables (attention_bias_idxs) are not needed and dropped"
        )
    if found.also:
        lines.append(f"files of {', '.join(found.also)} have the very same keys and shapes")
    if found.has_encoder:
        lines.append(found.strides_reason)
        if found.variant is None:
            lines.append("the sizes are those of no variant in the catalog")
        if not found.has_neck:
            lines.append("there is no neck: as a SAM encoder its neck would be untrained")
        elif found.has_head and found.strides[-1:] == (1,):
            lines.append("the classification head of a SAM encoder was never trained")
    if file.extras:
        lines.append(f"not used: {', '.join(file.extras)}")
    return lines


def in_groups(keys: Iterable[str], family: str) -> str:
    """Put many keys into one readable line, grouped by part of the model.

    Args:
        keys: Keys in the family's spelling.
        family: The family's name.

    Returns:
        For example ``"neck (6 tensors), head (head.weight, head.bias)"``: groups of up to six are
        named one by one.
    """
    keys = list(keys)
    parts = [part_of(key_to_canonical(key, family)) for key in keys]
    counts = Counter(parts)
    groups = []
    for part in (part for part in ORDER if part in counts):
        names = [key for key, its_part in zip(keys, parts, strict=True) if its_part == part]
        few = len(names) <= _NAMED_AT_MOST
        groups.append(f"{part} ({', '.join(names) if few else f'{len(names)} tensors'})")
    return ", ".join(groups)
