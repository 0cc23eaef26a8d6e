"""Options as rows of data, for verbs that have many: parameters, checks, and help in groups.

A verb of ``tinyvit train`` takes what the library's settings take. Each of those is one row here:
its name in the library and in TOML, its flags, its kind and its help. A value that is not given is
None; the default stands in the library, and is repeated in a row only to be shown.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar, cast

import typer
from typer.core import TyperCommand

__all__ = ["GroupedCommand", "Kind", "Row", "with_rows"]

Kind = Literal["flag", "int", "float", "text", "ints", "part", "argument"]
Verb = TypeVar("Verb", bound=Callable[..., None])

MAIN = "Options"
_WANTED = {
    "flag": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "text",
    "ints": "whole numbers, such as [7, 7, 14, 7]",
    "part": "a number or text",
    "argument": "text",
}


@dataclass(frozen=True)
class Row:
    """One option.

    Attributes:
        name: What the library and a TOML file call it.
        kind: What it takes; "ints" are whole numbers between commas, "part" a number or text.
        help: For people.
        default: What the library takes where nothing is given, to be shown; None shows nothing.
        flags: How it is written; empty for ``--name``.
        words: The only texts it takes; empty for any.
        metavar: What stands for the value in the help.
        group: The heading it stands under.
        is_free: Whether it may differ when a run goes on.
        complete: Gives words for the shell to complete.
    """

    name: str
    kind: Kind
    help: str
    default: object = None
    flags: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    metavar: str | None = None
    group: str = MAIN
    is_free: bool = False
    complete: Callable[[str], list[str]] | None = None

    @property
    def written(self) -> tuple[str, ...]:
        """All flags; that of a switch with its opposite."""
        flags = self.flags or (f"--{self.name.replace('_', '-')}",)
        if self.kind == "flag" and "/" not in flags[0]:
            flags = tuple(f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
        return flags

    @property
    def flag(self) -> str:
        """What to call it in a message."""
        return "DATA" if self.kind == "argument" else self.written[0].partition("/")[0]

    def parse(self, text: str) -> object:
        """The value of a text of the command line.

        Raises:
            typer.BadParameter: It is not of this kind, or none of the words.
        """
        if self.words and text not in self.words:
            names = ", ".join(map(repr, self.words))
            raise typer.BadParameter(f"{text!r} is not one of {names}.")
        if self.kind == "ints":
            try:
                return [int(word) for word in text.split(",")]
            except ValueError as err:
                raise typer.BadParameter(
                    f"{text!r} is not whole numbers between commas; for example 7,7,14,7."
                ) from err
        if self.kind == "part":
            try:
                return float(text)
            except ValueError:
                return text
        return text

    def check(self, value: object, source: str) -> object:
        """A value of a TOML file, if it is of this kind.

        Raises:
            ValueError: It is not.
        """
        if isinstance(value, bool):
            is_good = self.kind == "flag"
        elif isinstance(value, int):
            is_good = self.kind in ("int", "float", "part")
        elif isinstance(value, float):
            is_good = self.kind in ("float", "part")
        elif isinstance(value, list):
            is_good = self.kind == "ints" and all(type(item) is int for item in value)
        else:
            is_good = isinstance(value, str) and self.kind in ("text", "part", "argument")
        wanted = f"one of {', '.join(self.words)}" if self.words else _WANTED[self.kind]
        if not is_good or (self.words and value not in self.words):
            raise ValueError(f"{source}: {self.name} must be {wanted}, got {value!r}")
        return value


def with_rows(rows: Sequence[Row]) -> Callable[[Verb], Verb]:
    """Let a verb ``f(ctx, **values)`` take these options; values not given are None."""

    def decorate(verb: Verb) -> Verb:
        own = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [own, *map(_parameter, rows)]
        changed = cast(Any, verb)
        changed.__signature__ = inspect.Signature(parameters)
        changed.__annotations__ = {one.name: one.annotation for one in parameters}
        return verb

    return decorate


def _parameter(row: Row) -> inspect.Parameter:
    """A row as a parameter that typer reads."""
    plain: dict[str, type] = {"flag": bool, "int": int, "float": float}
    kind: Any = plain.get(row.kind, str)
    shown = "on" if row.default is True else "off" if row.default is False else row.default
    text = row.help if shown is None else f"{row.help} [{shown}]"
    if row.kind == "argument":
        info = typer.Argument(metavar=row.metavar, show_default=False, help=text)
        kind = list[str]
    else:
        info = typer.Option(
            *row.written,
            metavar=row.metavar or (f"[{'|'.join(row.words)}]" if row.words else None),
            parser=row.parse if kind is str else None,
            autocompletion=row.complete,
            rich_help_panel=row.group,
            show_default=False,
            help=text,
        )
    annotation = operator.getitem(cast(Any, Annotated), (kind | None, info))
    return inspect.Parameter(
        row.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


class _Formatter(Protocol):
    """What is used of click's formatter of help texts."""

    def section(self, name: str) -> AbstractContextManager[None]:
        """A heading, and what is written under it."""
        ...

    def write_dl(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what they mean."""
        ...


class GroupedCommand(TyperCommand):
    """A verb whose help shows its options under headings."""

    def format_options(self, ctx: object, formatter: object) -> None:
        """Write arguments first, then each group in the order of its first option."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], MAIN: []}
        for parameter in self.get_params(cast(Any, ctx)):
            record = parameter.get_help_record(cast(Any, ctx))
            if record is None:
                continue
            heading = getattr(parameter, "rich_help_panel", None) or MAIN
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            groups.setdefault(heading, []).append(record)
        writer = cast(_Formatter, formatter)
        for heading, records in groups.items():
            if records:
                with writer.section(heading):
                    writer.write_dl(records)
