"""``tinyvit convert``: a file of weights in another project's form."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, get_args

import typer

from tinyvit.catalog import Family
from tinyvit.cli import console
from tinyvit.cli.options import Json

__all__ = ["convert"]

EXAMPLES = (
    "tinyvit convert mobile_sam.pt encoder.safetensors --to tinyvit",
    "tinyvit convert mine.safetensors for_cream.pth --to cream --overwrite",
)

NAMED_AT_MOST = 3
FAMILIES: tuple[str, ...] = get_args(Family)


def known_family(family: str) -> str:
    """The family, if there is one of that name.

    Raises:
        typer.BadParameter: There is none.
    """
    if family in FAMILIES:
        return family
    near = difflib.get_close_matches(family.lower().replace("-", "_"), FAMILIES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise typer.BadParameter(f"unknown family {family!r}{hint} Choose one of {', '.join(FAMILIES)}")


def matching_families(incomplete: str) -> list[str]:
    return [family for family in FAMILIES if family.startswith(incomplete)]


def convert(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="A file of weights, or the name of a checkpoint that is here."
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The file to write. Its suffix says what it is: .safetensors, or .pt, .pth, .bin "
            "or .ckpt for torch.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FAMILY",
            callback=known_family,
            autocompletion=matching_families,
            help=f"Whose form to write: {', '.join(FAMILIES)}.",
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is there; IN never is.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a file of weights in another project's form, bit for bit.

    What IN is, is found out from its tensors. What the other form cannot hold is dropped and named;
    where something it needs is not in IN, nothing is written and everything lacking is named.
    'tinyvit' is this package's encoder or classifier; 'tinyvit_sam' the whole of a SAM.
    """
    from tinyvit.checkpoints import convert as convert_file
    from tinyvit.cli.loading import file_of

    own = console.of(ctx)
    report = convert_file(file_of(source), target, to, overwrite)
    if as_json:
        console.write_json(report.to_dict())
        return
    size = console.megabytes(target.stat().st_size)
    lines = [
        ("read", f"{report.source} ({report.source_family})"),
        ("wrote", f"{report.target} ({report.family}, {report.container}, "
                  f"{report.tensors} tensors, {size})"),
    ]  # fmt: skip
    for reason, keys in report.dropped.items():
        lines.append(
            ("dropped", f"{console.counted(len(keys), 'tensor')}: {reason} ({_few(keys)})")
        )
    lines += [("note", note) for note in report.notes]
    console.write(console.fields(lines))
    if not report.dropped:
        own.say("nothing was dropped")
    elif any(len(keys) > NAMED_AT_MOST for keys in report.dropped.values()):
        own.say("--json names every tensor that was dropped")


def _few(keys: tuple[str, ...]) -> str:
    """The first keys by name."""
    return ", ".join(keys[:NAMED_AT_MOST]) + (", ..." if len(keys) > NAMED_AT_MOST else "")
