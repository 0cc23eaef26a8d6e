"""``tinyvit models``, ``inspect``, ``convert`` and ``download``: models and their weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from tinyvit.catalog import (
    CHECKPOINTS,
    VARIANTS,
    Checkpoint,
    Family,
    Variant,
    get_checkpoint,
    get_variant,
    nearest,
)
from tinyvit.cli import console

from . import arguments as args
from .console import Console, counted, megabytes

if TYPE_CHECKING:
    from tinyvit.checkpoints import Inspection
    from tinyvit.checkpoints.detection import Architecture


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
    size, macs = f"{row.parameters / 1e6:.2f}M", f"{row.gmacs:.2f}"
    strides, windows = (" ".join(map(str, one)) for one in (row.strides, row.window_sizes))
    return (row.name, _TASKS[row.task], size, macs, str(row.img_size), strides, windows)


def _checkpoint(row: Checkpoint, state: str) -> tuple[str, ...]:
    has_trained_head = get_variant(row.variant).task == "classification"
    classes = str(row.num_classes) if has_trained_head else "-"
    return (row.name, row.family, classes, row.licence, state)


def inspect(own: Console, file: str, as_json: bool = False) -> None:
    """Say what a file of weights is, before trusting it.

    Names the project whose form it has and those whose files look just the same, the variant and
    its sizes, head and neck, the strides and why they are assumed (no tensor shows them), what is
    missing or left over, and its SHA-256. Nothing in the file is run.

    Options:
        file (FILE): A file of weights, a folder of save_pretrained, or the name of a checkpoint
            that is here.

    Examples:
        tinyvit inspect mobile_sam.pt
        tinyvit inspect mine.safetensors --json | jq .detection.variant
    """
    from tinyvit.checkpoints import inspect as inspect_file
    from tinyvit.checkpoints.families import get_layout

    report = inspect_file(args.file_of(file))
    if as_json:
        console.write_json(report.to_dict())
        return
    found = report.detection
    console.write(console.fields(_facts(report, get_layout(found.family).title)))
    if found.architecture is not None:
        console.write(f"\n{_stages(found.architecture)}")
    if remarks := [text for text in report.remarks if text != found.strides_reason]:
        console.write("\nremarks")
        console.write(console.fields([("-", remark) for remark in remarks]))


def _facts(report: Inspection, title: str) -> list[tuple[str, str]]:
    """Name and value of everything that is one value."""
    found = report.detection
    sizes = found.architecture
    counts = found.dtypes.items()
    dtypes = [kind if len(counts) == 1 else f"{number} {kind}" for kind, number in counts]
    facts = [
        ("file", report.path),
        ("size", f"{megabytes(report.size)}, {report.container}"),
        ("sha256", report.sha256),
        ("family", f"{found.family}: {title}"),
        ("same keys", ", ".join(found.also)),
        ("variant", found.variant or "none of the catalog"),
        ("parts", ", ".join(part.replace("_", " ") for part in found.parts)),
        ("parameters", f"{found.parameters:,} in {counted(report.tensors, 'tensor')}"),
        ("dtype", ", ".join(dtypes)),
    ]
    if sizes is not None:
        facts += [
            ("picture", f"{found.img_size} x {found.img_size}, {sizes.in_chans} channels"),
            ("stem", sizes.stem),
            ("strides", found.strides_reason.removeprefix("strides ")),
            ("head", f"{sizes.num_classes} classes" if found.has_head else "none"),
            ("neck", f"{sizes.neck_dim} channels" if found.has_neck else "none"),
        ]
    numbers = {
        "missing": len(found.missing),
        "left over": len(found.unexpected),
        "of a wrong shape": len(found.wrong_shapes),
    }
    wrong = ", ".join(f"{number} {what}" for what, number in numbers.items() if number)
    complete = "yes, nothing missing and nothing left over"
    if wrong:
        complete = f"{'yes' if found.is_complete else 'no'}: {wrong} (--json names them)"
    return [(name, value) for name, value in (*facts, ("complete", complete)) if value]


def _stages(sizes: Architecture) -> str:
    rows = [("1", "convolution", str(sizes.embed_dims[0]), str(sizes.depths[0]), "-", "-")]
    columns = (sizes.embed_dims, sizes.depths, sizes.num_heads, sizes.window_sizes)
    for i, numbers in enumerate([*zip(*columns, strict=True)][1:], 2):
        channels, blocks, heads, window = map(str, numbers)
        rows.append((str(i), "attention", channels, blocks, heads, window))
    names = ("stage", "of", "channels", "blocks", "heads", "window")
    return console.table(names, rows, right=(2, 3, 4, 5))


NAMED_AT_MOST = 3
FAMILIES: tuple[str, ...] = get_args(Family)


def known_family(family: str) -> str:
    """The family, if there is one of that name."""
    if family in FAMILIES:
        return family
    hint = nearest(family.replace("-", "_"), FAMILIES)
    raise typer.BadParameter(f"unknown family {family!r}{hint} Choose one of {', '.join(FAMILIES)}")


to_option = typer.Option(callback=known_family, autocompletion=args.matching(FAMILIES))
to_option.help = f"Whose form to write: {', '.join(FAMILIES)}."


def convert(
    own: Console,
    source: str,
    target: Path,
    to: Annotated[str, to_option],
    overwrite: bool = False,
    into: Path | None = None,
    as_json: bool = False,
) -> None:
    """Write a file of weights in another project's form, bit for bit.

    The form of IN is detected from its tensors. What the other form cannot hold is dropped and
    named; where something it needs is not in IN, nothing is written and all that lacks is named.
    'tinyvit' is this package's encoder or classifier; 'tinyvit_sam' the whole of a SAM.

    Options:
        source (IN): A file of weights, or the name of a checkpoint that is here.
        target (OUT): The file to write. Its suffix says what it is: .safetensors, or .pt, .pth,
            .bin or .ckpt for torch.
        to (--to FAMILY):
        overwrite: Replace OUT if it is there; IN never is.
        into (FILE): For --to efficientsam3: a file of SAM 3 whose image encoder OUT has replaced.

    Examples:
        tinyvit convert mobile_sam.pt encoder.safetensors --to tinyvit
        tinyvit convert mine.safetensors for_cream.pth --to cream --overwrite
    """
    from tinyvit.checkpoints import convert as convert_file

    if target.suffix.lower() not in args.SUFFIXES:
        raise ValueError(
            f"{str(target)!r} has no suffix that says what to write; name it with one of "
            f"{', '.join(args.SUFFIXES)}"
        )
    report = convert_file(args.file_of(source), target, to, overwrite, into)
    if as_json:
        console.write_json(report.to_dict())
        return
    size = f"{report.tensors} tensors, {megabytes(target.stat().st_size)}"
    lines = [
        ("read", f"{report.source} ({report.source_family})"),
        ("wrote", f"{report.target} ({report.family}, {report.container}, {size})"),
    ]
    for reason, keys in report.dropped.items():
        few = ", ".join(keys[:NAMED_AT_MOST]) + (", ..." if len(keys) > NAMED_AT_MOST else "")
        lines.append(("dropped", f"{counted(len(keys), 'tensor')}: {reason} ({few})"))
    lines += [("note", note) for note in report.notes]
    console.write(console.fields(lines))
    if not report.dropped:
        own.say("nothing was dropped")
    elif any(len(keys) > NAMED_AT_MOST for keys in report.dropped.values()):
        own.say("--json names every tensor that was dropped")


def download(
    own: Console,
    name: str,
    cache_dir: Path | None = None,
    sha256: str | None = None,
    as_json: bool = False,
) -> None:
    """Fetch published weights and print the path of the file.

    Every file is checked by its SHA-256. One that is here already is not fetched again, and an
    interrupted download goes on where it stopped. The embedded weights need no download: their path
    is printed. TINYVIT_MIRROR names another server, TINYVIT_OFFLINE=1 forbids the network.

    Options:
        name (CHECKPOINT): A name of 'tinyvit models'.
        cache_dir (DIR): Folder for the file. By default $TINYVIT_CACHE, or the user's cache.
        sha256 (HASH): The hash that the file must have.

    Examples:
        tinyvit download mobile_sam
        tinyvit convert $(tinyvit download mobile_sam) encoder.safetensors --to tinyvit
    """
    from tinyvit.checkpoints import fetch, file_sha256

    row = get_checkpoint(name)
    args.announce(own, row.name, cache_dir)
    with own.progress("downloading", counts_bytes=True) as update:
        path = fetch(row, cache_dir, sha256, update)
    if not as_json:
        console.write(str(path))
        return
    file = {"path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    names = ("variant", "family", "licence", "source", "embedded", "note")
    facts = {name: getattr(row, name) for name in names}
    console.write_json({"name": row.name, **file, **facts})
