"""``tinyvit inspect``: what a file of weights is, for people or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tinyvit.cli import console
from tinyvit.cli.console import counted, megabytes
from tinyvit.cli.options import Json

if TYPE_CHECKING:
    from tinyvit.checkpoints import Detection, Inspection

__all__ = ["inspect"]

EXAMPLES = (
    "tinyvit inspect mobile_sam.pt",
    "tinyvit inspect mine.safetensors --json | jq .detection.variant",
)


def inspect(
    ctx: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A file of weights, a folder of save_pretrained, or the name of a checkpoint that "
            "is here.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Say what a file of weights is, before trusting it.

    Names the project whose form it has and those whose files look just the same, the variant and
    its sizes, head and neck, the strides and why they are assumed (no tensor shows them), what is
    missing or left over, and its SHA-256. Nothing in the file is run.
    """
    from tinyvit.checkpoints import inspect as inspect_file
    from tinyvit.checkpoints.families import get_layout
    from tinyvit.cli.loading import file_of

    report = inspect_file(file_of(file))
    if as_json:
        console.write_json(report.to_dict())
        return
    console.write(console.fields(_facts(report, get_layout(report.detection.family).title)))
    stages = _stages(report.detection)
    if stages:
        console.write(f"\n{stages}")
    remarks = [text for text in report.remarks if text != report.detection.strides_reason]
    if remarks:
        console.write("\nremarks")
        console.write(console.fields([("-", remark) for remark in remarks]))


def _facts(report: Inspection, title: str) -> list[tuple[str, str]]:
    """Name and value of everything that is one value."""
    found = report.detection
    sizes = found.architecture
    dtypes = ", ".join(
        kind if len(found.dtypes) == 1 else f"{number} {kind}"
        for kind, number in found.dtypes.items()
    )
    facts = [
        ("file", report.path),
        ("size", f"{megabytes(report.size)}, {report.container}"),
        ("sha256", report.sha256),
        ("family", f"{found.family}: {title}"),
        ("same keys", ", ".join(found.also)),
        ("variant", found.variant or "none of the catalog"),
        ("parts", ", ".join(part.replace("_", " ") for part in found.parts)),
        ("parameters", f"{found.parameters:,} in {counted(report.tensors, 'tensor')}"),
        ("dtype", dtypes),
    ]
    if sizes is not None:
        head = f"{sizes.num_classes} classes" if found.has_head else "none"
        facts += [
            ("picture", f"{found.img_size} x {found.img_size}, {sizes.in_chans} channels"),
            ("stem", sizes.stem),
            ("strides", found.strides_reason.removeprefix("strides ")),
            ("head", head),
            ("neck", f"{sizes.neck_dim} channels" if found.has_neck else "none"),
        ]
    facts.append(("complete", _completeness(found)))
    return [(name, value) for name, value in facts if value]


def _completeness(found: Detection) -> str:
    counts = [
        f"{len(keys)} {what}"
        for what, keys in (
            ("missing", found.missing),
            ("left over", found.unexpected),
            ("of a wrong shape", found.wrong_shapes),
        )
        if keys
    ]
    if not counts:
        return "yes, nothing missing and nothing left over"
    return f"{'yes' if found.is_complete else 'no'}: {', '.join(counts)} (--json names them)"


def _stages(found: Detection) -> str:
    """The sizes of the stages as a table; empty without an encoder."""
    sizes = found.architecture
    if sizes is None:
        return ""
    rows = []
    for i, channels in enumerate(sizes.embed_dims):
        kind = ("convolution", "-", "-") if i == 0 else (
            "attention", str(sizes.num_heads[i]), str(sizes.window_sizes[i])
        )  # fmt: skip
        rows.append((str(i + 1), kind[0], str(channels), str(sizes.depths[i]), *kind[1:]))
    heads = ("stage", "of", "channels", "blocks", "heads", "window")
    return console.table(heads, rows, right=(2, 3, 4, 5))
