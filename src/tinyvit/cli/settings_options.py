"""Verbs as typer reads them: options come from a docstring, from a dataclass, or from settings.

Of settings (``tinyvit.train.settings``) flags, types, choices, groups and help are read from the
class. Each of their options is None where it was not given, so that a file or a run that is resumed
can say it; the library's default is shown in the help.
"""

from __future__ import annotations

import dataclasses
import glob
import inspect
import operator
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo, ParameterInfo

from tinyvit.train.settings import Setting, Settings, settings_of

from . import console
from .arguments import SHARED, check_checkpoint, matching_checkpoints, matching_models, one_of

Function = Callable[..., None]

_FIRST_GROUP = "Options"
_WEIGHTS = "NAME_OR_FILE"  # the metavar
_COMPLETE = {
    **dict.fromkeys((_WEIGHTS, "CHECKPOINT"), matching_checkpoints),
    "VARIANT": matching_models,
}
_LINE = re.compile(r"^(\w+)(?: \((.*?)\))?:(.*(?:\n +.*)*)", re.MULTILINE)


def as_command(verb: Callable[..., None]) -> Callable[..., None]:
    """What typer calls for ``verb(own, ...)``, where ``own`` is the ``Console`` to speak by.

    A line under ``Options:`` of the verb's docstring is ``name (--flag -f METAVAR): help``;
    ``arguments.SHARED`` has what several verbs share. Without flags they come from the name, and a
    parameter without a default is an argument. A parameter that is a dataclass stands for those of
    its fields that have a line (``no_NAME`` switches off what is on), ``**values`` for the options
    of ``with_options``.
    """
    hints = get_type_hints(verb).items()
    groups = {name: kind for name, kind in hints if name != "own" and _is_group(kind)}
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    options = [context, *documented(verb)]

    def run(ctx: object, **values: Any) -> None:
        with console.guarded(getattr(ctx, "obj", None) or console.Console()) as own:
            made = {name: _made(kind, values) for name, kind in groups.items()}
            verb(own, **values, **made)

    changed = cast(Any, run)
    changed.__name__, changed.__doc__ = verb.__name__, _parts_of(verb)[0]
    changed.__signature__ = inspect.Signature(options)
    changed.__annotations__ = {one.name: one.annotation for one in options}
    return run


def with_options(options: Sequence[inspect.Parameter]) -> Callable[[Function], Function]:
    """Let a verb ``f(own, **values)`` take these options."""

    def decorate(verb: Function) -> Function:
        cast(Any, verb).options = options
        return verb

    return decorate


def _is_group(kind: object) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _made(kind: Callable[..., Any], values: dict[str, Any]) -> Any:
    """An object of those values that are its fields; they are taken out."""
    found: dict[str, object] = {}
    for name, one in inspect.signature(kind).parameters.items():
        if f"no_{name}" in values and one.default is True:
            found[name] = not values.pop(f"no_{name}")
        elif name in values:
            value = values.pop(name)
            found[name] = tuple(value or ()) if isinstance(one.default, tuple) else value
    try:
        return kind(**found)
    except ValueError as err:
        raise typer.BadParameter(str(err)) from err


def _parts_of(source: object) -> tuple[str, str, str]:
    """Of a docstring: its text, what is under ``Options:``, and under ``Examples:``."""
    text, _, examples = inspect.cleandoc(source.__doc__ or "").partition("\n\nExamples:\n")
    text, _, options = text.partition("\n\nOptions:\n")
    return text, textwrap.dedent(options), textwrap.dedent(examples)


def examples_of(verb: Callable[..., None]) -> list[str]:
    """The commands under ``Examples:`` of a verb's docstring, which end its help."""
    return _parts_of(verb)[2].splitlines()


def documented(source: Callable[..., Any], shared: str = SHARED) -> Iterator[inspect.Parameter]:
    """The parameters of a verb, or the fields of a dataclass, that have a line."""
    shared += _parts_of(source)[1] + "\n"
    lines = {name: line for name, *line in _LINE.findall(shared)}
    marked, plain = get_type_hints(source, include_extras=True), get_type_hints(source)
    for one in inspect.signature(source).parameters.values():
        name, kind, default = one.name, plain.get(one.name), one.default
        if one.kind is one.VAR_KEYWORD:
            yield from getattr(source, "options", ())
        elif _is_group(kind):
            yield from documented(cast(Any, kind), shared)
        elif default is True and f"no_{name}" in lines:
            yield _option_of(f"no_{name}", bool, False, bool, *lines[f"no_{name}"])
        elif name in lines and isinstance(default, tuple):
            yield _option_of(name, list[str] | None, None, list[str], *lines[name])
        elif name in lines:
            yield _option_of(name, kind, default, marked[name], *lines[name])


