"""What was chosen for a run: options before a file's lines before what the run had before.

Names and values only; what they mean is known to the library. ``task.toml`` in a run's folder holds
the task's choices, beside the loop's in ``settings.toml``: so a run goes on by its folder alone,
and with other choices it is refused.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from tinyvit.cli.option_rows import Row
from tinyvit.cli.train_options import LOOP
from tinyvit.errors import TinyViTError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = ["TASK_FILE", "Choices", "gather", "speaking_of_options", "task_toml"]

Values = dict[str, object]

TASK_FILE, SETTINGS_FILE = "task.toml", "settings.toml"
_VERB = "task"
_PLACES = ("data", "val", "images", "val_images", "logits", "features", "checkpoint", "sam")


@dataclass(frozen=True)
class Choices:
    """What was chosen; what is not named keeps the library's default.

    Attributes:
        loop: Of ``TrainSettings``, with the folder.
        task: Of the task's own settings, with places of data.
        resume: Go on with the run in the folder.
        as_json: Print the result as JSON.
    """

    loop: Values
    task: Values
    resume: bool
    as_json: bool

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(str(self.loop["folder"]))

    @property
    def seed(self) -> int:
        """Source of all chance."""
        seed = self.loop.get("seed", 0)
        return seed if isinstance(seed, int) else 0


def gather(verb: str, rows: Sequence[Row], given: Mapping[str, object]) -> Choices:
    """Put the choices together.

    Args:
        verb: The task, as it is called on the command line.
        rows: The task's own options.
        given: Values of the command line by name; None where nothing was given.

    Raises:
        typer.BadParameter: The folder or the data is missing, or there are several data.
        ValueError: A file holds something else, or the folder holds another run.
        OSError: A file cannot be read.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    resume, as_json = bool(flags.pop("resume", False)), bool(flags.pop("as_json", False))
    config = flags.pop("config", None)
    if "bf16" in flags:
        flags["precision"] = "bf16" if flags.pop("bf16") else "fp32"
    if "data" in flags:
        flags["data"] = _only(flags["data"])
    chosen = flags if config is None else {**_read(Path(str(config)), rows), **flags}
    if "folder" not in chosen:
        raise typer.BadParameter("name the folder of the run with -o RUN_FOLDER.")
    folder = Path(str(chosen["folder"]))
    before = _before(folder, verb, rows) if resume else {}
    _refuse_changes(folder, rows, before, chosen)
    values = {**before, **chosen}
    if "data" not in values:
        raise typer.BadParameter(
            "name the data to learn from, or --resume a run that 'tinyvit train' has begun in "
            f"{folder}."
        )
    own = {row.name for row in rows}
    loop = {name: value for name, value in values.items() if name not in own}
    return Choices(loop, {name: values[name] for name in values if name in own}, resume, as_json)


def task_toml(verb: str, choices: Choices) -> str:
    """The text of ``task.toml``: places that exist here are written in full."""
    lines = [f"{_VERB} = {json.dumps(verb)}\n"]
    for name, value in choices.task.items():
        if name in _PLACES and os.path.exists(str(value)):
            value = os.path.abspath(str(value))
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)


@contextmanager
def speaking_of_options(rows: Sequence[Row]) -> Iterator[None]:
    """Let the library's errors speak of options instead of names.

    Raises:
        ValueError: As it came, in other words.
        TypeError: The same.
        TinyViTError: The same, of the kind that came.
    """
    try:
        yield
    except (TinyViTError, ValueError, TypeError) as err:
        text = _in_options(str(err), (*LOOP, *rows))
        is_plain = isinstance(err, TinyViTError) or type(err) in (ValueError, TypeError)
        if text == str(err) or not is_plain:
            raise
        raise type(err)(text) from err


def _in_options(text: str, rows: Sequence[Row]) -> str:
    text = re.sub(r"\b(by|with) resume\b", r"\1 --resume", text)
    for row in rows:
        before, option = r"(?<![\w/'\".-])", row.flag
        if "_" in row.name:  # no word of English
            text = re.sub(rf"{before}{row.name}(?![\w/.-])=?", f"{option} ", text)
        else:
            text = re.sub(rf"{before}{row.name}=", f"{option} ", text)
            text = re.sub(rf"{before}{row.name} (must|was) ", rf"{option} \1 ", text)
    return re.sub(r" +([;,.)]|$)", r"\1", re.sub(r"  +", " ", text))


def _only(data: object) -> object:
    """The one place of data.

    Raises:
        typer.BadParameter: There are several.
    """
    if not isinstance(data, (list, tuple)):
        return data
    if len(data) > 1:
        raise typer.BadParameter(
            f"{len(data)} places of data were named, and one is wanted; for many tar files name "
            "their folder, or a pattern in quotes such as 'train-*.tar'."
        )
    return data[0] if data else None


def _read(path: Path, rows: Sequence[Row]) -> Values:
    """The choices in a TOML file.

    Raises:
        ValueError: It is no TOML, a name is unknown, or a value is of another kind.
        OSError: It cannot be read.
    """
    try:
        values: Values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is no TOML file: {err}") from err
    values.pop(_VERB, None)
    known = {row.name: row for row in (*LOOP, *rows) if row.name != "bf16"}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{path}: unknown names {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return {name: known[name].check(value, str(path)) for name, value in values.items()}


def _before(folder: Path, verb: str, rows: Sequence[Row]) -> Values:
    """What the run in a folder was begun with.

    Raises:
        ValueError: It is another task's run, or a file of it is damaged.
        OSError: A file cannot be read.
    """
    values: Values = {}
    task = folder / TASK_FILE
    if task.is_file():
        text = task.read_text(encoding="utf-8")
        found = re.search(rf'^{_VERB} = "(.*)"$', text, re.MULTILINE)
        if found is not None and found[1] != verb:
            raise ValueError(
                f"{folder} holds a run of 'tinyvit train {found[1]}', not of {verb}; go on with it "
                "by that, or choose another folder"
            )
        values.update(_read(task, rows))
    if (folder / SETTINGS_FILE).is_file():
        values.update(_read(folder / SETTINGS_FILE, rows))
    values.pop("folder", None)
    return values


def _refuse_changes(folder: Path, rows: Sequence[Row], before: Values, chosen: Values) -> None:
    """The task's choices must be those the run was begun with; the loop checks its own.

    Raises:
        ValueError: Some differ.
    """
    if not (before.keys() & {row.name for row in rows}):
        return
    against = [
        f"{row.flag} was {before.get(row.name, row.default)!r} and is {chosen[row.name]!r}"
        for row in rows
        if row.name in chosen
        and not row.is_free
        and chosen[row.name] != before.get(row.name, row.default)
    ]
    if against:
        raise ValueError(
            f"{folder} holds a run with other choices, and going on would not give its numbers: "
            f"{'; '.join(against)}. Leave them out, or start in another folder"
        )
