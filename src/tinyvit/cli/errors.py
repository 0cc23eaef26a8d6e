"""From an exception to one line and an exit code.

Expected errors (a file that is not there, a picture that is none, an unknown name) become
``error: ...`` and exit code 1; ``--debug`` shows the traceback too. What nobody expected keeps its
traceback: it is a fault of the program, and to be reported.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TextIO

import typer

from tinyvit.cli import console
from tinyvit.errors import TinyViTError

__all__ = ["guarded"]

Arguments = ParamSpec("Arguments")

FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141  # the last two as a shell reports the signals
EXPECTED = (TinyViTError, ValueError, TypeError, OSError)

WORDS = {  # what the library tells a programmer -> what it means at the command line
    "tinyvit.list_models()": "'tinyvit models'",
    "tinyvit.list_checkpoints()": "'tinyvit models'",
    "convert with overwrite=True": "convert with --overwrite",
    "give it as sha256=…": "give it as --sha256 HASH",
}


def guarded(verb: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """A verb whose errors and warnings are lines on stderr; its context is called ``ctx``."""

    @functools.wraps(verb)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        own = console.of(kwargs.get("ctx"))
        try:
            with _warnings_as_lines():
                verb(*args, **kwargs)
                sys.stdout.flush()
        except BrokenPipeError as err:  # the reader has seen enough
            _forget_stdout()
            raise typer.Exit(PIPE_CLOSED) from err
        except KeyboardInterrupt as err:
            console.complain("interrupted")
            raise typer.Exit(INTERRUPTED) from err
        except EXPECTED as err:
            raise _failed(err, own) from err
        except (MemoryError, RuntimeError) as err:
            if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError":
                hint = MemoryError(
                    f"out of memory: {err}; try a smaller --batch-size, a smaller --size or "
                    "--device cpu"
                )
                raise _failed(hint, own) from err
            raise

    return run


def _failed(err: Exception, own: console.Console) -> typer.Exit:
    """Say what is wrong; the exit to raise."""
    if own.is_debug:
        console.complain("".join(traceback.format_exception(err)).rstrip())
    text = str(err) or type(err).__name__
    if isinstance(err, OSError) and err.strerror:
        text = f"{err.filename}: {err.strerror}" if err.filename else err.strerror
    text = _translated(text)
    console.complain(f"error: {' '.join(text.split()) if own.is_debug else console.one_line(text)}")
    try:
        sys.stdout.flush()
    except OSError:  # such as a full disk behind it
        _forget_stdout()
    return typer.Exit(FAILED)


def _translated(text: str) -> str:
    for words, meaning in WORDS.items():
        text = text.replace(words, meaning)
    return text


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings as one line each, and not as Python shows them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        console.complain(f"warning: {console.one_line(_translated(str(message)))}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _forget_stdout() -> None:
    """Let nothing more be written to a stdout that takes nothing more, also at the exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
