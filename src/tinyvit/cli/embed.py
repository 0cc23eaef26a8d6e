"""``tinyvit embed``: images of folders, lists and buckets into an embedding store."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli import console

from . import arguments as args
from .console import Console, Update, counted, megabytes

if TYPE_CHECKING:
    from tinyvit.embed import EmbeddingStore, EmbedEstimate, EmbedReport
    from tinyvit.inference import Engine

NAMED_AT_MOST = 5
SECONDS_BETWEEN_LINES = 60.0  # where nobody sees a progress bar


def _part_of(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts):
        return int(number) - 1, int(parts)
    raise typer.BadParameter(f"{text!r} is not I/N with I from 1 to N, for example 1/4.")


Part = Annotated[Any, typer.Option(parser=_part_of, metavar="I/N")]


def embed(
    own: Console,
    sources: list[str],
    store: str,
    checkpoint: str | None = None,
    model: str | None = None,
    size: args.Positive | None = None,
    dtype: str | None = None,
    keep: str | None = None,
    *,
    running: args.FolderOptions,
    batch_size: args.Positive = 8,
    max_pixels: args.Positive = args.MAX_PIXELS,
    check: str = "state",
    retry_failed: bool = False,
    prune: bool = False,
    part: Part = None,
    ray: str | None = None,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Embed images once, for later clicks and searches.

    Encoding takes nearly all the time of a click. The store is a Lance dataset: features as SAM's
    decoder wants them, and a vector for each image to search by. The same command goes on where it
    stopped, and embeds only what is new or changed; renamed, moved and copied files are recognised
    by their content. An unreadable image does not stop the work: it is a row with a reason, and the
    exit code is 1. Several commands may write to one store. Needs the extra 'store'.

    Options:
        sources (SOURCE): Folders, image files, @list.txt with a path in each line, or addresses
            such as s3://bucket/photos.
        store (--output -o STORE): Where the store is or shall be, for example photos.lance or
            s3://bucket/photos.lance.
        checkpoint (NAME_OR_PATH): A name of 'tinyvit models', a file of weights, or a folder of
            save_pretrained or 'tinyvit export'. By default the encoder in the store, and for a new
            one tinyvit_sam_2m. A classifier gives vectors only.
        dtype ([fp16|int8|fp32]): How features are stored. By default as the store says, fp16 for a
            new one; int8, with a scale for each channel, takes half the space.
        keep ([all|pooled]): Features and vectors, or vectors only. By default as the store says.
        check ([state|content]): Read files whose size or time has changed, or all of them.
        retry_failed: Try again what failed before.
        prune: Delete rows whose file is not among the sources any more.
        part: Work on this part of the images only, as one of several commands at the same time.
        ray (--ray ADDRESS): Let --workers actors of Ray do the work; needs the extra 'ray'. local
            starts Ray here; auto, as under 'ray job submit', or an address joins a cluster.
        workers: Threads that read and write images meanwhile; with --ray the actors that embed. By
            default as the cores, or as Ray's CPUs or GPUs, are enough for.
        cpus_per_worker: CPUs of each actor, and its threads.
        gpus_per_worker: GPUs of each actor.
        dry_run: Say what would be done, how large it gets and how long it takes, after three
            images.

    Examples:
        tinyvit embed photos -o photos.lance
        tinyvit embed photos -o photos.lance --checkpoint mobile_sam --dtype int8
        tinyvit embed photos -o photos.lance --ray local --workers 4
        tinyvit embed @list.txt s3://bucket/more -o s3://bucket/photos.lance --part 1/8
    """
    args.check_checkpoint(checkpoint)
    from tinyvit.embed import EmbeddingStore, RayWorkers, embed_images, estimate

    actors = None
    if ray is not None:
        actors = RayWorkers(ray, running.workers, cpus_per_worker, gpus_per_worker)
    found = EmbeddingStore.find(store)
    given: dict[str, Any] = {
        **{"dtype": dtype, "keep": keep, "check": check, "retry_failed": retry_failed},
        **{"part": part or (0, 1), "max_pixels": max_pixels},
    }
    engine, given["early"] = _open(own, found, checkpoint, model, size, running, batch_size)
    with engine:
        args.announce_engine(own, checkpoint or (store if found else DEFAULT_CHECKPOINT), engine)
        if dry_run:
            _show_estimate(estimate(sources, store, engine, **given), as_json)
            return
        with (
            _stopped_by_signals(),
            redirect_stdout(sys.stderr),  # where Ray says that an actor died
            own.progress("embedding", things="") as update,
        ):
            given |= {"ray": actors, "prune": prune, "progress": _shown(own, update)}
            report = embed_images(sources, found or store, engine, **given)
    _finish(own, store, report, prune, as_json)


