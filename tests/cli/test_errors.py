from __future__ import annotations

import errno
import inspect
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import tinyvit
from tinyvit.cli.console import WORDS, Console, guarded
from tinyvit.errors import CheckpointError, MissingExtraError


def end_of(error, ctx=None):
    """The exit code that an error becomes."""

    @guarded
    def verb(ctx=None):
        raise error

    with pytest.raises(typer.Exit) as end:
        verb(ctx=ctx)
    return end.value.exit_code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("no good"), "error: no good"),
        (MissingExtraError("pip install x"), "error: pip install x"),
        (ValueError("two\nlines  and\tmore"), "error: two lines  and more"),
        (TypeError(""), "error: TypeError"),
        (OSError(errno.EACCES, "Permission denied", "a/b"), "error: a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left"), "error: No space left"),
        (OSError("words alone"), "error: words alone"),
        (ValueError("\x1b[31mred\u202e"), r"error: \x1b[31mred\u202e"),
        (ValueError("x" * 5000), f"error: {'x' * 700} ... (--debug shows all of it)"),
        (ValueError("see tinyvit.list_checkpoints()"), "error: see 'tinyvit models'"),
        (MemoryError("1 GB"), "error: out of memory: 1 GB; try a smaller --batch-size, a smaller "
                              "--size or --device cpu"),
    ],
)  # fmt: skip
def test_expected_errors_are_one_line_and_exit_code_1(capsys, error, line):
    assert end_of(error) == 1
    assert capsys.readouterr() == ("", f"{line}\n")


def test_a_gpu_out_of_memory_is_expected_too(capsys):
    error = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")
    assert end_of(error) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback():
    for error in (RuntimeError("bug"), KeyError("bug"), typer.Exit(7)):
        with pytest.raises(type(error)):
            guarded(lambda error=error: (_ for _ in ()).throw(error))()


def test_debug_shows_the_traceback_and_all_the_text(capsys):
    ctx = SimpleNamespace(obj=Console(is_debug=True))
    assert end_of(ValueError("x" * 5000), ctx) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith(f"error: {'x' * 5000}\n")


def test_interrupts_and_closed_pipes_have_the_shell_s_codes(capsys):
    assert end_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert end_of(BrokenPipeError()) == 141
    assert capsys.readouterr() == ("", "")


def test_warnings_are_one_line(capsys):
    @guarded
    def verb():
        warnings.warn("the neck is\nuntrained", stacklevel=1)
        warnings.warn("give it as sha256=… to pin it", stacklevel=1)

    before = warnings.showwarning
    verb()
    assert warnings.showwarning is before
    expected = "warning: the neck is untrained\nwarning: give it as --sha256 HASH to pin it\n"
    assert capsys.readouterr() == ("", expected)


def test_a_stdout_that_takes_no_more_is_left_alone(monkeypatch, tmp_path, capsys):
    path = tmp_path / "out"
    with path.open("w") as file:

        def refuse():
            raise OSError(errno.ENOSPC, "No space left on device")

        broken = SimpleNamespace(flush=refuse, fileno=file.fileno)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", broken)
            assert end_of(ValueError("first")) == 1
        file.write("lost")
    assert path.read_text() == ""
    assert capsys.readouterr().err == "error: first\n"


@pytest.mark.parametrize("words", WORDS)
def test_the_words_that_are_translated_are_the_library_s(words):
    root = Path(inspect.getfile(tinyvit)).parent
    sources = [path.read_text() for path in root.rglob("*.py") if "cli" not in path.parts]
    assert any(words in source for source in sources)
