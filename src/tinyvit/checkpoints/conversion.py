"""Report what a file of weights is, and write it in another family's form."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinyvit.errors import CheckpointError
from tinyvit.lazy import need_torch

from . import families, files
from .detection import Architecture, Detection, detect_in
from .families import LAYOUTS, Layout, Part, get_layout, group_by_part, part_of, to_canonical
from .files import StateFile

if TYPE_CHECKING:
    from torch import Tensor

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
        """Everything as plain data for ``json.dumps``.

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
        CheckpointError: The file cannot be read, or is no TinyViT.
    """
    need_torch("inspecting a checkpoint")
    file = files.read_state_dict(path)
    found = detect_in(file)
    return Inspection(
        path=str(file.path),
        size=file.size,
        sha256=files.file_sha256(file.path),
        container=file.container,
        tensors=len(file.tensors),
        extras=file.extras,
        metadata=file.metadata,
        detection=found,
        remarks=tuple(_remarks(file, found)),
    )


def _remarks(file: StateFile, found: Detection) -> list[str]:
    """Sentences a user should read before using the weights, the most important first."""
    lines: list[str] = []
    if found.wrong_shapes:
        key, (wanted, came) = next(iter(found.wrong_shapes.items()))
        lines.append(
            f"{len(found.wrong_shapes)} tensors have a shape that does not fit the others, "
            f"for example {key}: {list(came)} instead of {list(wanted)}"
        )
    bad = files.non_finite(file.tensors)
    if bad:
        lines.append(f"values that are no numbers (nan or inf): {_in_groups(bad, found.family)}")
    if found.missing:
        lines.append(f"missing: {_in_groups(found.missing, found.family)}")
    if found.unexpected:
        lines.append(f"left over: {_in_groups(found.unexpected, found.family)}")
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


def _in_groups(keys: Iterable[str], family: str) -> str:
    """Many keys in one line, by part: ``"neck (6 tensors), head (head.weight, head.bias)"``."""
    spelt = to_canonical({key: key for key in keys}, family)
    lines = []
    for part, names in group_by_part(spelt).items():
        few = ", ".join(spelt[name] for name in names)
        lines.append(f"{part} ({few if len(names) <= _NAMED_AT_MOST else f'{len(names)} tensors'})")
    return ", ".join(lines)


_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_WHY_DROPPED: dict[Part, str] = {
    "head": "has no classification head",
    "neck": "has no SAM neck",
    "prompt_encoder": "has no prompt encoder",
    "mask_decoder": "has no mask decoder",
    "hq_decoder": "has no HQ-SAM additions to the mask decoder",
    "decoder_state": "has no instance segmentation decoder",
    "unknown": "knows no such tensors, they are no part of TinyViT or SAM",
    "trunk": "has no image encoder",
}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: The file that was read.
        target: The file that was written.
        source_family: Whose file the source is.
        family: Whose form the target has.
        container: ``"safetensors"`` or ``"torch"``.
        tensors: Number of tensors written.
        dropped: Reason -> keys that were left out, in canonical spelling.
        notes: Sentences a user should read before using the target.
    """

    source: str
    target: str
    source_family: str
    family: str
    container: Literal["safetensors", "torch"]
    tensors: int
    dropped: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data for ``json.dumps``.

        Returns:
            Nested dicts and lists of numbers and text.
        """
        return asdict(self)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    overwrite: bool = False,
    into: str | os.PathLike[str] | None = None,
) -> ConversionReport:
    """Write a file of weights in another family's form.

    What a safetensors header says of preparation, classes and thresholds goes along where the
    target is safetensors, too.

    Args:
        source: The file to read.
        target: The file to write. ``.safetensors`` always means safetensors and ``.pt``, ``.pth``,
            ``.bin`` and ``.ckpt`` a torch file; any other suffix gets what the family uses.
        to: The family, for example ``"timm"``, ``"cream"``, ``"mobile_sam"`` or ``"tinyvit"``.
        overwrite: Whether an existing target may be replaced; the source never is.
        into: For ``to="efficientsam3"``: a file of SAM 3 or of a merged EfficientSAM3. The target
            is that file with its image encoder replaced.

    Returns:
        What was written, what was dropped and why.

    Raises:
        CheckpointError: The source cannot be read or is damaged, lacks parts the family needs,
            or the target exists or cannot be written. Nothing is written then.
        ValueError: ``into`` with another family.
    """
    if into is not None and to != "efficientsam3":
        raise ValueError(f"into= is for to='efficientsam3', the encoder of SAM 3; got to={to!r}")
    source, target = Path(source), Path(target)
    layout = get_layout(to)
    _check_target(source, target, overwrite)
    need_torch("converting a checkpoint")
    file = files.read_state_dict(source)
    found = detect_in(file)
    tensors, dropped = convert_tensors(file.tensors, found, to)
    wrapper, container = layout.wrapper, layout.container
    if target.suffix in (".safetensors", *_TORCH_SUFFIXES):
        container = "safetensors" if target.suffix == ".safetensors" else "torch"
    notes = _notes(found, to, layout)
    if into is not None:
        tensors, wrapper, note = _merged(tensors, Path(into))
        notes.append(note)
    if container == "torch":
        files.write_state_dict(target, tensors, container, wrapper=wrapper)
        if files.THRESHOLDS in file.metadata:
            notes.append(
                f"a torch file has no place for {files.THRESHOLDS}: give them to each call"
            )
    else:
        files.write_state_dict(target, tensors, container, metadata=_header(file, found, to))
    return ConversionReport(
        source=str(source),
        target=str(target),
        source_family=found.family,
        family=to,
        container=container,
        tensors=len(tensors),
        dropped=dropped,
        notes=tuple(notes),
    )


def convert_tensors(
    tensors: dict[str, Tensor], found: Detection, to: str
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Convert a state dict in memory.

    Args:
        tensors: Key -> tensor, in the source's spelling.
        found: What it is, from ``detect``.
        to: The family to convert to.

    Returns:
        Key -> tensor in the family's spelling (the same tensors), and reason -> dropped keys in
        canonical spelling.

    Raises:
        CheckpointError: The source is damaged or lacks what the family needs.
    """
    layout = get_layout(to)
    canonical = to_canonical(tensors, found.family)
    held = (*layout.required, *layout.optional)
    kept = {key: tensor for key, tensor in canonical.items() if part_of(key) in held}
    _check_complete(found, kept, to, layout)
    dropped = {
        f"{layout.title} {_WHY_DROPPED[part]}": tuple(keys)
        for part, keys in group_by_part(canonical).items()
        if part not in held
    }
    if found.ignored:
        dropped["index tables that no loader needs (Cream's own drops them)"] = found.ignored
    return families.from_canonical(kept, to), dropped


