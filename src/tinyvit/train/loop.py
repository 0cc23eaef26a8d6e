"""Ctrl-C and SIGTERM as a wish: the step is finished and the state saved before the run stops.

A second one stops at once; then, as after a kill, what was done since the last saved state is done
again when the run goes on. Only the main thread hears signals; elsewhere nothing is changed.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from tinyvit.checkpoints.files import write_text
from tinyvit.errors import CheckpointError

from .data.sampling import Key, Order, derived_seed, load_batches
from .distributed import Processes, join_processes
from .optim import (
    Ema,
    Schedule,
    choose_batch_stats,
    clip_gradients,
    learning_mode,
    make_optimiser,
    merged,
    prepare,
    set_rates,
)
from .run_folder import (
    DivergedError,
    Facts,
    Journal,
    Progress,
    RunState,
    keep_batch,
    pack,
    read_state,
    sweep,
    unpack,
    write_state,
)
from .settings import BatchStats, ChangedSettingsError, TrainSettings
from .task import Batch, Goal, Task

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWish:
    """Whether somebody asked the run to stop.

    Attributes:
        is_there: True once asked.
    """

    def __init__(self) -> None:
        self.is_there = False


@contextmanager
def hear_signals() -> Iterator[StopWish]:
    """Hear Ctrl-C and SIGTERM; what was set for them before is set again at the end."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}

    def hear(number: int, frame: FrameType | None) -> None:
        wish.is_there = True
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in _SIGNALS:
        signal.signal(number, hear)
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Tally:
    """The counts of a run.

    Attributes:
        step: Steps done.
        best: The best value of the task's figure.
        best_step: The step it was measured after.
        figures: Of the last validation.
        sums: Sums of the steps' figures since the last line of the log.
        counts: Steps in each of these sums.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, figures: Mapping[str, float]) -> None:
        """Take a step's figures into the next means; not every step must have the same ones."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def take(self, figures: Mapping[str, float], goal: Goal) -> bool:
        """Take the figures of a validation.

        Args:
            figures: By name; none at all where nothing was held out.
            goal: The figure that decides, and which way it is better.

        Returns:
            Whether it is better than ever; what is no number never is.

        Raises:
            ValueError: There are figures, and the deciding one is not among them.
        """
        self.figures = dict(figures)
        name, way = goal
        if not figures:
            return False
        if name not in figures:
            raise ValueError(
                f"the goal of this task is {name!r}, but its validation gives {', '.join(figures)}"
            )
        value = figures[name]
        if self.best is not None:
            is_better = value > self.best if way == "max" else value < self.best
        else:
            is_better = not math.isnan(value)
        if is_better:
            self.best, self.best_step = value, self.step
        return is_better


Sample = TypeVar("Sample")


