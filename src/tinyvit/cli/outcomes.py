"""Work on a folder as a person and a script see it: its progress, what failed, a summary, JSON."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinyvit.cli import console
from tinyvit.errors import CheckpointError
from tinyvit.folders.images import Item, list_images

from .arguments import check_checkpoint
from .console import Console, counted

if TYPE_CHECKING:
    from tinyvit.folders.runner import FolderWork, Job


def list_and_check(images: Sequence[Path], output: Path, checkpoint: str | None) -> list[Item]:
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


def carry_out(
    own: Console,
    work: FolderWork[Any],
    items: Sequence[Item],
    output: Path,
    summary: Callable[[list[Job], float], str],
    *,
    words: str,
    facts: Mapping[str, object],
    as_json: bool,
    missing: Sequence[tuple[str, str]] = (),
) -> None:
    """Do the work, show how it goes (``words``; empty for no progress bar), and say what came.

    ``summary`` has what was written, and the seconds it took, in words; ``missing`` is (name,
    message) of what failed before. ``facts`` are of the whole, for JSON. The exit code is 1 if one
    failed.
    """
    for _, message in missing:
        console.complain(f"failed: {message}")
    done: list[Job] = []
    complete: list[Job] = []  # files are written ahead of the jobs that are yielded
    start = time.monotonic()
    try:
        with own.progress(words) if words else nullcontext(None) as update:
            for job in work.run(items, complete.append):
                done.append(job)
                if update is not None:
                    update(len(done), len(items))
                if job.state == "failed":
                    console.complain(f"failed: {job.reason}")
    except (KeyboardInterrupt, CheckpointError, OSError) as err:
        if complete or isinstance(err, KeyboardInterrupt):
            stopped = f"stopped after {len(complete)} of {counted(len(items), 'image')}"
            own.say(f"{stopped}; the same command goes on from there")
        raise
    seconds = time.monotonic() - start
    written = [job for job in done if job.state == "written"]
    own.say(summary(written, seconds))
    for reason, number in Counter(one.reason for one in written if one.reason).items():
        own.say(f"replaced {number} that were {reason}")
    if kept := sum(job.state == "skipped" for job in done):
        own.say(f"kept {kept} made before (--overwrite writes them again)")
    lists: dict[str, list[dict[str, Any]]] = {"written": [], "skipped": [], "failed": []}
    lists["failed"] += [{"picture": name, "path": None, "error": text} for name, text in missing]
    for job in done:
        item = job.item
        row = {"picture": item.name, "path": os.fspath(item.path), **job.told}
        if job.state == "failed":
            row["error"] = job.reason
        elif job.state == "written":
            row["instead_of"] = job.reason or None
        lists[job.state].append(row)
    if failed := len(lists["failed"]):
        console.complain(f"failed {failed} of {len(done) + len(missing)}, named above")
    if as_json:
        end = {"output": str(output), "seconds": round(seconds, 3)}
        console.write_json({**facts, **lists, **end})
    if failed:
        raise typer.Exit(1)
