"""The parser of ``tinyvit``: its verbs and groups, and the options that all of them share.

Nothing heavy is imported here, so that ``tinyvit --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from tinyvit.cli import (
    bench,
    classify,
    encode,
    evaluate,
    export,
    models,
    segment,
    serve,
    teachers,
    train,
    weights,
)

from .console import Console, guarded
from .settings_options import GroupedCommand, Verb, with_documented_options

Verbs = tuple[tuple[str, Callable[..., None], Sequence[str]], ...]

TRAIN: Verbs = (
    ("classify", train.classify, train.EXAMPLES["classify"]),
    ("segment", train.segment, train.EXAMPLES["segment"]),
    ("write-logits", teachers.write_logits, teachers.LOGITS_EXAMPLES),
    ("distill-logits", train.distill_logits, train.EXAMPLES["distill-logits"]),
    ("store-features", teachers.store_features, teachers.FEATURES_EXAMPLES),
    ("distill-features", train.distill_features, train.EXAMPLES["distill-features"]),
)
EVALUATE: Verbs = (
    ("classify", evaluate.classify, evaluate.EXAMPLES["classify"]),
    ("segment", evaluate.segment, evaluate.EXAMPLES["segment"]),
    ("agreement", evaluate.agreement, evaluate.EXAMPLES["agreement"]),
)
GROUPS: dict[str, tuple[str, Verbs]] = {
    "train": ("Train a classifier, a segmenter or a student.", TRAIN),
    "evaluate": ("Evaluate a classifier or a segmenter; compare two models.", EVALUATE),
}
"""Name of each group, its help, and its verbs: name, function and examples."""

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


def _add(
    to: typer.Typer,
    verb: Callable[..., None],
    examples: Sequence[str],
    name: str | None = None,
    cls: type[Verb] = Verb,
) -> None:
    """Make a function, whose context is called ``ctx``, a verb; its examples end its help."""
    lines = "\n".join(f"  {example}" for example in examples)
    to.command(name, cls=cls, epilog=f"\b\nExamples:\n{lines}")(
        guarded(with_documented_options(verb))
    )


_add(app, models.models, models.EXAMPLES)
_add(app, weights.inspect, weights.INSPECT_EXAMPLES)
_add(app, weights.convert, weights.CONVERT_EXAMPLES)
_add(app, weights.download, weights.DOWNLOAD_EXAMPLES)
_add(app, encode.encode, encode.EXAMPLES)
_add(app, classify.classify, classify.EXAMPLES)
_add(app, segment.segment, segment.EXAMPLES)
_add(app, serve.serve, serve.EXAMPLES)
_add(app, export.export, export.EXPORT_EXAMPLES)
_add(app, export.verify, export.VERIFY_EXAMPLES)
_add(app, bench.bench, bench.EXAMPLES)
for _group, (_summary, _verbs) in GROUPS.items():
    _typer = typer.Typer(
        help=_summary,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for _name, _verb, _examples in _verbs:
        _add(_typer, _verb, _examples, _name, GroupedCommand)
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