class Learner(nn.Module):
    """A task's loss as a ``forward``, which ``DistributedDataParallel`` needs to see.

    Args:
        task: Gives the loss.
        precision: "bf16" computes in autocast.
        device: Of the network and the batches.
    """

    def __init__(self, task: Task[Sample], precision: str, device: torch.device) -> None:
        super().__init__()
        self.model = task.model
        self.loss_of = task.loss
        self.is_bf16 = precision == "bf16"
        self.device = device

    def forward(self, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the figures of a batch; all chance comes from ``seed``.

        Raises:
            ValueError: The task's loss is no scalar.
        """
        torch.manual_seed(seed)  # of dropout and stochastic depth, which know no other source
        generator = torch.Generator().manual_seed(derived_seed(seed))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            loss, figures = self.loss_of(self.model, batch, generator)
        if loss.ndim:
            raise ValueError(f"a task's loss must be a scalar, got one of shape {list(loss.shape)}")
        return loss, figures


@dataclass(frozen=True)
class Gradient:
    """What came with a step's gradient.

    Attributes:
        loss: Mean over this process's samples, times its part of all samples of the step; the sum
            over the processes is the step's loss.
        figures: Means over this process's samples.
        parts: (keys, batch on the CPU) of each part.
    """

    loss: float
    figures: dict[str, float]
    parts: list[tuple[list[Key], Batch]]


def accumulate_gradient(
    learner: nn.Module,
    batches: Iterator[Batch],
    order: Order,
    step: int,
    settings: TrainSettings,
    processes: Processes,
) -> Gradient:
    """Compute the gradient of the mean loss over a step's samples, in this and the other processes.

    Each part counts by its number of samples, so parts of different sizes give the same mean as
    one large batch.

    Args:
        learner: A ``Learner``, shared with the other processes; its gradients are empty.
        batches: The batches of this process, in order.
        order: Which samples they are.
        step: The step, from 0.
        settings: Seed and memory layout.
        processes: The processes.
    """
    keys = order.parts(step, processes.rank)
    total, own = len(order.group(step)), sum(len(part) for part in keys)
    parts: list[tuple[list[Key], Batch]] = []
    sums: dict[str, float] = {}
    for number, part in enumerate(keys):
        batch = next(batches)
        parts.append((part, batch))
        # the same in all processes, so that chance gives each as much to do: they wait for the last
        seed = derived_seed(settings.seed, step, number, 0)
        with processes.adding_up(learner, is_last=number == len(keys) - 1):
            loss, figures = learner(_moved(batch, processes.device, settings.channels_last), seed)
            # the processes' gradients are averaged, hence their number
            (loss * (len(part) * processes.count / total)).backward()
        names = ["loss", *figures]
        values = [loss.detach(), *(figure.detach() for figure in figures.values())]
        shown = torch.stack([value.float().reshape(()) for value in values]).tolist()
        for name, value in zip(names, shown, strict=True):
            sums[name] = sums.get(name, 0.0) + value * len(part)
    loss_sum = sums.pop("loss")
    return Gradient(loss_sum / total, {name: s / own for name, s in sums.items()}, parts)


def _moved(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    """A batch on the device, its images in channels-last memory."""
    moved = dict(batch)
    values: Mapping[str, object] = batch  # what a task alone reads is no tensor
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        there = value.to(device, non_blocking=True)
        if channels_last and there.ndim == 4 and there.is_floating_point():
            there = there.contiguous(memory_format=torch.channels_last)
        moved[name] = there
    return moved


pass
pass
pass


Report: TypeAlias = Callable[[Progress], None]

SETTINGS, LAST, BEST = "settings.toml", "last.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Result:
    """What a run reached.

    Attributes:
        folder: Where everything was written.
        steps: Steps done.
        figures: Of the last validation.
        best: The best value of the task's figure; None where it was never measured.
        best_step: The step it was measured after.
        last_weights: Newest weights.
        best_weights: Best weights; None where no figure was measured.
        seconds: Time of this call.
    """

    folder: Path
    steps: int
    figures: dict[str, float]
    best: float | None
    best_step: int | None
    last_weights: Path
    best_weights: Path | None
    seconds: float


def train(
    task: Task[Sample],
    settings: TrainSettings,
    *,
    resume: bool = False,
    report: Report | None = None,
) -> Result:
    """Train a task's network, in place.

    Started by ``torchrun``, every process calls this with the same arguments.

    Args:
        task: Data, loss and measure.
        settings: The choices.
        resume: Go on with the run in ``settings.folder``; where there is none, begin it.
        report: Called in the first process after every step.

    Returns:
        What was reached; figures are known in the first process only. The network holds the last
        weights (not averaged ones), in eval mode.

    Raises:
        ValueError: A setting does not fit the task, the network or the state.
        CheckpointError: The folder holds a run and ``resume`` is off; or state or weights cannot
            be read or written. The state before is whole then.
        DivergedError: Loss or gradient are no numbers any more.
        TinyViTError: The log cannot be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state was saved.
    """
    with join_processes(settings.device) as processes, hear_signals() as wish:
        devices = [processes.device] if processes.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the caller's chance is not ours to spend
            run = _Run(task, settings, processes, report)
            run.start(resume)
            try:
                run.go(wish)
            finally:
                run.end()
            return run.result()


class _Run(Generic[Sample]):
    """A run of ``train``."""

    def __init__(
        self,
        task: Task[Sample],
        settings: TrainSettings,
        processes: Processes,
        report: Report | None,
    ) -> None:
        self.task, self.settings, self.processes = task, settings, processes
        self.report = report if processes.is_first else None
        self.folder = Path(settings.folder)
        self.order = Order(
            len(task),
            settings.batch_size,
            settings.accumulate,
            processes.count,
            settings.seed,
            settings.drop_last,
        )
        per_epoch = self.order.steps_per_epoch
        self.steps = settings.epochs * per_epoch if settings.steps is None else settings.steps
        self.schedule = Schedule(
            settings.learning_rate, self.steps, settings.warmup_steps, settings.final_rate
        )
        self.tally = Tally()
        self.loss: float | None = None
        self.first = self.samples_done = 0  # the step this call began with; samples since then
        self.began = time.perf_counter()
        self.journal: Journal | None = None

    # -- before the first step ------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        """Make everything ready, and take up a state where there is one."""
        settings, processes = self.settings, self.processes
        state = self._find_state(resume)
        processes.wait()  # nobody writes before all have read
        model = self.task.model
        self.batch_stats: BatchStats = (
            choose_batch_stats(model, settings.batch_stats, processes)
            if state is None
            else cast(BatchStats, state.facts["batch_stats"])
        )
        torch.manual_seed(settings.seed)  # what is added to the network starts from chance
        prepare(model, settings, processes, self.batch_stats)
        self.optimiser = make_optimiser(model, settings)
        self.ema = Ema(model, settings.ema_decay) if settings.ema_decay else None
        if state is not None:
            average = None if self.ema is None else self.ema.model
            unpack(state.tensors, model, average, self.optimiser)
            self.tally = Tally(**cast("dict[str, Any]", state.facts["tally"]))
            self.first = self.tally.step
        learner = Learner(self.task, settings.precision, processes.device)
        self.learner = processes.share(learner)
        if processes.is_first:
            sweep(self.folder)
            self.journal = Journal(self.folder, self.tally.step, settings.tensorboard)
            text = settings.to_toml()
            write_text(self.folder / SETTINGS, text)
        self._tell("train", "; ".join(state.trouble) if state is not None else "")

    def _find_state(self, resume: bool) -> RunState | None:
        """The state to go on from; refuses to mix two runs."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise CheckpointError(
                f"{self.folder} cannot be made a folder for the run: {err}; choose another"
            ) from err
        state = read_state(self.folder)
        if state is None:
            return None
        if not resume:
            raise CheckpointError(
                f"{self.folder} already holds a run; resume it (--resume), or choose another folder"
            )
        saved = cast("dict[str, object]", state.facts["settings"])
        before = TrainSettings.from_mapping(saved, str(state.path))
        changes = self.settings.changes(before)
        for name, now in self._facts_of_task().items():
            if state.facts[name] != now:
                changes.append((f"the {name}", state.facts[name], now))
        if changes:
            raise ChangedSettingsError(str(state.path), changes)
        return state

    def _facts_of_task(self) -> Facts:
        return {
            "task": self.task.name,
            "number of samples": len(self.task),
            "number of steps in an epoch": self.order.steps_per_epoch,  # of processes, too
        }

    # -- steps ------------------------------------------------------------------------------------

    def go(self, wish: StopWish) -> None:
        """All steps that are left.

        Raises:
            KeyboardInterrupt: Somebody asked to stop; the state was saved.
        """
        batches = load_batches(
            self.task,
            self.order,
            self.processes.rank,
            range(self.tally.step, self.steps),
            self.settings.workers,
            is_pinned=self.processes.device.type == "cuda",
        )
        if self.settings.validate_at_start and not self.tally.step:
            self._validate()
        self._learn()
        self.began = time.perf_counter()
        while self.tally.step < self.steps:
            should_stop = self._step(batches, wish)
            self._after_step(should_stop)
            if should_stop:
                raise KeyboardInterrupt(
                    f"stopped after step {self.tally.step} of {self.steps}, with its state in "
                    f"{self.folder}; resume it with resume=True"
                )

    def _step(self, batches: Iterator[Batch], wish: StopWish) -> bool:
        """One step of the optimiser; gives whether some process was asked to stop."""
        step, rate = self.tally.step, self.schedule(self.tally.step)
        set_rates(self.optimiser, rate)
        self.optimiser.zero_grad(set_to_none=True)
        gradient = accumulate_gradient(
            self.learner, batches, self.order, step, self.settings, self.processes
        )
        norm = float(clip_gradients(self.optimiser, self.settings.clip_norm))
        shared = torch.tensor(
            [gradient.loss, norm / self.processes.count, wish.is_there],
            dtype=torch.float64,
            device=self.processes.device if self.processes.device.type != "mps" else "cpu",
        )
        self.loss, norm, asked = self.processes.sum(shared).tolist()
        if not torch.isfinite(shared).all():
            self._refuse(gradient, step + 1, norm)
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update(self.task.model, step)
        self.tally.step = step + 1
        self.samples_done += len(self.order.group(step))
        self.tally.count(
            {"loss": self.loss, **gradient.figures, "rate": rate, "gradient_norm": norm}
        )
        return bool(asked)

    def _refuse(self, gradient: Gradient, step: int, norm: float) -> None:
        """Keep the batch and stop, before the optimiser spoils the weights."""
        kept = keep_batch(self.folder, step, self.processes.rank, gradient.parts)
        self.processes.wait()  # so that every process has kept its part before one ends all
        raise DivergedError(
            f"step {step} gave a loss of {self.loss} and a gradient of norm {norm}; {kept}. The "
            f"optimiser did not use it, and the last saved state is from before; look at the "
            "batch, or start anew with a lower learning_rate, a longer warmup or a clip_norm"
        )

    def _after_step(self, should_stop: bool) -> None:
        """Log, validate and save where it is time to."""
        settings, step = self.settings, self.tally.step
        is_end = step == self.steps
        if is_end or step % settings.log_every == 0:
            self._log()
        interval = settings.validate_every or self.order.steps_per_epoch
        is_measured = is_end or step % interval == 0
        if is_measured:
            self._validate()
            self._learn()
        is_due = step % settings.save_every == 0 if settings.save_every else is_measured
        if is_due or is_end or should_stop:
            self._save()
        self._tell("done" if is_end else "train")

    def _log(self) -> None:
        means = self.tally.means()
        if self.journal is not None:
            epoch = self.order.epoch_of(self.tally.step - 1) + 1
            speed = {"epoch": epoch, "images_per_second": self._speed()}
            self.journal.write("train", self.tally.step, {**means, **speed})

    def _learn(self) -> None:
        learning_mode(self.task.model, freeze_batch_stats=self.batch_stats == "frozen")

    # -- measure and keep -------------------------------------------------------------------------

    def _validate(self) -> None:
        """Measure in the first process, and keep the weights if they are the best so far."""
        self._tell("validate")
        if self.journal is not None:
            model = self.task.model if self.ema is None else self.ema.model
            model.eval()
            with torch.no_grad():
                figures = {name: float(x) for name, x in self.task.validate(model).items()}
            if figures:
                self.journal.write("validate", self.tally.step, figures)
            if self.tally.take(figures, self.task.goal):
                self.task.save(merged(model, self.settings.trainable), self.folder / BEST)
            self.journal.draw()
        self.processes.wait()

    def _save(self) -> None:
        """Write the state and the newest weights, in the first process."""
        if self.journal is not None:
            model = self.task.model
            average = None if self.ema is None else self.ema.model
            facts: Facts = {
                "tally": asdict(self.tally),
                "settings": {k: v for k, v in self.settings.to_dict().items() if v is not None},
                "batch_stats": self.batch_stats,
                **self._facts_of_task(),
            }
            self.journal.settle()
            write_state(self.folder, pack(model, average, self.optimiser), facts)
            weights = model if average is None else average
            self.task.save(merged(weights, self.settings.trainable), self.folder / LAST)
        self.processes.wait()

    # -- tell and end -----------------------------------------------------------------------------

    def _speed(self) -> float:
        return self.samples_done / max(time.perf_counter() - self.began, 1e-9)

    def _tell(self, phase: Literal["train", "validate", "done"], words: str = "") -> None:
        """Report how far the run is."""
        if self.report is None:
            return
        step, per_epoch = self.tally.step, self.order.steps_per_epoch
        here = step - self.first
        seconds = time.perf_counter() - self.began
        progress = Progress(
            phase=phase,
            step=step,
            steps=self.steps,
            epoch=self.order.epoch_of(max(0, step - 1)) + 1,
            epochs=-(-self.steps // per_epoch),
            loss=self.loss,
            rate=self.schedule(max(0, step - 1)),
            images_per_second=self._speed(),
            seconds_left=seconds / here * (self.steps - step) if here else None,
            figures=dict(self.tally.figures),
            words=words,
        )
        self.report(progress)

    def end(self) -> None:
        """Close the log and leave the network in eval mode."""
        self.task.model.eval()
        if self.journal is not None:
            self.journal.close()

    def result(self) -> Result:
        """What was reached."""
        best = self.folder / BEST if self.tally.best is not None else None
        return Result(
            folder=self.folder,
            steps=self.tally.step,
            figures=dict(self.tally.figures),
            best=self.tally.best,
            best_step=self.tally.best_step,
            last_weights=self.folder / LAST,
            best_weights=best,
            seconds=time.perf_counter() - self.began,
        )
