from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer

from tinyvit.cli.arguments import Positive
from tinyvit.cli.console import Console
from tinyvit.cli.settings_options import (
    Verb,
    as_command,
    examples_of,
    flag_of,
    options_of,
    with_options,
)
from tinyvit.train.settings import Flag, Group, Range, Settings, TrainSettings, settings_of
from tinyvit.train.tasks.settings import (
    ClassifySettings,
    DistillFeaturesRun,
    DistillLogitsSettings,
    SegmentSettings,
)


@dataclass(frozen=True)
class Some(Settings):
    """Settings of each kind.

    Attributes:
        data: Where it is.
        img_size: Side of the input, of
            ``tinyvit.list_models()``.
        rate: How fast.
        is_loud: Say more.
        windows: Sides.
        held_out: What is held out.
        augment: Random changes.
        seed: No option.
    """

    data: Annotated[str, Flag(metavar="DATA", kind="argument")]
    img_size: Annotated[int, Flag("--img-size", "--size"), Group("Model")] = 224
    rate: Annotated[float, Range(above=0)] = 0.5
    is_loud: bool = False
    windows: Annotated[tuple[int, ...] | None, Flag(metavar="N,N"), Group("Model")] = None
    held_out: float | str = 0.1
    augment: Literal["none", "light"] = "light"
    seed: Annotated[int, Flag(kind="hidden")] = 0


@dataclass(frozen=True)
class Limits:
    """A part of a verb's options."""

    page: bool = True
    hosts: tuple[str, ...] = ()
    most: int = 3
    hidden: int = 0

    def __post_init__(self):
        if self.most < 0:
            raise ValueError("most must be at least 0")


NAMES = ("data", "img_size", "rate", "is_loud", "windows", "held_out", "augment")


@pytest.fixture
def call(capsys):
    """``call(*words)`` gives (exit code, the values or None, stdout, stderr)."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    seen = []

    @app.command(cls=Verb)
    @as_command
    @with_options(options_of(Some))
    def verb(own: Console, **values: object) -> None:
        """Do it."""
        seen.append(values)

    def run(*words):
        seen.clear()
        with pytest.raises(SystemExit) as end:
            app(args=list(words), prog_name="verb")
        return (end.value.code or 0, seen[0] if seen else None, *capsys.readouterr())

    return run


def test_what_is_not_given_is_none(call):
    assert call()[:2] == (0, dict.fromkeys(NAMES, None))


def test_values_come_in_their_kind(call):
    words = "a b --size 32 --rate 2 --no-is-loud --windows 7,14 --held-out 0.25 --augment none"
    values = (["a", "b"], 32, 2.0, False, [7, 14], 0.25, "none")
    assert call(*words.split())[1] == dict(zip(NAMES, values, strict=True))
    assert call("--held-out", "val")[1]["held_out"] == "val"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--augment", "much"), "'much' is not one of 'none', 'light'."),
        (("--windows", "7,x"), "'7,x' is not whole numbers between commas; for example 7,7,14,7."),
        (("--img-size", "big"), "--img-size"),
        (("--seed", "1"), "No such option"),
    ],
)
def test_wrong_values_are_wrong_usage(call, words, said):
    code, values, _, err = call(*words)
    assert (code, values) == (2, None)
    assert said in " ".join(err.split())


def test_the_help_is_in_groups_with_defaults(call):
    out = call("--help")[2]
    first, model = out.split("\nModel:\n")
    arguments, options = first.split("\nOptions:\n")
    assert "Where it is." in arguments.split("Arguments:")[1]
    assert "--rate <float>" in options or "--rate FLOAT" in options
    assert "How fast. [0.5]" in options
    assert "Say more. [off]" in options
    assert "--augment [none|light]" in options
    assert "--img-size, --size" in model
    assert "Side of the input, of 'tinyvit models'. [224]" in " ".join(model.split())
    assert "--windows N,N" in model
    assert "--windows" not in options


def test_a_verb_s_docstring_gives_its_options(capsys):
    seen = []

    def verb(
        own: Console,
        data: str,
        output: Path,
        *,
        limits: Limits,
        sides: list[Positive] | None = None,
        how: str = "slow",
        no_pad: bool = False,
        flip: bool = True,
        as_json: bool = False,
    ) -> None:
        """Do it.

        Options:
            data (DATA): Where it
                is.
            sides (--side PIXELS): Some sides.
            how ([slow|fast]): How fast.
            flip: Mirror some.
            no_page: Leave the page out.
            hosts (--host): Further names.
            most: Above all.

        Examples:
            verb a -o b
        """
        values = (data, output, limits, sides, how, no_pad, flip, as_json)
        seen.append((own, *values))

    assert examples_of(verb) == ["verb a -o b"]
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(cls=Verb)(as_command(verb))

    def call(words):
        with pytest.raises(SystemExit) as end:
            app(args=words.split(), prog_name="verb")
        return end.value.code, " ".join(capsys.readouterr()).replace("\n", " ")

    code, _ = call("a -o b --side 3 --side 4 --how fast --no-pad --no-flip --json")
    assert code == 0
    values = ("a", Path("b"), Limits(), [3, 4], "fast", True, False, True)
    assert seen == [(Console(), *values)]
    call("a -o b --no-page --host x --host y --most 7")
    assert seen[1][3] == Limits(page=False, hosts=("x", "y"), most=7)
    for wrong, said in (
        ("--side 0", "'--side'"),
        ("--how much", "'slow', 'fast'"),
        ("--most -1", "most must be at least 0"),
        ("", "--output"),
    ):
        code, text = call(f"a {'-o b' if wrong else ''} {wrong}")
        assert (code, said in text) == (2, True)
    text = " ".join(call("--help")[1].split())
    for line in ("Where it is.", "--side PIXELS", "--how [slow|fast]", "--no-pad Do not pad"):
        assert line in text
    assert "Options: data (" not in text
    assert "--hidden" not in text


def test_what_a_setting_is_called():
    known = settings_of(Some)
    assert [flag_of(known[name]) for name in NAMES[:4]] == [
        *("DATA", "--img-size", "--rate", "--is-loud")
    ]


@pytest.mark.parametrize(
    "task", [ClassifySettings, DistillLogitsSettings, DistillFeaturesRun, SegmentSettings]
)
def test_no_name_has_two_meanings(task):
    both = [one.name for cls in (TrainSettings, task) for one in options_of(cls)]
    assert len(both) == len(set(both))
