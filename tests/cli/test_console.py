from __future__ import annotations

import errno
import inspect
import io
import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import tinyvit
from tinyvit.cli import console
from tinyvit.cli.console import (
    Console,
    counted,
    fields,
    guarded,
    megabytes,
    one_line,
    table,
    translated,
)
from tinyvit.errors import CheckpointError, MissingExtraError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """``terminal()`` makes stderr a terminal of 80 columns; called in the test, as pytest puts its
    own stderr back after every fixture."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "24")

    def make():
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return make


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_tables_line_up_and_end_without_spaces():
    rows = [("a", "1", ""), ("group:",), ("longer", "22", "x")]
    assert table(("name", "n", "more"), rows, right=(1,)).split("\n") == [
        "name     n  more",
        "a        1",
        "group:",
        "longer  22  x",
    ]


def test_heads_are_bold_in_a_terminal_only(monkeypatch):
    assert "\x1b" not in table(("name",), [("a",)])
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert table(("name",), [("a",)]).startswith("\x1b[1m")


def test_fields_wrap_in_a_terminal_and_never_in_a_pipe(monkeypatch):
    pairs = [("a", "word " * 30), ("long name", ""), ("b", "x" * 100)]
    assert fields(pairs).count("\n") == 2
    monkeypatch.setattr(sys, "stdout", Terminal())
    lines = fields(pairs).split("\n")
    assert max(len(line) for line in lines[:3]) <= 80
    assert lines[1].startswith("           word")
    assert lines[-1] == f"b          {'x' * 100}"  # a hash or a path stays in one piece


def test_numbers_for_people():
    assert [counted(1, "tensor"), counted(0, "tensor")] == ["1 tensor", "0 tensors"]
    assert megabytes(12_459_216) == "12.5 MB"
    assert one_line(" a\n b ") == "a b"


def test_quiet_keeps_remarks_back_and_nothing_else(capsys):
    Console(is_quiet=True).say("no")
    Console().say("yes")
    console.complain("always")
    assert capsys.readouterr() == ("", "yes\nalways\n")


def test_names_that_no_encoding_knows_are_written_as_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.write("böse \udcff")
    console.write_json({"name": "böse \udcff"})
    sys.stdout.flush()
    first, rest = raw.getvalue().split(b"\n", 1)
    assert first == rb"b\xf6se \udcff"
    assert json.loads(rest) == {"name": "böse \udcff"}


def test_names_of_a_locale_without_letters_are_read_as_utf_8(capsys):
    """Found with LC_ALL=C, where ``ü`` was shown as the escapes of its two bytes."""
    name = "ü \udcff".encode("utf-8", "surrogateescape").decode("ascii", "surrogateescape")
    console.complain(name)
    assert capsys.readouterr().err == "ü \\udcff\n"


def test_a_bar_in_a_notebook_with_widgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    for spec in (None, SimpleNamespace()):
        monkeypatch.setattr(console, "find_spec", lambda name, spec=spec: spec)
        assert Console().shows_bars is (spec is not None)
        assert not Console(is_quiet=True).shows_bars


def test_no_bar_where_nobody_looks(capsys):
    with Console().progress("working") as update:
        update(1, 2)
    assert capsys.readouterr() == ("", "")


def test_no_bar_when_quiet(terminal):
    stream = terminal()
    with Console(is_quiet=True).progress("working") as update:
        update(1, 2)
    assert stream.getvalue() == ""


def test_images_are_counted_with_their_rate(terminal):
    stream = terminal()
    with Console().progress("encoding") as update:
        update(1, 9)
        update(5, 9)
    assert re.search(r"encoding .*5/9 [0-9.]+ images/s", plain(stream.getvalue()))


@pytest.mark.parametrize(("total", "words"), [(8_000_000, "5.0/8.0 MB"), (None, "5.0/? MB")])
def test_bytes_of_a_download(terminal, total, words):
    stream = terminal()
    with Console().progress("downloading", counts_bytes=True) as update:
        update(3_000_000, total)
        update(5_000_000, total)
    lines = re.split(r"[\r\n]", plain(stream.getvalue()))
    assert any(words in line for line in lines)
    assert max(len(line) for line in lines) <= 80


def test_a_bar_never_shown_leaves_no_trace(terminal):
    stream = terminal()
    with Console().progress("downloading"):
        pass
    assert "downloading" not in stream.getvalue()


def test_stdout_stays_data_while_a_bar_is_shown(terminal, capsys):
    stream = terminal()
    with Console().progress("encoding") as update:
        update(1, 2)
        console.write("data")
        console.complain("broken")
    assert capsys.readouterr().out == "data\n"
    assert "broken" in plain(stream.getvalue())


def end_of(error, is_debug=False):
    """The exit code that an error becomes."""

    with pytest.raises(typer.Exit) as end, guarded(Console(is_debug=is_debug)):
        raise error
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
        with pytest.raises(type(error)), guarded(Console()):
            raise error


def test_debug_shows_the_traceback_and_all_the_text(capsys):
    assert end_of(ValueError("x" * 5000), is_debug=True) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith(f"error: {'x' * 5000}\n")


def test_interrupts_and_closed_pipes_have_the_shell_s_codes(capsys):
    assert end_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert end_of(BrokenPipeError()) == 141
    assert capsys.readouterr() == ("", "")


def test_warnings_are_one_line(capsys):
    before = warnings.showwarning
    with guarded(Console()):
        warnings.warn("the neck is\nuntrained", stacklevel=1)
        warnings.warn("give it as sha256=… to pin it", stacklevel=1)
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


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("see tinyvit.list_models() and tinyvit.list_checkpoints()", "see 'tinyvit models'"),
        ("List them with tinyvit.list_models()", "List them with 'tinyvit models'"),
        ("remove it, or convert with overwrite=True", "remove it, or convert with --overwrite"),
        ("raise the limit with max_pixels=240000", "raise the limit with --max-pixels 240000"),
        ("say with images=... (--images) where the", "say with --images FOLDER where the"),
        ("images='a b' is no folder; wanted", "--images 'a b' is no folder; wanted"),
        ("or skip them with on_fault='skip'", "or skip them with --on-broken skip"),
        ("call write_logits again, which", "run 'tinyvit train write-logits' again, which"),
        ("0 of 9 points passed pred_iou_thresh 0.88 (best 0.66); try pred_iou_thresh 0.5",
         "0 of 9 points passed --pred-iou-thresh 0.88 (best 0.66); try --pred-iou-thresh 0.5"),
        ("is a folder; load it with tinyvit.from_pretrained('a b')",
         "is a folder; its file is a b/model.safetensors, with an encoder alone and no SAM"),
        ("'my  seed=3 .dir' and images.bmp.gif", "'my  seed=3 .dir' and images.bmp.gif"),  # a path
    ],
)  # fmt: skip
def test_hints_are_in_the_words_of_the_command_line(said, shown):
    assert translated(said) == shown


def test_every_phrase_that_is_translated_is_in_the_library():
    root = Path(inspect.getfile(tinyvit)).parent
    sources = "".join(path.read_text() for path in root.rglob("*.py") if "cli" not in path.parts)
    for phrase in (
        *("convert with overwrite=True", "give it as sha256=…", "raise the limit with max_pixels="),
        *("images=... (--images) where", "skip them with on_fault='skip'"),
        *("call write_logits again, which", 'f"tinyvit.from_pretrained('),
    ):
        assert phrase in sources
