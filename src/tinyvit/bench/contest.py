"""Models, backends and precisions against each other, and against the machine's matrix products."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, cast

from tinyvit.errors import TinyViTError

from .machine import Spread
from .workers import Turn, Worker, take_turns

_KIND = ("precision", "device", "threads")
_WORKER = (sys.executable, "-m", "tinyvit.bench")

Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True)
class Contestant:
    """What is timed: a model on random images.

    Attributes:
        model: A variant, or None for the checkpoint's.
        checkpoint: Name or file of weights; None makes every tensor random.
        size: Side of the images in pixels, or None for the model's.
        batch: Images in a call.
        backend: As for ``Engine``.
        precision: As for ``Engine``.
        device: As for ``Engine``.
        threads: Threads to compute with, or None for the backend's choice.
    """

    model: str | None = None
    checkpoint: str | None = None
    size: int | None = None
    batch: int = 1
    backend: str = "auto"
    precision: str = "fp32"
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Result:
    """What a contestant did.

    Attributes:
        contestant: What was timed.
        chose: What the engine chose and why, in words.
        backend: What ran.
        precision: What it computed in.
        size: Height and width of the images.
        threads: torch's threads.
        gflop: Useful operations for one image, in 1e9.
        seconds: Of a call.
        rounds: Seconds of a call in each round.
        images_per_s: At the median.
        gflops: 1e9 operations a second at the median.
        matmul_gflops: The same of a large matrix product at this precision, in this run.
        share: Of that rate, taken round by round; the median.
        page_faults: For each call, the median of the rounds; None where nobody counts them.
        peak_memory: Largest resident size of the process, in bytes, or None.
        first_result_s: From the start of the process to the first result.
    """

    contestant: Contestant
    chose: str
    backend: str
    precision: str
    size: tuple[int, int]
    threads: int
    gflop: float
    seconds: Spread
    rounds: tuple[float, ...]
    images_per_s: float
    gflops: float
    matmul_gflops: float
    share: float
    page_faults: float | None
    peak_memory: int | None
    first_result_s: float

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
        machines: dict[tuple[object, ...], Worker] = {}
        for runner in runners:
            kind = _kind(runner)
            if kind not in machines:
                spec = {"matmul": matmul_side, **dict(zip(_KIND, kind, strict=True))}
                machines[kind] = stack.enter_context(Worker(_WORKER, spec))
        workers = [*runners, *machines.values()]
        turns = take_turns(workers, rounds, least_seconds=least_seconds, progress=progress)
        turns_of = {id(worker): own for worker, own in zip(workers, turns, strict=True)}
        results: list[Result | Exception] = []
        for contestant, entry in zip(contestants, started, strict=True):
            if isinstance(entry, Exception):
                results.append(entry)
                continue
            runner, first = entry
            machine = turns_of[id(machines[_kind(runner)])]
            rates = [2e-9 * matmul_side**3 / turn.seconds for turn in machine]
            results.append(_result(contestant, runner, turns_of[id(runner)], rates, first))
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
    worker: Worker,
    turns: Sequence[Turn],
    matmul_rates: Sequence[float],
    first_result_s: float,
) -> Result:
    facts = cast("dict[str, Any]", worker.facts)
    rounds = tuple(turn.seconds for turn in turns)
    seconds = Spread.of(rounds)
    work = facts["gflop"] * contestant.batch
    faults = [turn.page_faults for turn in turns if turn.page_faults is not None]
    return Result(
        contestant=contestant,
        chose=facts["chose"],
        backend=facts["backend"],
        precision=facts["precision"],
        size=(facts["size"][0], facts["size"][1]),
        threads=facts["threads"],
        gflop=facts["gflop"],
        seconds=seconds,
        rounds=rounds,
        images_per_s=contestant.batch / seconds.median,
        gflops=work / seconds.median,
        matmul_gflops=statistics.median(matmul_rates),
        share=statistics.median(
            work / s / rate for s, rate in zip(rounds, matmul_rates, strict=True)
        ),
        page_faults=statistics.median(faults) if faults else None,
        peak_memory=turns[-1].peak_memory,
        first_result_s=first_result_s,
    )
