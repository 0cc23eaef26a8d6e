"""Work on a folder as a person and a script see it: its progress, what failed, a summary, JSON."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvit.cli import console
from tinyvit.errors import CheckpointError

from .console import Console, counted

if TYPE_CHECKING:
    from tinyvit.folders.runner import Outcome


def check_output(output: Path) -> None:
    """Refuse an output folder that is a file.

    Raises:
        ValueError: It is one.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{str(output)!r} is a file; give a folder to write to")


def follow(own: Console, outcomes: Iterator[Outcome], total: int, words: str) -> list[Outcome]:
    """Do the work, show how it goes, and name what failed.

    Args:
        own: Where it is shown.
        outcomes: From the work, one for each image.
        total: How many there will be.
        words: What is going on; empty for no progress bar.
    """
    done: list[Outcome] = []
    try:
        with own.progress(words) if words else nullcontext(None) as update:
            for outcome in outcomes:
                done.append(outcome)
                if update is not None:
                    update(len(done), total)
                if outcome.state == "failed":
                    console.complain(f"failed: {outcome.reason}")
    except (KeyboardInterrupt, CheckpointError, OSError) as err:
        if done or isinstance(err, KeyboardInterrupt):  # files are written ahead of outcomes
            stopped = f"stopped after {len(done)} of {counted(total, 'image')}"
            own.say(f"{stopped}; the same command goes on from there")
        raise
    return done


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


def complain_of_failed(outcomes: Sequence[Outcome], missing: int = 0) -> bool:
    """Say how many images failed, ``missing`` others among them; whether there are any."""
    failed = missing + sum(outcome.state == "failed" for outcome in outcomes)
    if failed:
        console.complain(f"failed {failed} of {len(outcomes) + missing}, named above")
    return failed > 0


def as_json(outcomes: Sequence[Outcome]) -> dict[str, list[dict[str, Any]]]:
    """The outcomes by state, as plain data."""
    lists: dict[str, list[dict[str, Any]]] = {"written": [], "skipped": [], "failed": []}
    for outcome in outcomes:
        image = outcome.item.image
        row: dict[str, Any] = {"picture": image.name, "path": os.fspath(image.path)}
        if outcome.state == "failed":
            row["error"] = outcome.reason
        row.update(outcome.facts)
        if outcome.state == "written":
            row["instead_of"] = outcome.reason or None
        lists[outcome.state].append(row)
    return lists
