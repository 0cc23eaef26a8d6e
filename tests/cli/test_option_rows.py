from __future__ import annotations

import pytest
import typer

from tinyvit.cli.settings_options import GroupedCommand, Row, with_rows

ROWS = (
    Row("data", "argument", "Where it is.", metavar="DATA"),
    Row("img_size", "int", "Side.", 224, ("--img-size", "--size"), group="Model"),
    Row("rate", "float", "How fast.", 0.5),
    Row("is_loud", "flag", "Say more.", False),
    Row("windows", "ints", "Sides.", metavar="N,N", group="Model"),
    Row("held_out", "part", "What is held out."),
    Row("augment", "text", "Chance.", "light", words=("none", "light")),
)


@pytest.fixture
def call(capsys):
    """``call(*words)`` gives (exit code, the values or None, stdout, stderr)."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    seen = []

    @app.command(cls=GroupedCommand)
    @with_rows(ROWS)
    def verb(ctx: typer.Context, **values: object) -> None:
        """Do it."""
        seen.append(values)

    def run(*words):
        seen.clear()
        with pytest.raises(SystemExit) as end:
            app(args=list(words), prog_name="verb")
        return (end.value.code or 0, seen[0] if seen else None, *capsys.readouterr())

    return run


def test_what_is_not_given_is_none(call):
    code, values, *_ = call()
    assert code == 0
    assert values == dict.fromkeys((row.name for row in ROWS), None)


def test_values_come_in_their_kind(call):
    words = "a b --size 32 --rate 2 --no-is-loud --windows 7,14 --held-out 0.25 --augment none"
    assert call(*words.split())[1] == {
        "data": ["a", "b"],
        "img_size": 32,
        "rate": 2.0,
        "is_loud": False,
        "windows": [7, 14],
        "held_out": 0.25,
        "augment": "none",
    }
    assert call("--held-out", "val", "--img-size", "8")[1] | {"data": 0} == {
        **dict.fromkeys((row.name for row in ROWS), None),
        "data": 0,
        "img_size": 8,
        "held_out": "val",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--augment", "much"), "'much' is not one of 'none', 'light'."),
        (("--windows", "7,x"), "'7,x' is not whole numbers between commas; for example 7,7,14,7."),
        (("--img-size", "big"), "--img-size"),
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
    assert "--windows N,N" in model
    assert "--windows" not in options


@pytest.mark.parametrize(
    ("row", "good", "bad", "wanted"),
    [
        (1, [3], [2.5, True, "3"], "img_size must be a whole number, got"),
        (2, [3, 2.5], [False, "3"], "rate must be a number, got"),
        (3, [True], [1, "yes"], "is_loud must be true or false, got"),
        (4, [[7, 7]], [7, ["a"], [True]], "windows must be whole numbers, such as"),
        (5, [0.1, "val"], [True, [1]], "held_out must be a number or text, got"),
        (6, ["none"], ["much", 3], "augment must be one of none, light, got"),
        (0, ["here"], [3], "data must be text, got"),
    ],
)
def test_values_of_a_file_are_checked(row, good, bad, wanted):
    for value in good:
        assert ROWS[row].check(value, "a.toml") == value
    for value in bad:
        with pytest.raises(ValueError, match=f"^a.toml: {wanted}"):
            ROWS[row].check(value, "a.toml")


def test_what_a_row_is_called():
    assert [row.flag for row in ROWS[:4]] == ["DATA", "--img-size", "--rate", "--is-loud"]
    assert ROWS[3].written == ("--is-loud/--no-is-loud",)
    assert Row("a", "flag", "", flags=("--a/--b",)).written == ("--a/--b",)
