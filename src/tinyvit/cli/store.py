"""``tinyvit store`` and ``tinyvit search``: what is in an embedding store, and images like one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinyvit.cli import console

from . import arguments as args
from .console import Console, counted, megabytes
from .embed import grouped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tinyvit.embed import EmbeddingStore, Match


def info(own: Console, store: str, as_json: bool = False) -> None:
    """Say what is in a store, made by what, how large.

    All images that failed are named with their reasons.

    Examples:
        tinyvit store info photos.lance
        tinyvit store info s3://bucket/photos.lance --json
    """
    from tinyvit.embed import EmbeddingStore
    from tinyvit.embed.commits import bytes_of_row, version_facts

    opened = EmbeddingStore.open(store)
    dataset, failed = opened.dataset, [(row.path, row.reason) for row in opened.rows("failed")]
    images, made_by = len(opened), version_facts(opened)
    size, fragments = bytes_of_row(opened) * images, len(dataset.get_fragments())
    if as_json:
        recipe = {**asdict(opened.recipe), "image_spec": opened.recipe.image_spec.to_dict()}
        rows = [{"path": path, "error": reason} for path, reason in failed]
        facts = {"store": store, "images": images, "failed": rows, "recipe": recipe, "bytes": size}
        written = {"version": dataset.version, "fragments": fragments, "made_by": made_by}
        console.write_json({**facts, **written})
        return
    commits = f"version {dataset.version}, {counted(fragments, 'fragment')}"
    pairs = [
        ("images", f"{grouped(images)}, and {grouped(len(failed))} that failed"),
        ("size", f"about {megabytes(size)}"),
        *opened.recipe.describe(),
        ("dataset", commits),
        ("last written", ", ".join(f"{name} {value}" for name, value in made_by.items())),
    ]
    console.write(console.fields(pairs))
    for path, reason in failed:
        console.write(f"failed: {path}: {reason}")


def verify(
    own: Console,
    store: str,
    masks: args.Natural = 0,
    checkpoint: str | None = None,
    images: Path | None = None,
    repair: bool = False,
    as_json: bool = False,
) -> None:
    """Read every row of a store and compare its checksum.

    With --masks, nine masks of each of so many images are made from the store and from the image
    itself, and compared. Exit code 1 where a row is damaged.

    Options:
        masks (--masks N): Compare masks of so many images, drawn from the store.
        checkpoint (NAME_OR_PATH): With --masks: the whole SAM that the store was made with, or a
            folder of 'tinyvit export' with it.
        images (--images FOLDER): With --masks: where the images are. By default where they were
            embedded from.
        repair: Delete damaged rows; the next 'tinyvit embed' makes them again.

    Examples:
        tinyvit store verify photos.lance
        tinyvit store verify photos.lance --masks 20 --checkpoint mobile_sam
    """
    from tinyvit.embed import EmbeddingStore
    from tinyvit.embed.verify import compare_masks, verify_store

    args.check_checkpoint(checkpoint)
    opened = EmbeddingStore.open(store)
    with own.progress("verifying", things="rows") as update:
        report = verify_store(opened, repair, update)
    for path in report.damaged:
        console.complain(f"damaged: {path}")
    own.say(
        f"{grouped(report.rows)} rows are as they were written, {grouped(report.failed)} of them "
        f"of images that failed; {grouped(len(report.damaged))} damaged"
        f"{', which are deleted' if repair and report.damaged else ''}"
    )
    agreement = None
    if masks:
        from tinyvit.sam import Segmenter

        segmenter = Segmenter(args.open_sam(own, checkpoint, None, "auto"))
        roots = None if images is None else [str(images)]
        agreement = compare_masks(opened, segmenter, masks, roots)
        own.say(
            f"{agreement.masks} masks on {counted(agreement.images, 'image')}: mean IoU "
            f"{agreement.mean_iou:.4f}, worst {agreement.worst_iou:.4f}"
        )
    if as_json:
        found = None if agreement is None else asdict(agreement)
        console.write_json({"store": store, **asdict(report), "masks": found})
    if report.damaged and not repair:
        raise typer.Exit(1)


def index(own: Console, store: str) -> None:
    """Put a store in order, and index its vectors.

    Indexes are brought up to date, small fragments put together, old versions deleted: what
    'tinyvit embed' does by itself at its end and every hundred commits. Vectors are indexed from a
    million rows on; below, the search is exact and needs no index.

    Examples:
        tinyvit store index photos.lance
    """
    from tinyvit.embed import EmbeddingStore
    from tinyvit.embed.commits import index_vectors, keep_up

    opened = EmbeddingStore.open(store)
    keep_up(opened)
    fragments = counted(len(opened.dataset.get_fragments()), "fragment")
    own.say(f"{store}: indexes of paths and contents, {fragments}")
    if index_vectors(opened):
        own.say("vectors are indexed: searches are fast, and nearly exact")


def export(own: Console, store: str, to: str, output: Path) -> None:
    """Write what a store holds as files for other programs.

    DuckDB, Polars, LanceDB and whatever else reads Lance can open the store itself.

    Options:
        to (--to [files|npy|parquet]): A safetensors file for each image; or all vectors as one
            numpy array and a file of paths; or all columns but the features as Parquet.

    Examples:
        tinyvit store export photos.lance --to npy -o vectors
        tinyvit store export photos.lance --to files -o embeddings
    """
    from tinyvit.embed import EmbeddingStore
    from tinyvit.embed.export import export_store

    opened = EmbeddingStore.open(store)
    with own.progress("writing") as update:
        count = export_store(opened, to, output, update)  # type: ignore[arg-type]
    own.say(f"wrote {counted(count, 'row')} of {store} to {output}")


def search(
    own: Console,
    store: str,
    image: str,
    k: args.Positive = 20,
    sheet: Path | None = None,
    images: Path | None = None,
    as_json: bool = False,
) -> None:
    """Find the images of a store that are like one.

    The image is one of the store, by its path there, or any file, which is encoded by the store's
    own encoder. A SAM encoder was trained to see outlines, a classifier to tell things apart: for
    things, embed with a classifier's weights.

    Options:
        image (IMAGE): A path in the store, or a file.
        k (-k N): Results, at most.
        sheet (FILE.png): Write the results as one image to look at.
        images (--images FOLDER): With --sheet: where the images are. By default where they were
            embedded from.

    Examples:
        tinyvit search photos.lance trip/cat.jpg
        tinyvit search photos.lance new.jpg -k 8 --sheet similar.png
    """
    from tinyvit.embed import EmbeddingStore

    opened = EmbeddingStore.open(store)
    matches = opened.similar(_query(opened, image), k)
    if as_json:
        rows = [match._asdict() for match in matches]
        console.write_json({"store": store, "image": image, "matches": rows})
    else:
        for match in matches:
            console.write(f"{match.similarity:.4f}  {match.path}")
    if sheet is not None:
        missing = _write_sheet(opened, image, matches, sheet, images)
        own.say(f"wrote {sheet}")
        if missing:
            own.say(f"{counted(missing, 'image')} not found; say with --images FOLDER where")


def _query(store: EmbeddingStore, image: str) -> Any:
    """A path in the store, or the vector of a file."""
    if image in store or not Path(image).is_file():
        return image
    from tinyvit.embed.sources import sha256_of

    if (row := store.find_content(sha256_of(Path(image).read_bytes()))) is not None:
        return row.path
    with store.load_engine() as engine:
        (encoded,) = engine.stream(Path(image), pooled=True)
    return encoded.pooled


def _write_sheet(
    store: EmbeddingStore, image: str, matches: list[Match], sheet: Path, images: Path | None
) -> int:
    """Write the image that was searched for and its matches; how many files were not found."""
    from tinyvit.embed.run import SOURCES
    from tinyvit.embed.sources import find_file, read_bytes
    from tinyvit.errors import ImageError
    from tinyvit.images import draw
    from tinyvit.images.decode import decode

    roots = store.dataset.config().get(SOURCES, "").splitlines() if images is None else [images]

    def shown(path: str, caption: str) -> tuple[NDArray[Any], str] | None:
        place = path if Path(path).is_file() else find_file(path, map(str, roots))
        try:
            return draw.panel(decode(read_bytes(place or path))), caption
        except (ImageError, OSError):
            return None

    own = [shown(image, f"{image} (searched for)")]
    found = [shown(match.path, f"{match.similarity:.3f}  {match.path}") for match in matches]
    sections = [("", [one for one in cells if one]) for cells in (own, found)]
    if not any(cells for _, cells in sections):
        raise ValueError("none of the images was found; say with --images FOLDER where they are")
    title = f"Images like {Path(image).name}"
    draw.save_png(sheet, draw.gallery([(name, cells) for name, cells in sections if cells], title))
    return sum(one is None for one in (*own, *found))