def _open(
    own: Console,
    found: EmbeddingStore | None,
    checkpoint: str | None,
    model: str | None,
    size: int | None,
    running: args.FolderOptions,
    batch_size: int,
) -> tuple[Engine, bool | None]:
    """What encodes, and whether Light HQ-SAM's early map is wanted; None: as the store says."""
    from tinyvit.inference import Engine

    if found is not None and checkpoint is None:
        if model is not None or size is not None:
            raise ValueError(
                f"{found.url} says itself which model it is made with and at which size; leave "
                "--model and --size out"
            )
        with found.fetch_encoder() as folder:
            arguments = running.arguments(str(folder))
            if arguments["precision"] == "fp32":  # not asked for: the store's
                del arguments["precision"]
            return found.engine_of(folder, **arguments, batch_size=batch_size), None
    name, is_hq = checkpoint or DEFAULT_CHECKPOINT, None
    arguments = {**running.arguments(checkpoint), "batch_size": batch_size}
    if args.is_exported(checkpoint, size, model) or find_spec("torch") is None:
        return Engine(name, **arguments), None
    built = args.open_model(own, name, model, size)
    if checkpoint is not None:
        from tinyvit.checkpoints import inspect

        is_hq = "hq_decoder" in inspect(args.file_of(name)).detection.parts or None
    return Engine(built, **arguments), is_hq


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM, as schedulers send it, stop the work as Ctrl-C does: all is committed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shown(own: Console, update: Update) -> Callable[[int, int, int], None]:
    """Shows the progress as a bar, or as a line each minute."""
    start = last = time.monotonic()
    before: int | None = None

    def show(done: int, total: int, failed: int) -> None:
        nonlocal last, before
        now = time.monotonic()
        before = done - 1 if before is None else before
        rate = (done - before) / max(now - start, 1e-9)
        more = f"{rate:.1f} images/s  {in_words((total - done) / rate)} left"
        more += f"  {failed} failed" if failed else ""
        update(done, total, more=more)
        if not own.shows_bars and now - last >= SECONDS_BETWEEN_LINES:
            last = now
            own.say(f"embedding  {grouped(done)} of {grouped(total)}  {more}")

    return show


def in_words(seconds: float) -> str:
    """A time for people: ``6 days``, ``3 hours``, ``20 s``."""
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size:
            return counted(round(seconds / size), unit)
    return f"{seconds:.0f} s"


def grouped(number: int) -> str:
    """``1 000 000``."""
    return f"{number:,}".replace(",", " ")


def _show_estimate(found: EmbedEstimate, as_json: bool) -> None:
    if as_json:
        console.write_json(vars(found))
        return
    pairs = [
        ("new", grouped(found.new)),
        ("to be read again", grouped(found.changed)),
        ("kept", grouped(found.kept)),
        ("failed before", grouped(found.failed)),
        ("gone", grouped(found.gone)),
    ]
    if found.nbytes is not None and found.seconds is not None:
        hours = f"{in_words(found.seconds)} ({found.seconds / 3600:.2f} hours)"
        pairs += [("bytes, at most", megabytes(found.nbytes)), ("time, at most", hours)]
    console.write(console.fields(pairs))


def _finish(own: Console, store: str, report: EmbedReport, prune: bool, as_json: bool) -> None:
    """Say what was done; the exit code is 1 if an image failed."""
    for path, reason in report.failed[:NAMED_AT_MOST]:
        console.complain(f"failed: {path}: {reason}")
    counts = [
        f"stored {grouped(report.stored)}",
        f"kept {grouped(report.kept)}",
        f"taken over {grouped(report.copied)}",
        f"failed {grouped(len(report.failed))}",
        f"{'deleted' if prune else 'gone'} {grouped(report.gone)}",
    ]
    own.say(
        f"{', '.join(counts)}; {megabytes(report.nbytes)} in {in_words(report.seconds)}: {store}"
    )
    if report.gone and not prune:
        own.say("rows of files that are gone stay; --prune deletes them")
    if as_json:
        failed = [{"path": path, "error": reason} for path, reason in report.failed]
        console.write_json({"store": store, **vars(report), "failed": failed})
    if report.failed:
        more = len(report.failed) - NAMED_AT_MOST
        tail = f"; 'tinyvit store info {store}' names all" if more > 0 else ""
        console.complain(f"failed {grouped(len(report.failed))}, named above{tail}")
        raise typer.Exit(1)
