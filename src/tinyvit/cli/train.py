"""``tinyvit train``: a verb for each task; settings to the library's tasks and its one loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT, get_checkpoint, list_checkpoints
from tinyvit.cli import console
from tinyvit.cli.console import Console
from tinyvit.cli.option_rows import with_rows
from tinyvit.cli.task_options import CLASSIFY, DISTILL_FEATURES, DISTILL_LOGITS, SEGMENT
from tinyvit.cli.train_options import CONTROL, LOOP
from tinyvit.cli.training import TaskVerb, run_training

if TYPE_CHECKING:
    from tinyvit.modules import TinyViT
    from tinyvit.train import Task
    from tinyvit.train.classify import ClassifySettings

__all__ = ["classify", "distill_features", "distill_logits", "segment"]

EXAMPLES = {
    "classify": (
        "tinyvit train classify photos -o run --epochs 20 --batch-size 32",
        "tinyvit train classify 'shards/*.tar' -o run --config choices.toml --lr 5e-4",
        "tinyvit train classify -o run --resume",
        "torchrun --nproc-per-node 2 -m tinyvit train classify photos -o run",
    ),
    "distill-logits": (
        "tinyvit train write-logits photos --teacher teacher.safetensors -o answers",
        "tinyvit train distill-logits photos --logits answers -o run",
    ),
    "distill-features": (
        "tinyvit train store-features photos --teacher mobile_sam -o features",
        "tinyvit train distill-features photos --features features -o run",
    ),
    "segment": (
        "tinyvit train segment cells -o run --lr 5e-5 --epochs 30",
        "tinyvit train segment cells.json --images photos -o run --move decoder",
    ),
}


@with_rows((*LOOP[:1], *CONTROL, *CLASSIFY, *LOOP[1:]))
def classify(ctx: typer.Context, **values: object) -> None:
    """Train a classifier on pictures of named classes.

    The run's folder gets best.safetensors and last.safetensors, which 'tinyvit classify' loads,
    log.jsonl, curves.png, the choices, and the state from which a stopped run goes on. Ctrl-C ends
    the step, saves the state and says how to go on.
    """
    run_training(console.of(ctx), TaskVerb("classify", CLASSIFY, _make_classify), values)


@with_rows((*LOOP[:1], *CONTROL, *DISTILL_LOGITS, *LOOP[1:]))
def distill_logits(ctx: typer.Context, **values: object) -> None:
    """Train a classifier with a teacher's answers.

    The answers were written by 'tinyvit train write-logits', and belong to these pictures, this
    split and this chance: --val, --val-part, --split-seed, --augment and --flip must be the same.
    The run's folder is as with 'tinyvit train classify'.
    """
    run_training(console.of(ctx), TaskVerb("distill-logits", DISTILL_LOGITS, _make_logits), values)


@with_rows((*LOOP[:1], *CONTROL, *DISTILL_FEATURES, *LOOP[1:]))
def distill_features(ctx: typer.Context, **values: object) -> None:
    """Train an encoder to give a teacher's features.

    The features were written by 'tinyvit train store-features'. The student prepares pictures as
    the teacher does, perhaps at another size. The run's folder is as with 'tinyvit train classify';
    its weights are an encoder, or with --sam a whole SAM.
    """
    verb = TaskVerb("distill-features", DISTILL_FEATURES, _make_features)
    run_training(console.of(ctx), verb, values)


@with_rows((*LOOP[:1], *CONTROL, *SEGMENT, *LOOP[1:]))
def segment(ctx: typer.Context, **values: object) -> None:
    """Train a SAM to segment by clicks and boxes.

    A rate of 5e-4 suits a start from chance, a tenth of it trained weights. The run's folder is as
    with 'tinyvit train classify'; its weights are a whole SAM, which 'tinyvit segment' loads.
    """
    run_training(console.of(ctx), TaskVerb("segment", SEGMENT, _make_segment), values)


def _make_classify(own: Console, values: Mapping[str, object], seed: int) -> Task[Any]:
    from tinyvit.train.classify import make_task

    return make_task(_classifier(own, values, seed))


def _make_logits(own: Console, values: Mapping[str, object], seed: int) -> Task[Any]:
    from tinyvit.train.distill_logits import make_task

    rest = dict(values)
    store = rest.pop("logits", None)
    if store is None:
        raise ValueError("name the folder of the teacher's answers with --logits FOLDER")
    return make_task(_classifier(own, rest, seed), str(store))


def _classifier(own: Console, values: Mapping[str, object], seed: int) -> ClassifySettings:
    from tinyvit.train.classify import ClassifySettings

    _announce(own, values)
    rest: dict[str, Any] = dict(values)
    if "window_sizes" in rest:
        rest["window_sizes"] = tuple(rest["window_sizes"])
    return ClassifySettings(**rest, seed=seed)


def _make_segment(own: Console, values: Mapping[str, object], seed: int) -> Task[Any]:
    from tinyvit.train.segment import SegmentSettings, make_task

    _announce(own, values)
    rest: dict[str, Any] = dict(values)
    if "model" in rest:
        rest.setdefault("checkpoint", None)
    return make_task(SegmentSettings(**rest, seed=seed))


def _make_features(own: Console, values: Mapping[str, object], seed: int) -> Task[Any]:
    from tinyvit.sam import build_sam
    from tinyvit.train.distill_features import DistillFeaturesSettings, make_task

    rest: dict[str, Any] = dict(values)
    names = ("data", "features", "sam", "checkpoint", "model", "img_size")
    root, store, sam, checkpoint, model, size = (rest.pop(name, None) for name in names)
    if store is None:
        raise ValueError("name the folder of the teacher's features with --features FOLDER")
    _announce(own, values)
    student = _student(checkpoint, model, size, seed)
    heads = None if sam is None else build_sam(sam)
    return make_task(student, store, root, DistillFeaturesSettings(**rest), heads)


def _student(checkpoint: str | None, model: str | None, size: int | None, seed: int) -> TinyViT:
    import torch

    from tinyvit.factory import create_model

    if checkpoint is None and model is None:
        checkpoint = DEFAULT_CHECKPOINT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(model, checkpoint, img_size=size)


def _announce(own: Console, values: Mapping[str, object]) -> None:
    """Say what is about to be fetched."""
    from tinyvit.cli.loading import announce

    for name in ("checkpoint", "sam"):
        text = values.get(name)
        if isinstance(text, str) and text in list_checkpoints():
            announce(own, get_checkpoint(text))
