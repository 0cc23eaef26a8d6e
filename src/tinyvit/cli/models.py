"""``tinyvit models``: the two tables of the catalog."""

from __future__ import annotations

from dataclasses import asdict

from tinyvit.catalog import CHECKPOINTS, VARIANTS, Checkpoint, Variant, get_variant
from tinyvit.cli import console
from tinyvit.cli.console import Console

_TASKS = {"classification": "classify", "sam": "sam", "sam3": "sam 3"}


def models(own: Console, as_json: bool = False) -> None:
    """List the models, and the published weights for each.

    The first table has the variants (sizes of TinyViT): what they are for, their parameters, the
    multiply-accumulates for one image, the side of that image in pixels, the strides between
    the stages, and the sides of the attention windows.

    The second has the checkpoints (files of weights) for each variant: whose form they have, the
    classes of their head, their licence, and where the file is: embedded in this package, cached on
    this machine, remote (tinyvit download NAME fetches it), or to be fetched by hand.

    Examples:
        tinyvit models
        tinyvit models --json | jq -r '.checkpoints[].name'
    """
    from tinyvit.checkpoints.download import cache_folder

    folder = cache_folder()
    states = {row.name: _state(row) for row in CHECKPOINTS}
    if as_json:
        rows = [asdict(row) | dict(zip(("file_is", "path"), states[row.name], strict=True))
                for row in CHECKPOINTS]  # fmt: skip
        variants = [asdict(row) for row in VARIANTS]
        console.write_json({"models": variants, "checkpoints": rows, "cache": str(folder)})
        return
    heads: tuple[str, ...] = ("model", "for", "params", "GMAC", "pixels", "strides", "windows")
    console.write(console.table(heads, [_variant(row) for row in VARIANTS], right=(2, 3, 4)))
    console.write("")
    lines: list[tuple[str, ...]] = []
    for variant in VARIANTS:
        of_it = [row for row in CHECKPOINTS if row.variant == variant.name]
        lines += [(f"{variant.name}:",)] if of_it else []
        lines += [_checkpoint(row, states[row.name][0]) for row in of_it]
    heads = ("checkpoint", "keys", "head", "licence", "file")
    console.write(console.table(heads, lines, right=(2,)))
    own.say(f"\ncached files are in {folder}; fetch more with: tinyvit download CHECKPOINT")


def _state(row: Checkpoint) -> tuple[str, str | None]:
    """Where a checkpoint's file is, in a word, and its path if it is here."""
    from tinyvit.checkpoints import cached_path

    path = cached_path(row)
    if row.embedded:
        return "embedded", str(path)
    if path.is_file():
        return "cached", str(path)
    return ("remote" if row.urls else "by hand"), None


def _variant(row: Variant) -> tuple[str, ...]:
    return (
        row.name,
        _TASKS[row.task],
        f"{row.parameters / 1e6:.2f}M",
        f"{row.gmacs:.2f}",
        str(row.img_size),
        " ".join(str(stride) for stride in row.strides),
        " ".join(str(side) for side in row.window_sizes),
    )


def _checkpoint(row: Checkpoint, state: str) -> tuple[str, ...]:
    has_trained_head = get_variant(row.variant).task == "classification"
    classes = str(row.num_classes) if has_trained_head else "-"
    return (row.name, row.family, classes, row.licence, state)
