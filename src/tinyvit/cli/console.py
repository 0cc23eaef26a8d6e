"""What a verb says: data on stdout, remarks and progress on stderr, errors as one line.

Expected errors (a file that is not there, an image that is none, an unknown name) become
``error: ...`` and exit code 1; ``--debug`` shows the traceback too. What nobody expected keeps its
traceback: it is a fault of the program, and to be reported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tinyvit.errors import CheckpointError, TinyViTError
from tinyvit.lazy import missing

if TYPE_CHECKING:
    from tinyvit.folders.images import Item
    from tinyvit.folders.runner import FolderWork, Job

Update = Callable[..., None]
"""Called with done and in all, and perhaps ``what`` and ``more`` to show."""

FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141  # the last two as a shell reports the signals
EXPECTED = (TinyViTError, ValueError, TypeError, OSError)
_LONGEST_LINE = 700  # of an error; a checkpoint that does not fit names hundreds of keys
_GAP = "  "

TRANSLATIONS = tuple(  # what the library tells a programmer -> what to type; whole phrases, so
    (re.compile(words), meaning)  # that names of files stay as they are
    for words, meaning in (
        (r"tinyvit\.list_(?:models|checkpoints)\(\)( and tinyvit\.list_checkpoints\(\))?",
         "'tinyvit models'"),
        (r"convert with overwrite=True", "convert with --overwrite"),
        (r"give it as sha256=…", "give it as --sha256 HASH"),
        (r"raise the limit with max_pixels=(\d+)", r"raise the limit with --max-pixels \1"),
        (r"say with images=\.\.\.(?: \(--images\))? where", "say with --images FOLDER where"),
        (r"\bimages=('.*?' is no folder)", r"--images \1"),
        (r"skip them with on_fault='skip'", "skip them with --on-broken skip"),
        (r"call write_logits again, which", "run 'tinyvit train write-logits' again, which"),
        (r"load it with tinyvit\.from_pretrained\('(.*?)'\)",
         r"its file is \1/model.safetensors, with an encoder alone and no SAM"),
        (r"(passed|try) (pred_iou_thresh|stability_score_thresh)(?= [\d.]+)",
         lambda found: f"{found[1]} --{found[2].replace('_', '-')}"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Console:
    """What the options for all verbs ask for: no remarks, or tracebacks and whole messages."""

    is_quiet: bool = False
    is_debug: bool = False

    def say(self, text: str) -> None:
        """A remark for the person at the terminal."""
        if not self.is_quiet:
            complain(text)

    @contextmanager
    def progress(
        self, words: str, *, counts_bytes: bool = False, things: str = "images"
    ) -> Iterator[Update]:
        """A progress bar on stderr, if that is a terminal or a notebook.

        Gives a function to call with (done, in all or None), in ``things`` or bytes; the bar
        appears at its first call. ``what`` stands in the place of ``words``, and ``more`` in that
        of the speed.
        """
        if not self.shows_bars:
            yield lambda done, total, what="", more="": None
            return
        from rich import progress
        from rich.console import Console as RichConsole

        speed = progress.TextColumn("{task.fields[more]}", markup=False)
        counts: list[progress.ProgressColumn] = [progress.MofNCompleteColumn(), speed]
        if counts_bytes:
            counts = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        if things:  # else the caller knows what is left
            counts.append(progress.TimeRemainingColumn())
        with progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=20),
            *counts,
            console=RichConsole(stderr=True),
            transient=True,
            redirect_stdout=False,
        ) as bar:

            def update(done: int, total: int | None, what: str = words, more: str = "") -> None:
                if not bar.tasks:  # a download that is resumed begins with what is there
                    bar.add_task(what, total=total, completed=done, more="")
                task = bar.tasks[0]
                more = more or f"{task.speed or 0:.1f} {things}/s"
                bar.update(task.id, description=what, completed=done, total=total, more=more)

            yield update

    @property
    def shows_bars(self) -> bool:
        """Whether somebody sees a progress bar: in a terminal, or a notebook with widgets."""
        is_notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None
        return not self.is_quiet and (sys.stderr.isatty() or is_notebook)


def write(text: str) -> None:
    """One or more lines of data on stdout; a character it cannot show is written as an escape."""
    encoding = sys.stdout.encoding or "utf-8"
    typer.echo(readable(text).encode(encoding, "backslashreplace").decode(encoding))


def write_json(content: object) -> None:
    """Data on stdout as JSON, in ASCII so that any name of a file survives."""
    write(json.dumps(content, indent=2))


def complain(text: str) -> None:
    """A line on stderr, quiet or not, in the words of the command line; no control characters."""
    said = readable(translated(text))
    typer.echo(
        "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in said), err=True
    )


def readable(text: str) -> str:
    """The text with bytes of names that the locale does not know, as with LC_ALL=C, as UTF-8."""

    def decode(run: re.Match[str]) -> str:
        return run[0].encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")

    return re.sub("[\udc80-\udcff]+", decode, text)


def one_line(text: str, is_whole: bool = False) -> str:
    """The text in one line, cut where it grows too long to be read."""
    text = re.sub(r"\s*[\n\r\t]\s*", " ", text.strip())  # blanks in a path stay
    if len(text) > _LONGEST_LINE and not is_whole:
        return f"{text[:_LONGEST_LINE].rstrip()} ... (--debug shows all of it)"
    return text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows in columns under ``heads``; a row of one text alone stands across all columns.

    ``right`` has the numbers of the columns that are set to the right.
    """
    whole = [row for row in (heads, *rows) if len(row) == len(heads)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        if len(row) == len(heads):
            places = enumerate(zip(row, widths, strict=True))
            row = [f"{cell:{'>' if i in right else '<'}{width}}" for i, (cell, width) in places]
        lines.append(_GAP.join(row).rstrip())
    if sys.stdout.isatty():
        lines[0] = typer.style(lines[0], bold=True)
    return "\n".join(lines)


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what they stand for, wrapped to a terminal and never in a pipe."""
    indent = max(len(name) for name, _ in pairs) + len(_GAP)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    wrap = textwrap.TextWrapper(
        max(width, indent + 20), break_long_words=False, break_on_hyphens=False
    )
    lines = []
    for name, text in pairs:
        wrap.initial_indent, wrap.subsequent_indent = name.ljust(indent), " " * indent
        lines.append(wrap.fill(text) or name)
    return "\n".join(lines)


def megabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e6:.1f} MB"


def counted(number: int, thing: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


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
        complain(f"failed: {message}")
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
                    complain(f"failed: {job.reason}")
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
        complain(f"failed {failed} of {len(done) + len(missing)}, named above")
    if as_json:
        end = {"output": str(output), "seconds": round(seconds, 3)}
        write_json({**facts, **lists, **end})
    if failed:
        raise typer.Exit(1)


# -- errors -------------------------------------------------------------------------------------


@contextmanager
def guarded(own: Console) -> Iterator[Console]:
    """Work whose errors and warnings are lines on stderr, with the exit code that they mean."""
    try:
        with _warnings_as_lines():
            yield own
            sys.stdout.flush()
    except BrokenPipeError as err:  # the reader has seen enough
        _forget_stdout()
        raise typer.Exit(PIPE_CLOSED) from err
    except KeyboardInterrupt as err:
        complain("interrupted")
        raise typer.Exit(INTERRUPTED) from err
    except (*EXPECTED, MemoryError, RuntimeError, ModuleNotFoundError) as err:
        text = str(err) or type(err).__name__
        if isinstance(err, ModuleNotFoundError):
            known = missing(err, "this command")
            if known is err:
                raise
            text = str(known)
        elif isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError":
            text = f"out of memory: {err}; try a smaller --batch-size, a smaller --size or "
            text += "--device cpu"
        elif not isinstance(err, EXPECTED):
            raise
        elif isinstance(err, OSError) and err.strerror:
            text = f"{err.filename}: {err.strerror}" if err.filename else err.strerror
        if own.is_debug:
            complain("".join(traceback.format_exception(err)).rstrip())
        complain(f"error: {one_line(text, is_whole=own.is_debug)}")
        try:
            sys.stdout.flush()
        except OSError:  # such as a full disk behind it
            _forget_stdout()
        raise typer.Exit(FAILED) from err


def translated(text: str) -> str:
    """The text with what it tells a programmer put as the command line has it."""
    for words, meaning in TRANSLATIONS:
        text = words.sub(meaning, text)
    return text


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings as one line each, and not as Python shows them."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        complain(f"warning: {one_line(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _forget_stdout() -> None:
    """Let nothing more be written to a stdout that takes nothing more, also at the exit."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
