"""The verbs behind ``tinyvit train`` and ``tinyvit evaluate``, with their examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import typer

from tinyvit.cli import evaluate, teaching, train
from tinyvit.cli.errors import guarded
from tinyvit.cli.option_rows import GroupedCommand

__all__ = ["GROUPS", "make_group"]

Verbs = tuple[tuple[str, Callable[..., None], Sequence[str]], ...]

TRAIN: Verbs = (
    ("classify", train.classify, train.EXAMPLES["classify"]),
    ("segment", train.segment, train.EXAMPLES["segment"]),
    ("write-logits", teaching.write_logits, teaching.LOGITS_EXAMPLES),
    ("distill-logits", train.distill_logits, train.EXAMPLES["distill-logits"]),
    ("store-features", teaching.store_features, teaching.FEATURES_EXAMPLES),
    ("distill-features", train.distill_features, train.EXAMPLES["distill-features"]),
)
EVALUATE: Verbs = (
    ("classify", evaluate.classify, evaluate.EXAMPLES["classify"]),
    ("segment", evaluate.segment, evaluate.EXAMPLES["segment"]),
    ("agreement", evaluate.agreement, evaluate.EXAMPLES["agreement"]),
)
GROUPS: dict[str, tuple[str, Verbs]] = {
    "train": (
        "Train a classifier, a segmenter or a student.",
        TRAIN,
    ),
    "evaluate": (
        "Measure a classifier or a segmenter; compare two models.",
        EVALUATE,
    ),
}
"""Name of each group, its help, and its verbs: name, function and examples."""


def make_group(summary: str, verbs: Verbs) -> typer.Typer:
    """A group of verbs.

    Args:
        summary: Its help; the first sentence stands in the list of verbs.
        verbs: (name, function, examples); the function's context is called ``ctx``.
    """
    group = typer.Typer(
        help=summary,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for name, verb, examples in verbs:
        lines = "\n".join(f"  {example}" for example in examples)
        command = group.command(name, cls=GroupedCommand, epilog=f"\b\nExamples:\n{lines}")
        command(guarded(verb))
    return group
