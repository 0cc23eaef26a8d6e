"""What users and scripts hold on to, written down: flags, public names, keys of answers.

A change here is a change of the public surface. After a wanted one, write the files anew with
``TINYVIT_SNAPSHOTS=write scripts/test tests/test_snapshots.py`` and look at the difference.
"""

import importlib
import json
import os
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from tinyvit.cli.main import app

FOLDER = Path(__file__).parent / "data" / "snapshots"
PACKAGES = (
    "",
    ".modules",
    ".checkpoints",
    ".inference",
    ".sam",
    ".embed",
    ".train",
    ".evaluate",
    ".bench",
)


def compare(name, value):
    """Equal to what was written down in ``name``.json; written where that is asked for."""
    file = FOLDER / f"{name}.json"
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if os.environ.get("TINYVIT_SNAPSHOTS") == "write":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def verbs(command, words=()):
    """Every verb as (words, command), groups opened."""
    if hasattr(command, "commands"):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from verbs(command.get_command(context, name), (*words, name))
    else:
        yield words, command


def describe(parameter):
    """``--size -s = 1024``: the flags of an option and its default."""
    flags = " ".join(sorted([*parameter.opts, *parameter.secondary_opts]))
    default = parameter.default
    if default is None or callable(default) or "Sentinel" in type(default).__name__:
        return flags
    return f"{flags} = {getattr(default, 'value', default)}"


def test_flags_with_their_defaults():
    found = {
        " ".join(words): sorted(map(describe, command.params))
        for words, command in verbs(typer.main.get_command(app))
    }
    compare("flags", found)


def keys_of(value):
    """The keys of JSON, nested; of a list those of its first element."""
    if isinstance(value, dict):
        return {key: keys_of(child) for key, child in value.items()}
    return [keys_of(value[0])] if isinstance(value, list) and value else type(value).__name__


@pytest.mark.parametrize(
    "words",
    [
        "models",
        "inspect tinyvit_sam_2m",
        "encode IMAGE -o OUT",
        "segment IMAGE --point 172,118 -o OUT",
    ],
)
def test_keys_of_json(words, tmp_path):
    image = Path(__file__).parents[1] / "examples" / "pictures" / "chelsea.png"
    argv = words.replace("IMAGE", str(image)).replace("OUT", str(tmp_path)).split()
    result = CliRunner().invoke(app, [*argv, "--json"])
    assert result.exit_code == 0, result.output
    compare(f"json.{words.split()[0]}", keys_of(json.loads(result.stdout)))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names(package):
    module = importlib.import_module(f"tinyvit{package}")
    names = sorted(module.__all__)
    compare(f"names{package or '.tinyvit'}", names)
    for name in names:
        assert getattr(module, name) is not None
