"""Options made from settings: a field of a settings class becomes an option of a verb.

Flags, types, choices, groups and help are read from the class (``tinyvit.train.settings``). Every
option is None where it was not given, so that a file or a run that is resumed can say it; the
library's default is shown in the help.
"""

from __future__ import annotations

import dataclasses
import glob
import inspect
import operator
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from tinyvit.train.settings import Setting, Settings, settings_of

from .arguments import SHARED, check_checkpoint, matching_checkpoints, matching_models, one_of
from .console import translated

Function = TypeVar("Function", bound=Callable[..., None])

_FIRST_GROUP = "Options"
_WEIGHTS = "NAME_OR_FILE"  # the metavar
_COMPLETE = {
    **dict.fromkeys((_WEIGHTS, "CHECKPOINT"), matching_checkpoints),
    "VARIANT": matching_models,
}
_LINE = re.compile(r"^(\w+)(?: \((.*?)\))?:(.*(?:\n +.*)*)", re.MULTILINE)


def with_documented_options(verb: Function) -> Function:
    """Let typer read a verb's options from the ``Options:`` of its docstring.

    A line is ``name (--flag -f METAVAR): help``. Without flags they come from the name, and a
    parameter without a default is an argument. ``arguments.SHARED`` has what several verbs share.
    """
    if hasattr(verb, "__signature__"):  # made from settings
        return verb
    marked, plain = get_type_hints(verb, include_extras=True), get_type_hints(verb)
    text, _, own = inspect.cleandoc(verb.__doc__ or "").partition("\n\nOptions:\n")
    lines = {name: line for part in (SHARED, textwrap.dedent(own)) for name, *line in
             _LINE.findall(part)}  # fmt: skip
    changed = cast(Any, verb)
    for name, one in inspect.signature(verb).parameters.items():
        if name in lines:
            info = _info_of(one, marked[name], *lines[name])
            plain[name] = operator.getitem(cast(Any, Annotated), (plain[name], info))
    changed.__annotations__, changed.__doc__ = plain, text
    return verb


def _info_of(parameter: inspect.Parameter, hint: Any, marks: str, text: str) -> Any:
    """What typer needs of a parameter; limits and parsers of its type stay."""
    words, name, default = marks.split(), parameter.name.replace("_", "-"), parameter.default
    flags = [word for word in words if word.startswith("-")]
    metavar = " ".join(word for word in words if not word.startswith("-")) or None
    if default is parameter.empty and not flags:
        info: Any = typer.Argument()
    else:
        info = copy(_marked(hint)) or typer.Option()
        if isinstance(default, bool) and not flags:
            flags = [f"--{name}/--no-{name}" if default else f"--{name}"]
        info.param_decls = flags or (f"--{name}",)
    if (
        metavar and (flags or hint is not Path) and Path in (hint, *get_args(hint))
    ):  # else its type is in the help
        info.parser = path
    elif (metavar or "").startswith("["):
        info.parser = one_of(*cast(str, metavar)[1:-1].split("|"))
    info.metavar, info.help = metavar or info.metavar, info.help or " ".join(text.split())
    info.autocompletion = info.autocompletion or _COMPLETE.get(metavar or "")
    info.show_default = "default" not in info.help
    return info


def _marked(hint: Any) -> Any:
    """The ``typer.Option`` in a type, at any depth, or None."""
    if isinstance(hint, OptionInfo):
        return hint
    inner = (*getattr(hint, "__metadata__", ()), *get_args(hint))
    return next((found for one in inner if (found := _marked(one))), None)


def options_of(cls: type[Settings]) -> list[inspect.Parameter]:
    """The parameters of a verb that takes these settings."""
    return [_option(one) for one in settings_of(cls).values() if one.flag.kind != "hidden"]


def option(name: str, kind: Any, info: Any) -> inspect.Parameter:
    """A parameter of a type that typer reads from its ``info``, None where it is not given."""
    annotation = operator.getitem(cast(Any, Annotated), (kind | None, info))
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=annotation)


def with_options(parameters: Sequence[inspect.Parameter]) -> Callable[[Function], Function]:
    """Let a verb ``f(ctx, **values)`` take these options."""

    def decorate(verb: Function) -> Function:
        keyword = inspect.Parameter.KEYWORD_ONLY
        context = inspect.Parameter("ctx", keyword, annotation=typer.Context)
        whole = [context, *parameters]
        changed = cast(Any, verb)
        changed.__signature__ = inspect.Signature(whole)
        changed.__annotations__ = {one.name: one.annotation for one in whole}
        return verb

    return decorate


def flag_of(setting: Setting) -> str:
    """What the command line calls a setting in a message."""
    if setting.flag.kind == "argument":
        return setting.flag.metavar or setting.name.upper()
    return _flags_of(setting)[0].partition("/")[0]


def _flags_of(setting: Setting) -> tuple[str, ...]:
    """All flags; that of a switch with its opposite."""
    flags = setting.flag.flags or (f"--{setting.name.replace('_', '-')}",)
    if setting.kinds == (bool,):
        return tuple(f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
    return flags


def _option(setting: Setting) -> inspect.Parameter:
    default, help_text = setting.default, setting.help
    if default not in (None, dataclasses.MISSING):
        shown = {True: "on", False: "off"}.get(default) if isinstance(default, bool) else default
        help_text += f" [{shown:g}]" if isinstance(shown, float) else f" [{shown}]"
    help_text = translated(help_text)  # the docstring speaks of tinyvit.list_models()
    if setting.flag.kind == "argument":
        info = typer.Argument(
            metavar=setting.flag.metavar,
            show_default=False,
            help=f"{help_text} May be left out with --resume.",
        )
        return option(setting.name, list[str], info)
    kind: Any = setting.kinds[0]
    parser: Callable[[str], object] | None = None
    if setting.choices:
        parser = one_of(*setting.choices)
    elif kind is tuple:
        kind, parser = str, whole_numbers
    elif len(setting.kinds) > 1:
        kind, parser = str, _number_or_text
    metavar = setting.flag.metavar
    info = typer.Option(
        *_flags_of(setting),
        metavar=f"[{'|'.join(setting.choices)}]" if setting.choices else metavar,
        parser=parser,
        autocompletion=_COMPLETE.get(metavar or ""),
        rich_help_panel=setting.group or _FIRST_GROUP,
        show_default=False,
        help=help_text,
    )
    return option(setting.name, kind, info)


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
    """A verb that names only options alike in their letters when one is mistyped."""

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


class GroupedCommand(Verb):
    """A verb whose help shows its options under headings."""

    def format_options(self, ctx: object, formatter: object) -> None:
        """Write arguments first, then each group in the order of its first option."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], _FIRST_GROUP: []}
        for parameter in self.get_params(cast(Any, ctx)):
            record = parameter.get_help_record(cast(Any, ctx))
            if record is None:
                continue
            heading = getattr(parameter, "rich_help_panel", None) or _FIRST_GROUP
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            groups.setdefault(heading, []).append(record)
        writer = cast(Any, formatter)  # click's, of which typer may have a copy
        for heading, records in groups.items():
            if records:
                with writer.section(heading):
                    writer.write_dl(records)
