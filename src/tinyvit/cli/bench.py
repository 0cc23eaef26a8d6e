"""``tinyvit bench``: how fast this machine encodes, with what a table of times needs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, get_args

from tinyvit.catalog import DEFAULT_CHECKPOINT, get_checkpoint, get_variant
from tinyvit.cli import console

from .arguments import Positive, file_of, is_exported
from .console import Console, counted

if TYPE_CHECKING:
    from tinyvit.bench import Result

_DEFAULT_MODELS = (get_checkpoint(DEFAULT_CHECKPOINT).variant, "tiny_vit_5m_sam")
_HEADS = ("", "ms", "spread", "pictures/s", "GFLOP/s", "share", "MB", "faults", "start")
_LEGEND = """
ms: a call, the median of the rounds; spread: between the quartiles, in % of it
share: of the rate of large matrix products, measured in the same rounds
MB: most memory of the process; faults: page faults for each call
start: seconds from the start of a process to its first result"""


def bench(
    own: Console,
    model: list[str] | None = None,
    checkpoint: str | None = None,
    size: list[Positive] | None = None,
    batch: list[Positive] | None = None,
    backend: str = "auto",
    precision: str = "fp32",
    device: str = "auto",
    repeats: Positive = 5,
    threads: Positive | None = None,
    as_json: bool = False,
) -> None:
    """Measure how fast this machine computes the features of images.

    Each backend and precision runs in a process of its own; they take turns, round by round, after
    one round that does not count, so that a machine that slows down slows all of them. Images are
    random and already prepared: reading and resizing them is not measured.

    Run it on a machine that has nothing else to do, and compare times of one run only.

    Options:
        model (VARIANT): May be given more than once; tiny_vit_2m_sam and tiny_vit_5m_sam by
            default.
        checkpoint (NAME_OR_PATH): Weights that are on this machine, or a folder of 'tinyvit
            export', whose encoder is run. By default every tensor is random.
        size (PIXELS): Side of the model's input; may be given more than once.
        batch (NUMBER): Images in a call, 1 by default; may be given more than once.
        backend: auto, torch, or another of the engine's, or all.
        precision: fp32, bf16, or another of the engine's, or all.
        repeats: Rounds that count.
        threads: By default as many as each library takes.

    Examples:
        tinyvit bench
        tinyvit bench --model tiny_vit_5m_224 --batch 1 --batch 32 --precision all
        tinyvit bench --backend all --json > times.json
    """
    from tinyvit.bench import Contestant, machine_facts, measure
    from tinyvit.inference.backend import FP16_REFUSED, BackendName, Precision

    names = _models(model, checkpoint, size)
    if precision == "fp16":
        raise ValueError(FP16_REFUSED)
    backends = _chosen("--backend", backend, get_args(BackendName))
    precisions = _chosen("--precision", precision, get_args(Precision))
    found: list[Result] = []
    left_out: list[dict[str, object]] = []
    for name, side, number in product(names, size or (None,), batch or (1,)):
        heat = [
            Contestant(name, checkpoint, side, number, kind, computed, device, threads)
            for kind, computed in product(backends, precisions)
        ]
        where = "" if side is None else f" at {side}"
        words = f"{name or checkpoint}{where}, batch {number}: {counted(len(heat), 'contestant')}"
        own.say(f"{words}, {counted(repeats, 'round')}")
        with own.progress("measuring", things="turns") as update:
            outcomes = measure(heat, repeats, progress=update)
        wrong = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if wrong and (len(wrong) == len(heat) or "all" not in (backend, precision)):
            raise wrong[0]
        for contestant, outcome in zip(heat, outcomes, strict=True):
            if isinstance(outcome, Exception):
                left_out.append({**asdict(contestant), "reason": str(outcome)})
                own.say(f"left out {contestant.backend} {contestant.precision}: {outcome}")
            else:
                found.append(outcome)
    facts = machine_facts("openvino", "onnxruntime")
    if as_json:
        rows = {"results": [result.to_dict() for result in found], "left_out": left_out}
        console.write_json({"machine": facts, "repeats": repeats, **rows})
        return
    console.write(console.fields(_machine(facts, found)))
    console.write("")
    console.write(console.table(_HEADS, _rows(found), right=range(1, len(_HEADS))))
    own.say(_LEGEND)


def _models(
    models: Sequence[str] | None, checkpoint: str | None, sizes: Sequence[int] | None = None
) -> list[str | None]:
    """The variants to measure; None for the one that the checkpoint says."""
    for name in models or ():
        get_variant(name)
    if checkpoint is None:
        return [*(models or _DEFAULT_MODELS)]
    if models is not None and len(models) > 1:
        raise ValueError(
            f"one checkpoint fits one model, got {len(models)}: {', '.join(models)}; leave --model "
            "out, or leave --checkpoint out to measure random weights"
        )
    if not is_exported(checkpoint, max(sizes or (0,)) or None, (models or (None,))[0]):
        file_of(checkpoint)
    return [models[0] if models else None]


def _chosen(option: str, word: str, known: tuple[str, ...]) -> list[str]:
    if word == "all":
        return [name for name in known if name != "auto"]
    if word not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)} or all, got {word!r}")
    return [word]


def _machine(
    facts: dict[str, str | int | None], results: Sequence[Result]
) -> list[tuple[str, str]]:
    threads = sorted({result.threads for result in results})
    memory = facts["memory"]
    names = ("tinyvit", "torch", "openvino", "onnxruntime", "python")
    pairs = [
        ("processor", facts["cpu"]),
        ("cores", f"{facts['cores']}; {' and '.join(counted(n, 'thread') for n in threads)}"),
        ("instructions", facts["instruction_sets"]),
        ("memory", f"{memory / 1e9:.0f} GB" if isinstance(memory, int) else ""),
        ("system", facts["os"]),
        ("versions", ", ".join(f"{name} {facts[name]}" for name in names if name in facts)),
        ("date", facts["date"]),
    ]
    return [(name, str(text)) for name, text in pairs if text]


def _rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table: for each heat a line of its own, its contestants, and the matrix products."""
    heats: dict[str, list[Result]] = {}
    for result in results:
        contestant, (height, width) = result.contestant, result.size
        names = " ".join(name for name in (contestant.model, contestant.checkpoint) if name)
        title = f"{names}, {height}x{width}, batch {contestant.batch}: "
        heats.setdefault(f"{title}{result.gflop:.1f} GFLOP an image", []).append(result)
    rows: list[tuple[str, ...]] = []
    for title, members in heats.items():
        rows += [(title,), *map(_row, members)]
        rates = {result.precision: result.matmul_gflops for result in members}
        for precision, rate in rates.items():
            if rate is None:
                continue
            rows.append((f" matmul {precision}", "", "", "", f"{rate:.0f}", "", "", "", ""))
    return rows


def _row(result: Result) -> tuple[str, ...]:
    return (
        f" {result.backend} {result.precision}",
        f"{1e3 * result.seconds.median:.1f}",
        f"{100 * result.seconds.relative:.0f}%",
        f"{result.images_per_s:.{1 if result.images_per_s < 1000 else 0}f}",
        f"{result.gflops:.0f}",
        "" if result.share is None else f"{100 * result.share:.0f}%",
        "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}",
        "" if result.page_faults is None else f"{result.page_faults:.0f}",
        f"{result.first_result_s:.1f}",
    )
