"""Arguments that several verbs have in common, with their help."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tinyvit.catalog import list_checkpoints, list_models

__all__ = ["Device", "Json", "Model", "Pictures", "Precision", "PrecisionName", "Size"]


class PrecisionName(str, Enum):
    """What ``--precision`` takes."""

    fp32 = "fp32"
    bf16 = "bf16"
    auto = "auto"


def parse_precision(word: str) -> PrecisionName:
    """The precision of a word.

    Raises:
        typer.BadParameter: There is none of this name; for fp16, why not.
    """
    names = [name.value for name in PrecisionName]
    if word in names:
        return PrecisionName(word)
    if word == "fp16":
        from tinyvit.inference.backend import FP16_REFUSED

        raise typer.BadParameter(f"{FP16_REFUSED}.")
    raise typer.BadParameter(f"{word!r} is not one of {', '.join(map(repr, names))}.")


def matching_checkpoints(incomplete: str) -> list[str]:
    """Names for the shell to complete."""
    return [name for name in list_checkpoints() if name.startswith(incomplete)]


def matching_models(incomplete: str) -> list[str]:
    """Names for the shell to complete."""
    return [name for name in list_models() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead.")]
Pictures = Annotated[
    list[Path],
    typer.Argument(
        metavar="PICTURE_OR_FOLDER",
        show_default=False,
        help="JPEG, PNG, WebP, TIFF, BMP, GIF or PPM files. Folders are read with all folders in "
        "them; hidden files and folders are left out.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="VARIANT",
        autocompletion=matching_models,
        help="Build this variant for the checkpoint. By default the checkpoint says which.",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        min=1,
        help="Side of the model's input in pixels. By default the one it was trained for.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto (a GPU if there is one), or a torch device: cpu, cuda, cuda:1, mps."
    ),
]
Precision = Annotated[
    PrecisionName,
    typer.Option(
        "--precision",
        metavar="[fp32|bf16|auto]",
        parser=parse_precision,
        help="What to compute in; auto is bf16 where the hardware has it built in.",
    ),
]
