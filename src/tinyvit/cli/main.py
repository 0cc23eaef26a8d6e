"""The parser of ``tinyvit``: its verbs and groups, and the options that all of them share.

Nothing heavy is imported here, so that ``tinyvit --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from . import bench, embed, encode, evaluate, export, segment, serve, store, train, weights
from .console import Console
from .settings_options import Verb, as_command, examples_of

GROUPS = {
    "train": (
        "Train a classifier, a segmenter or a student.",
        (
            *(train.classify, train.segment, train.write_logits, train.distill_logits),
            *(train.store_features, train.distill_features),
        ),
    ),
    "evaluate": (
        "Evaluate a classifier or a segmenter; compare two models.",
        (evaluate.classify, evaluate.segment, evaluate.agreement),
    ),
    "store": (
        "Look after a store of embeddings.",
        (store.info, store.verify, store.index, store.export),
    ),
}
"""Name of each group, its help, and its verbs."""

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


def _add(to: typer.Typer, *verbs: Callable[..., None]) -> None:
    """Make functions verbs that are called as they are; examples end their help."""
    for verb in verbs:
        lines = "\n".join(f"  {example}" for example in examples_of(verb))
        name = verb.__name__.replace("_", "-")
        to.command(name, cls=Verb, epilog=f"\b\nExamples:\n{lines}")(as_command(verb))


_add(app, weights.models, weights.inspect, weights.convert, weights.download, encode.encode)
_add(app, encode.classify, segment.segment, serve.serve, export.export, export.verify)
_add(app, embed.embed, store.search, bench.bench)
for _group, (_summary, _verbs) in GROUPS.items():
    _typer = typer.Typer(
        help=_summary,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    _add(_typer, *_verbs)
    app.add_typer(_typer, name=_group)


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
