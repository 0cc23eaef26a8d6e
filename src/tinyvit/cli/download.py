"""``tinyvit download``: a published checkpoint, fetched once and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyvit.catalog import get_checkpoint
from tinyvit.cli import console
from tinyvit.cli.options import Json, matching_checkpoints

__all__ = ["download"]

EXAMPLES = (
    "tinyvit download mobile_sam",
    "tinyvit convert $(tinyvit download mobile_sam) encoder.safetensors --to tinyvit",
)


def download(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            autocompletion=matching_checkpoints,
            help="A name of 'tinyvit models'.",
        ),
    ],
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="DIR",
            help="Folder for the file. By default $TINYVIT_CACHE, or the user's cache.",
        ),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option("--sha256", metavar="HASH", help="The hash that the file must have."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch published weights and print the path of the file.

    Every file is checked by its SHA-256. One that is here already is not fetched again, and a
    broken download goes on where it stopped. The embedded weights need no download: their path is
    printed. TINYVIT_MIRROR names another server, TINYVIT_OFFLINE=1 forbids the network.
    """
    from tinyvit.checkpoints import fetch, file_sha256
    from tinyvit.cli.loading import announce

    own = console.of(ctx)
    row = get_checkpoint(name)
    announce(own, row, cache_dir)
    with own.progress("downloading", counts_bytes=True) as update:
        path = fetch(row, cache_dir, sha256, update)
    if not as_json:
        console.write(str(path))
        return
    console.write_json(
        {
            "name": row.name,
            "path": str(path),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
            "variant": row.variant,
            "family": row.family,
            "licence": row.licence,
            "source": row.source,
            "embedded": row.embedded,
            "note": row.note,
        }
    )