def _merged(student: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str | None, str]:
    """A student in the place of the image encoder of a whole SAM 3, its wrapper, and a note."""
    wrapper, whole = None, files.read_whole(path)
    for name, value in whole.items():
        if isinstance(value, Mapping):
            wrapper, whole = name, dict(value)
            break
    trunk = next((m[0] for key in whole if (m := _TRUNK_OF_SAM3.match(key))), None)
    if trunk is None:
        raise CheckpointError(f"{path} holds no image encoder of SAM 3 to replace (…trunk.…)")
    is_flat = any(key.startswith(f"{trunk}backbone.model.") for key in whole)
    start = trunk if is_flat else f"{trunk}model."
    tensors = {key: tensor for key, tensor in whole.items() if hasattr(tensor, "detach")}
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(trunk)}
    note = f"{len(rest)} tensor{'s' * (len(rest) != 1)} of {path} are around the encoder"
    return {**{start + key: t for key, t in student.items()}, **rest}, wrapper, note


_TRUNK_OF_SAM3 = re.compile(r"^.*?backbone\.vision_backbone\.trunk\.")


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name the file to write")
    if not target.exists():
        return
    if source.exists() and os.path.samefile(source, target):
        raise CheckpointError(f"{target} is the source itself; name another file to write")
    if not overwrite:
        raise CheckpointError(f"{target} exists already; remove it, or convert with overwrite=True")


