"""Models, backends and precisions against each other, and against the machine's matrix products."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

from tinyvit.errors import MissingExtraError, TinyViTError

from .workers import Progress, Spread, Turn, Worker, take_turns

_KIND = ("precision", "device", "threads")
_WORKER = (sys.executable, "-m", "tinyvit.bench")


@dataclass(frozen=True)
class Contestant:
    """What is timed: a model on random images."""

    model: str | None = None  # a variant, or None for the checkpoint's
    checkpoint: str | None = None  # name or file of weights; None makes every tensor random
    size: int | None = None  # side of the images in pixels, or None for the model's
    batch: int = 1  # images in a call
    backend: str = "auto"  # as for ``Engine``, and so the next two
    precision: str = "fp32"
    device: str = "auto"
    threads: int | None = None  # to compute with, or None for the backend's choice


@dataclass(frozen=True)
class Result:
    """What a contestant did."""

    contestant: Contestant  # what was timed
    chose: str  # what the engine chose and why, in words
    backend: str  # what ran
    precision: str  # what it computed in
    size: tuple[int, int]  # height and width of the images
    threads: int  # of torch
    gflop: float  # useful operations for one image, in 1e9
    seconds: Spread  # of a call
    rounds: tuple[float, ...]  # seconds of a call in each round
    images_per_s: float  # at the median
    gflops: float  # 1e9 operations a second at the median
    # the same of a large matrix product at this precision, in this run; None where none was had
    matmul_gflops: float | None
    share: float | None  # of that rate, taken round by round; the median
    page_faults: float | None  # for each call, the median; None where nobody counts them
    peak_memory: int | None  # largest resident size of the process in bytes, or None
    first_result_s: float  # from the start of the process to the first result

    def to_dict(self) -> dict[str, object]:
        """As plain data for JSON."""
        return asdict(self)


def measure(
    contestants: Sequence[Contestant],
    rounds: int = 5,
    *,
    starts: int = 2,
    matmul_side: int = 2048,
    least_seconds: float = 0.2,
    progress: Progress | None = None,
) -> list[Result | Exception]:
    """Time contestants against each other, and against the machine's own matrix products.

    Args:
        contestants: They run in this order in each round.
        rounds: Turns that count, for each.
        starts: Each is started so often, and the quickest start counts: at the first, the files
            may not be in memory yet.
        matmul_side: Side of the matrices whose product stands for the machine.
        least_seconds: Timed calls of a turn fill this time.
        progress: Called with (turns done, turns in all).

    Returns:
        For each contestant its result, or the error that kept it from starting.

    Raises:
        ValueError: Less than one round or start.
        ChildProcessError: A contestant broke after it had started.
    """
    if min(rounds, starts) < 1:
        raise ValueError(f"rounds and starts must be at least 1, got {rounds} and {starts}")
    with ExitStack() as stack:
        started = [_start(contestant, starts, stack) for contestant in contestants]
        runners = [entry[0] for entry in started if not isinstance(entry, Exception)]
        products: dict[tuple[object, ...], Worker] = {}
        for kind in dict.fromkeys(map(_kind, runners)):
            spec = {"matmul": matmul_side, **dict(zip(_KIND, kind, strict=True))}
            with suppress(MissingExtraError):  # bf16 without torch
                products[kind] = stack.enter_context(Worker(_WORKER, spec))
        workers = [*runners, *products.values()]
        turns = take_turns(workers, rounds, least_seconds=least_seconds, progress=progress)
        turns_of = dict(zip(workers, turns, strict=True))
        results: list[Result | Exception] = []
        for contestant, entry in zip(contestants, started, strict=True):
            if isinstance(entry, Exception):
                results.append(entry)
                continue
            runner, first = entry
            product = products.get(_kind(runner))
            seconds = [turn.seconds for turn in turns_of[product]] if product is not None else []
            rates = [2e-9 * matmul_side**3 / one for one in seconds]
            results.append(_result(contestant, runner.facts, turns_of[runner], rates, first))
        return results


def _start(
    contestant: Contestant, starts: int, stack: ExitStack
) -> tuple[Worker, float] | Exception:
    """The contestant's last start and its quickest time to a result, or why there is none."""
    spec = asdict(contestant)
    firsts = []
    try:
        for _ in range(starts - 1):
            with Worker(_WORKER, spec) as worker:
                firsts.append(worker.first_result_s)
        worker = stack.enter_context(Worker(_WORKER, spec))
    except (TinyViTError, ValueError, OSError) as err:
        return err
    return worker, min([*firsts, worker.first_result_s])


def _kind(worker: Worker) -> tuple[object, ...]:
    """What a matrix product must share with a contestant."""
    return tuple(worker.facts[name] for name in _KIND)


def _result(
    contestant: Contestant,
    facts: Mapping[str, Any],
    turns: Sequence[Turn],
    matmul_rates: Sequence[float],
    first_result_s: float,
) -> Result:
    rounds = tuple(turn.seconds for turn in turns)
    seconds, work = Spread.of(rounds), facts["gflop"] * contestant.batch
    shares = [work / s / rate for s, rate in zip(rounds, matmul_rates, strict=False)]
    faults = [turn.page_faults for turn in turns if turn.page_faults is not None]
    return Result(
        contestant=contestant,
        **{name: facts[name] for name in ("chose", "backend", "precision", "threads", "gflop")},
        size=tuple(facts["size"]),
        seconds=seconds,
        rounds=rounds,
        images_per_s=contestant.batch / seconds.median,
        gflops=work / seconds.median,
        matmul_gflops=statistics.median(matmul_rates) if matmul_rates else None,
        share=statistics.median(shares) if shares else None,
        page_faults=statistics.median(faults) if faults else None,
        peak_memory=turns[-1].peak_memory,
        first_result_s=first_result_s,
    )
