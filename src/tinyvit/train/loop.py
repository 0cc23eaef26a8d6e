"""``train``: one loop for every task, in one process or several, that can be stopped at any moment.

Every random number comes from the seed and from what is done with it (epoch and sample, or step and
part), so neither the number of worker processes nor a stop in between changes anything. Ctrl-C and
SIGTERM let the step end and the state be saved. A second one stops at once; then, as after a kill,
what was done since the last saved state is done again when the run is resumed.
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
from typing import Any, Generic, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from tinyvit.checkpoints.files import make_folder, write_text
from tinyvit.errors import CheckpointError

from . import optim, run_folder
from .optim import Processes, join_processes
from .run_folder import Facts, Progress, RunLog, RunState
from .settings import BatchStats, ChangedSettingsError, TrainSettings
from .task import Batch, Goal, Key, Order, Sample, Task, derived_seed, load_batches

Report: TypeAlias = Callable[[Progress], None]

SETTINGS, LAST, BEST = "settings.toml", "last.safetensors", "best.safetensors"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Result:
    """What a run reached.

    Attributes:
        folder: Where everything was written.
        steps: Steps done.
        metrics: Of the last validation, by name; ``figures`` is their former name.
        best: The best value of the task's goal; None where it was never validated.
        best_step: The step it was validated after.
        last_weights: Newest weights.
        best_weights: Best weights; None where there was no validation.
        seconds: Time of this call.
    """

    folder: Path
    steps: int
    metrics: dict[str, float]
    best: float | None
    best_step: int | None
    last_weights: Path
    best_weights: Path | None
    seconds: float

    @property
    def figures(self) -> dict[str, float]:
        """``metrics``."""
        return self.metrics


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
        task: Data, loss and validation.
        settings: The loop's settings.
        resume: Resume the run in ``settings.folder``; where there is none, begin it.
        report: Called in the first process after every step.

    Returns:
        What was reached; metrics are known in the first process only. The network holds the last
        weights (not averaged ones), in eval mode.

    Raises:
        ValueError: A setting does not fit the task, the network or the state.
        CheckpointError: The folder holds a run and ``resume`` is off; or state or weights cannot
            be read or written. The state before is whole then.
        NonFiniteLossError: Loss or gradient are no finite numbers any more.
        TinyViTError: The log cannot be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state was saved.
    """
    with join_processes(settings.device) as processes, stop_on_signal() as stop:
        devices = [processes.device] if processes.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the caller's random generators stay as they are
            run = Run(task, settings, processes, report)
            run.start(resume)
            try:
                run.go(stop)
            finally:
                task.model.eval()
                if run.log is not None:
                    run.log.close()
            counters = run.counters
            return Result(
                folder=run.folder,
                steps=counters.step,
                metrics=dict(counters.figures),
                best=counters.best,
                best_step=counters.best_step,
                last_weights=run.folder / LAST,
                best_weights=run.folder / BEST if counters.best is not None else None,
                seconds=time.perf_counter() - run.began,
            )


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Catch the first Ctrl-C or SIGTERM in the main thread; earlier handlers come back after it."""
    request = threading.Event()
    numbers = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        request.set()
        restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield request
    finally:
        restore()


@dataclass
class Counters:
    """The counters of a run, as a state holds them."""

    step: int = 0  # steps done
    best: float | None = None  # value of the task's goal
    best_step: int | None = None  # the step it was validated after
    # of the steps' metrics since the last line of the log, and how many steps are in each
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)  # metrics of the last validation

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take a step's metrics into the next means; not every step must have the same ones."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def validated(self, metrics: Mapping[str, float], goal: Goal) -> bool:
        """Take the metrics of a validation, if any; gives whether the goal is better than ever."""
        self.figures = dict(metrics)
        name, way = goal
        if not metrics:
            return False
        if name not in metrics:
            raise ValueError(
                f"the goal of this task is {name!r}, but its validation gives {', '.join(metrics)}"
            )
        value, sign = metrics[name], 1 if way == "max" else -1
        is_better = not math.isnan(value)
        if self.best is not None:  # NaN never is
            is_better = sign * value > sign * self.best
        if is_better:
            self.best, self.best_step = value, self.step
        return is_better


class TaskLoss(nn.Module):
    """A task's loss as a ``forward``, which ``DistributedDataParallel`` needs to see."""

    def __init__(self, task: Task[Sample], precision: str, device: torch.device) -> None:
        super().__init__()
        self.model, self.loss_of = task.model, task.loss
        self.is_bf16, self.device = precision == "bf16", device

    def forward(self, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch on the device; all random numbers come from ``seed``."""
        torch.manual_seed(seed)  # dropout and stochastic depth know no other generator
        generator = torch.Generator().manual_seed(derived_seed(seed))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            loss, metrics = self.loss_of(self.model, batch, generator)
        if loss.ndim:
            raise ValueError(f"a task's loss must be a scalar, got one of shape {list(loss.shape)}")
        return loss, metrics


def _on(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    """A batch on the device, its images in channels-last memory."""
    moved: dict[str, Any] = dict(batch)  # what the task alone reads is no tensor
    for name, value in batch.items():
        if isinstance(value, Tensor):
            there = value.to(device, non_blocking=True)
            is_map = channels_last and there.ndim == 4 and there.is_floating_point()
            moved[name] = there.to(memory_format=torch.channels_last) if is_map else there
    return moved


class Run(Generic[Sample]):
    """A run of ``train``."""

    def __init__(
        self, task: Task[Sample], one: TrainSettings, processes: Processes, report: Report | None
    ) -> None:
        self.task, self.settings, self.processes = task, one, processes
        self.report = report if processes.is_first else None
        self.folder = Path(one.folder)
        self.order = Order(
            len(task), one.batch_size, one.accumulate, processes.count, one.seed, one.drop_last
        )
        self.steps = one.steps or one.epochs * self.order.steps_per_epoch
        self.schedule = optim.schedule(one, self.steps)
        self.facts_of_task: Facts = {
            "task": task.name,
            "number of samples": len(task),
            "number of steps in an epoch": self.order.steps_per_epoch,  # of processes, too
        }
        self.counters = Counters()
        self.loss: float | None = None
        self.first = self.samples_done = 0  # the step this call began with; samples since then
        self.began = time.perf_counter()
        self.log: RunLog | None = None  # in the first process

    def start(self, resume: bool) -> None:
        """Make everything ready, and take up a state where there is one."""
        settings, processes = self.settings, self.processes
        state = self._find_state(resume)
        processes.wait()  # nobody writes before all have read
        model = self.task.model
        if state is None:
            self.batch_stats = optim.choose_batch_stats(model, settings.batch_stats, processes)
        else:
            self.batch_stats = cast(BatchStats, state.facts["batch_stats"])
        torch.manual_seed(settings.seed)  # for what is added to the network
        optim.prepare(model, settings, processes, self.batch_stats)
        self.optimiser = optim.make_optimiser(model, settings)
        self.ema = optim.Ema(model, settings.ema_decay) if settings.ema_decay else None
        self.average = None if self.ema is None else self.ema.model
        if state is not None:
            run_folder.unpack(state.tensors, model, self.average, self.optimiser)
            self.counters = Counters(**cast("dict[str, Any]", state.facts["tally"]))
            self.first = self.counters.step
        self.task_loss = processes.share(TaskLoss(self.task, settings.precision, processes.device))
        if processes.is_first:
            run_folder.remove_temporary_files(self.folder)
            self.log = RunLog(self.folder, self.counters.step, settings.tensorboard)
            write_text(self.folder / SETTINGS, settings.to_toml())
        self._tell("train", "; ".join(state.unreadable) if state is not None else "")

    def _find_state(self, resume: bool) -> RunState | None:
        """The state to resume; refuses to mix two runs."""
        make_folder(self.folder)
        state = run_folder.read_state(self.folder)
        if state is None:
            return None
        if not resume:
            raise CheckpointError(
                f"{self.folder} already holds a run; resume it (--resume), or choose another folder"
            )
        saved = cast("dict[str, object]", state.facts["settings"])
        changes = self.settings.changes(TrainSettings.from_mapping(saved, str(state.path)))
        facts = [(k, state.facts[k], now) for k, now in self.facts_of_task.items()]
        changes += [(f"the {name}", was, now) for name, was, now in facts if was != now]
        if changes:
            raise ChangedSettingsError(str(state.path), changes)
        return state

    def go(self, stop: threading.Event) -> None:
        """All steps that are left; raises KeyboardInterrupt where a signal asked to stop."""
        processes, steps = self.processes, range(self.counters.step, self.steps)
        is_pinned = processes.device.type == "cuda"
        batches = load_batches(
            self.task, self.order, processes.rank, steps, self.settings.workers, is_pinned
        )
        if self.settings.validate_at_start and not self.counters.step:
            self._validate()
        optim.train_mode(self.task.model, self.batch_stats == "frozen")
        self.began = time.perf_counter()
        while self.counters.step < self.steps:
            should_stop = self._step(batches, stop)
            self._after_step(should_stop)
            if should_stop:
                raise KeyboardInterrupt(
                    f"stopped after step {self.counters.step} of {self.steps}, with its state in "
                    f"{self.folder}; resume it with resume=True"
                )

    def _step(self, batches: Iterator[Batch], stop: threading.Event) -> bool:
        """One step of the optimiser; gives whether some process was asked to stop."""
        step = self.counters.step
        learning_rate = self.schedule(step)
        optim.set_learning_rates(self.optimiser, learning_rate)
        self.optimiser.zero_grad(set_to_none=True)
        loss, metrics, parts = self.accumulate_gradient(batches, step)
        norm = float(optim.clip_gradients(self.optimiser, self.settings.clip_norm))
        place = self.processes.device if self.processes.device.type != "mps" else "cpu"
        told = [loss, norm / self.processes.count, stop.is_set()]
        shared = torch.tensor(told, dtype=torch.float64, device=place)
        self.loss, norm, asked = self.processes.sum(shared).tolist()
        if not torch.isfinite(shared).all():  # before the optimiser spoils the weights
            kept = run_folder.keep_batch(self.folder, step + 1, self.processes.rank, parts)
            self.processes.wait()  # every process has kept its part before one ends all
            raise run_folder.NonFiniteLossError(
                f"step {step + 1} gave a loss of {self.loss} and a gradient of norm {norm}; {kept}."
                " The optimiser did not use it, and the last saved state is from before; look at "
                "the batch, or train with a lower learning rate, a longer warm-up or more clipping"
            )
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update(self.task.model, step)
        self.counters.step = step + 1
        self.samples_done += len(self.order.group(step))
        own = {"rate": learning_rate, "gradient_norm": norm}
        self.counters.add({"loss": self.loss, **metrics, **own})
        return bool(asked)

    def accumulate_gradient(
        self, batches: Iterator[Batch], step: int
    ) -> tuple[float, dict[str, float], list[tuple[list[Key], Batch]]]:
        """Compute the gradient of the mean loss over a step's samples, of all processes together.

        Each part counts by its number of samples, so parts of different sizes give the same mean
        as one large batch. Gives the loss, a mean over this process's samples times its part of the
        step's; the metrics, means over its samples; and the parts: keys, and batch on the CPU.
        """
        processes, settings = self.processes, self.settings
        keys = self.order.parts(step, processes.rank)
        total, own = len(self.order.group(step)), sum(len(part) for part in keys)
        parts: list[tuple[list[Key], Batch]] = []
        sums: dict[str, float] = {}
        for number, part in enumerate(keys):
            batch = next(batches)
            parts.append((part, batch))
            # the same in all processes, so that stochastic depth gives each as much to do
            seed = derived_seed(settings.seed, step, number, 0)
            with processes.gradient_sync(self.task_loss, is_last=number == len(keys) - 1):
                there = _on(batch, processes.device, settings.channels_last)
                loss, metrics = self.task_loss({**there, "progress": step / self.steps}, seed)
                # the processes' gradients are averaged, hence their number
                (loss * (len(part) * processes.count / total)).backward()
            metrics = {**metrics, "loss": loss}
            values = [value.detach().float().reshape(()) for value in metrics.values()]
            for name, value in zip(metrics, torch.stack(values).tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value * len(part)
        loss_sum = sums.pop("loss")
        return loss_sum / total, {name: value / own for name, value in sums.items()}, parts

    def _after_step(self, should_stop: bool) -> None:
        """Log, validate and save where it is time to."""
        settings, step = self.settings, self.counters.step
        is_end = step == self.steps
        if self.log is not None and (is_end or step % settings.log_every == 0):
            speed = {"epoch": self._epoch(), "images_per_second": self._images_per_second()}
            self.log.write("train", step, {**self.counters.means(), **speed})
        interval = settings.validate_every or self.order.steps_per_epoch
        is_validated = is_end or step % interval == 0
        if is_validated:
            self._validate()
            optim.train_mode(self.task.model, self.batch_stats == "frozen")
        is_due = step % settings.save_every == 0 if settings.save_every else is_validated
        if is_due or is_end or should_stop:
            self._save()
        self._tell("done" if is_end else "train")

    def _validate(self) -> None:
        """Validate in the first process, and keep the weights if they are the best so far."""
        self._tell("validate")
        if self.log is not None:
            model = (self.average or self.task.model).eval()
            with torch.no_grad():
                metrics = {name: float(x) for name, x in self.task.validate(model).items()}
            if metrics:
                self.log.write("validate", self.counters.step, metrics)
            if self.counters.validated(metrics, self.task.goal):
                self.task.save(optim.merged(model, self.settings.trainable), self.folder / BEST)
            self.log.draw()
        self.processes.wait()

    def _save(self) -> None:
        """Write the state and the newest weights, in the first process."""
        if self.log is not None:
            model = self.task.model
            facts: Facts = {
                "tally": asdict(self.counters),
                "settings": {k: v for k, v in self.settings.to_dict().items() if v is not None},
                "batch_stats": self.batch_stats,
                **self.facts_of_task,
            }
            self.log.sync()
            tensors = run_folder.pack(model, self.average, self.optimiser)
            run_folder.write_state(self.folder, tensors, facts)
            weights = optim.merged(self.average or model, self.settings.trainable)
            self.task.save(weights, self.folder / LAST)
        self.processes.wait()

    def _images_per_second(self) -> float:
        return self.samples_done / max(time.perf_counter() - self.began, 1e-9)

    def _epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return self.order.epoch_of(max(0, self.counters.step - 1)) + 1

    def _tell(self, phase: Literal["train", "validate", "done"], words: str = "") -> None:
        if self.report is None:
            return
        step = self.counters.step
        here = step - self.first
        seconds = time.perf_counter() - self.began
        self.report(
            Progress(
                phase=phase,
                step=step,
                steps=self.steps,
                epoch=self._epoch(),
                epochs=-(-self.steps // self.order.steps_per_epoch),
                loss=self.loss,
                learning_rate=self.schedule(max(0, step - 1)),
                images_per_second=self._images_per_second(),
                seconds_left=seconds / here * (self.steps - step) if here else None,
                metrics=dict(self.counters.figures),
                words=words,
            )
        )