def _check_complete(found: Detection, kept: Mapping[str, Tensor], to: str, layout: Layout) -> None:
    """Refuse a damaged source or one that lacks parts, and say everything at once."""
    problems: list[str] = []
    there = group_by_part(kept)
    lacking = [part.replace("_", " ") for part in layout.required if part not in there]
    if lacking:
        problems.append(f"has no {', no '.join(lacking)}")
    missing = to_canonical(dict.fromkeys(found.missing, 0), found.family)
    partly = [key for key in missing if part_of(key) in there]
    if partly:
        problems.append(f"lacks {_in_groups(partly, 'tinyvit')}")
    wrong = [key for key in to_canonical(found.wrong_shapes, found.family) if key in kept]
    if wrong:
        problems.append(f"has wrong shapes in {_in_groups(wrong, 'tinyvit')}")
    sizes = found.architecture
    if sizes and "trunk" in there:
        problems += _other_network(sizes, layout)
    if not problems:
        return
    complete = set(found.parts) - set(group_by_part(missing))
    possible = [
        family
        for family, row in LAYOUTS.items()
        if complete.issuperset(row.required)
        and not (sizes and "trunk" in row.required and _other_network(sizes, row))
        and not found.wrong_shapes
    ]
    raise CheckpointError(
        f"this {found.family} file cannot become a {to} file: it {'; it '.join(problems)}. "
        f"Convert to one of {', '.join(possible) or 'none'}, or use a complete file"
    )


def _other_network(sizes: Architecture, layout: Layout) -> list[str]:
    """What keeps an encoder of these sizes from being of a family's network."""
    problems: list[str] = []
    if layout.stem is not None and sizes.stem != layout.stem:
        problems.append(f"has a {sizes.stem} stem where {layout.title} has a {layout.stem} stem")
    has_own = (sizes.neck_size is not None, layout.neck_size is not None)
    if layout.stem is not None and "neck" in layout.required and has_own[0] != has_own[1]:
        names = ("SAM's neck", "EfficientSAM3's neck")
        came, wanted = (names[is_student] for is_student in has_own)
        problems.append(f"has {came} where {layout.title} has {wanted}")
    return problems


def _header(file: StateFile, found: Detection, to: str) -> dict[str, str]:
    """What a safetensors file says about itself: what no key and no shape shows."""
    layout = get_layout(to)
    written = {**file.metadata, **files.header_for(to, found.strides)}
    held = {"tinyvit.strides": "trunk", files.IMAGE_SPEC: "trunk"}
    held |= {files.CLASSES: "head", files.THRESHOLDS: "mask_decoder"}
    kept = [key for key, part in held.items() if part in (*layout.required, *layout.optional)]
    return {key: written[key] for key in ("tinyvit.family", *kept) if key in written}


def _notes(found: Detection, to: str, layout: Layout) -> list[str]:
    notes: list[str] = []
    if not found.has_encoder or "trunk" not in layout.required:
        return notes
    fixed = not to.startswith("tinyvit")
    if fixed and found.strides != layout.strides:
        notes.append(
            f"the weights belong to strides {found.strides}, {layout.title} builds "
            f"{layout.strides}: features will differ from the source's"
        )
    if fixed and found.variant is None:
        notes.append(f"the sizes are no published ones: {layout.title} cannot build them by name")
    if found.has_head and found.has_neck and "head" in layout.required:
        notes.append("the classification head of a SAM encoder was never trained")
    if to == "tinyvit" and not found.has_neck:
        notes.append("there is no neck: as a SAM encoder its neck would be untrained")
    return notes


convert_checkpoint, inspect_checkpoint = convert, inspect
"""The names they have at the top of the package."""
