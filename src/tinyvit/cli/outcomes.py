"""Work on a folder as a person and a script see it: its progress, what failed, a summary, JSON."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinyvit.cli import console
from tinyvit.errors import CheckpointError
from tinyvit.folders.images import ImageFile, list_images

from .arguments import check_checkpoint
from .console import Console, counted

if TYPE_CHECKING:
    from tinyvit.folders.runner import Outcome


def list_and_check(images: Sequence[Path], output: Path, checkpoint: str | None) -> list[ImageFile]:
    """The images; refuses at once an output folder that cannot be written, or no checkpoint."""
    check_checkpoint(checkpoint)
    check_folder(output, "-o")
    return list_images(images, output)


def check_folder(output: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written, before the work and not after it."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{str(output)!r} is a file; give a folder to write to")
    missing = [place for place in (output, *output.parents) if not place.exists()]
    try:
        if missing:  # if the outermost can be made, the others can
            missing[-1].mkdir()
            missing[-1].rmdir()
        elif not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as err:
        raise ValueError(
            f"the folder {str(output)!r} cannot be written: {err.strerror}; name another with "
            f"{flag}"
        ) from err


def follow(
    own: Console,
    run: Callable[[Callable[[Outcome], object]], Iterator[Outcome]],
    total: int,
    words: str,
) -> tuple[list[Outcome], float]:
    """Do the work, show how it goes (``words``; empty for no progress bar), and name what failed.

    ``run`` begins the work and is told where to tell what is done. Gives the outcomes, one for each
    of the images, ``total`` in all, and the seconds it took.
    """
    done: list[Outcome] = []
    complete: list[Outcome] = []  # files are written ahead of the outcomes that are yielded
    start = time.monotonic()
    try:
        with own.progress(words) if words else nullcontext(None) as update:
            for outcome in run(complete.append):
                done.append(outcome)
                if update is not None:
                    update(len(done), total)
                if outcome.state == "failed":
                    console.complain(f"failed: {outcome.reason}")
    except (KeyboardInterrupt, CheckpointError, OSError) as err:
        if complete or isinstance(err, KeyboardInterrupt):
            stopped = f"stopped after {len(complete)} of {counted(total, 'image')}"
            own.say(f"{stopped}; the same command goes on from there")
        raise
    return done, time.monotonic() - start


def written(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of images whose files were written."""
    return [outcome for outcome in outcomes if outcome.state == "written"]


def say_replaced_and_kept(own: Console, outcomes: Sequence[Outcome]) -> None:
    """What was written in the place of older files, and what was left as it is."""
    reasons = Counter(outcome.reason for outcome in written(outcomes) if outcome.reason)
    for reason, number in reasons.items():
        own.say(f"replaced {number} that were {reason}")
    kept = sum(outcome.state == "skipped" for outcome in outcomes)
    if kept:
        own.say(f"kept {kept} made before (--overwrite writes them again)")


def finish(
    outcomes: Sequence[Outcome],
    facts: Mapping[str, object],
    output: Path,
    seconds: float,
    as_json: bool,
    missing: Sequence[tuple[str, str]] = (),
) -> None:
    """Say how many failed, ``missing`` (name, message) among them, and all as JSON if asked.

    Raises:
        typer.Exit: With 1, if one failed.
    """
    lists: dict[str, list[dict[str, Any]]] = {"written": [], "skipped": [], "failed": []}
    lists["failed"] += [{"picture": name, "path": None, "error": text} for name, text in missing]
    for outcome in outcomes:
        image = outcome.item.image
        row: dict[str, Any] = {"picture": image.name, "path": os.fspath(image.path)}
        if outcome.state == "failed":
            row["error"] = outcome.reason
        row.update(outcome.facts)
        if outcome.state == "written":
            row["instead_of"] = outcome.reason or None
        lists[outcome.state].append(row)
    failed = len(lists["failed"])
    if failed:
        console.complain(f"failed {failed} of {len(outcomes) + len(missing)}, named above")
    if as_json:
        end = {"output": str(output), "seconds": round(seconds, 3)}
        console.write_json({**facts, **lists, **end})
    if failed:
        raise typer.Exit(1)
