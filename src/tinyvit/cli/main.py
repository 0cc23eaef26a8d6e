"""The parser of ``tinyvit``: its verbs, and the options that all of them share.

Nothing heavy is imported here, so that ``tinyvit --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from tinyvit.cli import bench, classify, convert, download, encode, inspect, models, segment
from tinyvit.cli.console import Console
from tinyvit.cli.errors import guarded
from tinyvit.cli.verb_groups import GROUPS, make_group

__all__ = ["app", "main"]

ANYWHERE = ("--debug", "--quiet", "-q")  # may stand before or after the verb

app = typer.Typer(
    name="tinyvit",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each verb has a --help of its own, with examples. Start with: tinyvit models",
    rich_markup_mode=None,  # plain text: rewrapped to the terminal, and good to grep
    pretty_exceptions_enable=False,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"tinyvit {version('tinyvit')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _for_all_verbs(
    ctx: typer.Context,
    is_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and all its text.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")
    ] = False,
) -> None:
    """TinyViT: encode, classify, segment, and look after weights of the whole lineage.

    Data goes to stdout, talk and progress to stderr. Exit codes: 0 done, 1 something failed,
    2 wrong usage, 130 interrupted.
    """
    ctx.obj = Console(is_quiet=quiet, is_debug=debug)
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _add(verb: Callable[..., None], examples: Sequence[str]) -> None:
    """Make a function a verb; its examples end its help."""
    lines = "\n".join(f"  {example}" for example in examples)
    app.command(epilog=f"\b\nExamples:\n{lines}")(guarded(verb))


_add(models.models, models.EXAMPLES)
_add(inspect.inspect, inspect.EXAMPLES)
_add(convert.convert, convert.EXAMPLES)
_add(download.download, download.EXAMPLES)
_add(encode.encode, encode.EXAMPLES)
_add(classify.classify, classify.EXAMPLES)
_add(segment.segment, segment.EXAMPLES)
_add(bench.bench, bench.EXAMPLES)
for _name, (_summary, _verbs) in GROUPS.items():
    app.add_typer(make_group(_summary, _verbs), name=_name)


def reordered(arguments: Sequence[str]) -> list[str]:
    """Move the options that all verbs share to the front, so that they may stand anywhere."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    shared = [word for word in arguments[:end] if word in ANYWHERE]
    others = [word for word in arguments[:end] if word not in ANYWHERE]
    return [*shared, *others, *arguments[end:]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process.

    Args:
        arguments: Without the program's name; None for those of the process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    app(args=reordered(words), prog_name="tinyvit")