def _option_of(
    name: str, kind: Any, default: object, hint: Any, marks: str, text: str
) -> inspect.Parameter:
    """A parameter as typer reads it; limits and parsers in ``hint`` stay."""
    flags = [word for word in marks.split() if word.startswith("-")]
    metavar = " ".join(word for word in marks.split() if not word.startswith("-"))
    is_argument = default is inspect.Parameter.empty and not flags
    info = copy(_marked(hint)) or (typer.Argument() if is_argument else typer.Option())
    if isinstance(info, OptionInfo):
        flag = f"--{name.replace('_', '-')}"
        flag += flag.replace("--", "/--no-", 1) if default is True else ""
        info.param_decls = flags or (flag,)
    if metavar.startswith("["):
        info.parser = one_of(*metavar[1:-1].split("|"))
    elif Path in (hint, *get_args(hint)) and metavar and (flags or hint is not Path):
        info.parser = path  # else its type is in the help
    info.metavar, info.help = metavar or info.metavar, info.help or " ".join(text.split())
    info.autocompletion = info.autocompletion or _COMPLETE.get(metavar)
    info.show_default = "default" not in info.help
    annotation = operator.getitem(cast(Any, Annotated), (kind, info))
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _marked(hint: Any) -> Any:
    """The ``typer.Option`` or ``typer.Argument`` in a type, at any depth, or None."""
    if isinstance(hint, ParameterInfo):
        return hint
    inner = (*getattr(hint, "__metadata__", ()), *get_args(hint))
    return next((found for one in inner if (found := _marked(one))), None)


# -- options of settings -----------------------------------------------------------------------


def options_of(cls: type[Settings]) -> list[inspect.Parameter]:
    """The parameters of a verb that takes these settings."""
    return [_of_setting(one) for one in settings_of(cls).values() if one.flag.kind != "hidden"]


def _of_setting(setting: Setting) -> inspect.Parameter:
    default, text, metavar = setting.default, setting.help, setting.flag.metavar or ""
    if default not in (None, dataclasses.MISSING):
        shown = {True: "on", False: "off"}.get(default) if isinstance(default, bool) else default
        text += f" [{shown:g}]" if isinstance(shown, float) else f" [{shown}]"
    text = console.translated(text)  # the docstring speaks of tinyvit.list_models()
    kind: Any = setting.kinds[0]
    info: Any = typer.Option(rich_help_panel=setting.group or _FIRST_GROUP)
    if setting.flag.kind == "argument":
        kind, info, text = list[str], typer.Argument(), f"{text} May be left out with --resume."
    elif setting.choices:
        metavar = f"[{'|'.join(setting.choices)}]"
    elif kind is tuple or len(setting.kinds) > 1:
        kind, info.parser = str, whole_numbers if kind is tuple else _number_or_text
    flags = setting.flag.flags or (f"--{setting.name.replace('_', '-')}",)
    if setting.kinds == (bool,):
        flags = tuple(f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
    return _option_of(setting.name, kind | None, None, info, " ".join((*flags, metavar)), text)


def flag_of(setting: Setting) -> str:
    """What the command line calls a setting in a message."""
    if setting.flag.kind == "argument":
        return setting.flag.metavar or setting.name.upper()
    return setting.flag.flags[0] if setting.flag.flags else f"--{setting.name.replace('_', '-')}"


def check_places(settings: Settings) -> None:
    """Find out which data or weights are not there before torch is loaded, which takes seconds."""
    for name, setting in settings_of(type(settings)).items():
        place = getattr(settings, name)
        if setting.is_place and isinstance(place, str):
            is_weights = setting.flag.metavar == _WEIGHTS
            (check_checkpoint if is_weights else check_data)(place, flag_of(setting))


def check_data(place: str, flag: str) -> None:
    """ValueError where there is no such file or folder, and no file of such a pattern."""
    if not os.path.exists(place) and not glob.glob(place):
        raise ValueError(f"there is no file or folder {place!r} for {flag}; check the path")


def path(text: str) -> Path:
    """A path; nothing is no path, and not the folder in which the command runs."""
    if not text:
        raise typer.BadParameter("the path is empty; give a file or a folder.")
    return Path(text)


def whole_numbers(text: str) -> list[int]:
    """``7,7,14`` as numbers; another text is wrong usage."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as err:
        raise typer.BadParameter(
            f"{text!r} is not whole numbers between commas; for example 7,7,14,7."
        ) from err


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])  # of click, or typer's copy


class Verb(TyperCommand):
    """Shows options under headings, and names only those alike in letters to a mistyped one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; of the options that click would name, those keep that are near."""
        try:
            return super().parse_args(ctx, args)
        except _UsageError as err:
            error = cast(Any, err)
            if getattr(error, "possibilities", None):  # "--" alone makes all of them alike
                names = [flag.lstrip("-") for flag in error.possibilities]
                near = get_close_matches(error.option_name.lstrip("-"), names)
                error.possibilities = [f"--{name}" for name in near]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments first, then each group in the order of its first option."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], _FIRST_GROUP: []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                panel = getattr(parameter, "rich_help_panel", None) or _FIRST_GROUP
                is_argument = parameter.param_type_name == "argument"
                groups.setdefault("Arguments" if is_argument else panel, []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
