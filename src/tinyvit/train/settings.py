"""Everything that can be chosen about a training run, in one place; TOML in and out.

Checked when made, so that a wrong number is said before any work. No torch is loaded here, so a
command line can describe the settings cheaply. What is learnt is not known here: that is a task's.

A 0 turns a thing off; None means "choose for me", and stands only where it is the default, since
TOML has no word for it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeAlias, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


Moving: TypeAlias = Literal["full", "decoder", "neck", "head", "lora"]
BatchStats: TypeAlias = Literal["auto", "frozen", "own", "synchronised"]
Optimiser: TypeAlias = Literal["adamw", "muon"]
TrainPrecision: TypeAlias = Literal["fp32", "bf16"]

_FREE = {"is_free": True}  # may differ when a run goes on: the numbers do not depend on it

_CHOICES = {
    "moving": get_args(Moving),
    "batch_stats": get_args(BatchStats),
    "optimiser": get_args(Optimiser),
    "precision": get_args(TrainPrecision),
}
_POSITIVE = ("epochs", "batch_size", "accumulate", "lora_rank", "log_every")
_NOT_NEGATIVE = (
    "warmup_steps",
    "validate_every",
    "save_every",
    "workers",
    "seed",
    "weight_decay",
    "clip_norm",
)
_KINDS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


@dataclass(frozen=True)
class TrainSettings:
    """The choices of a training run.

    Attributes:
        folder: Where state, weights, log and curves are written; made if it is not there.
        epochs: Passes over the data.
        steps: Steps of the optimiser; overrides ``epochs``.
        batch_size: Samples of one step, over all processes and accumulated parts, so that a run
            is the same on one device and on eight.
        accumulate: Parts that a process computes one after the other for one step; more parts
            need less memory.
        drop_last: Leave out an epoch's last step where it would have fewer than ``batch_size``
            samples.
        learning_rate: The highest rate, of the last block, the heads and the neck.
        layer_decay: Factor on the rate from each block to the one before it; 1 for none.
        optimiser: "adamw"; or "muon" for the matrices of linear layers, with AdamW for the rest:
            a step takes longer, and fewer may do. One rate fits both.
        weight_decay: Decay of matrices and kernels; norms, biases, attention biases and
            embeddings have none.
        beta1: AdamW's memory of the gradient.
        beta2: AdamW's memory of its square.
        warmup_steps: Steps in which the rate rises in a straight line.
        final_rate: The rate of the last step, as a part of ``learning_rate``.
        clip_norm: Largest norm of the gradient; 0 leaves it as it is.
        ema_decay: Memory of the averaged weights, which are then validated and saved; 0 for none.
        moving: What may change: "full"; "decoder", "neck" or "head" alone; "lora" for low-rank
            additions to frozen weights.
        lora_rank: Rank of those additions.
        batch_stats: "frozen" keeps the batch norms on their running statistics, "own" moves those
            of each process, "synchronised" those of all processes together (on GPUs). "auto"
            freezes statistics that were learnt before and moves untouched ones.
        drop_path: Stochastic depth of the last block, rising from 0; None leaves the model's own.
        grad_checkpointing: Compute activations twice instead of keeping them.
        precision: "fp32", or "bf16" for autocast.
        channels_last: Keep kernels and maps in channels-last memory.
        seed: Source of all chance.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.
        workers: Processes that prepare samples; 0 prepares them in the main process.
        log_every: Steps between two lines of the log.
        validate_every: Steps between two validations; 0 validates at the end of each epoch.
        save_every: Steps between two saved states; 0 saves after each validation.
        validate_at_start: Validate before the first step as well.
        tensorboard: Write TensorBoard's files too, if it is installed.
    """

    folder: str = field(metadata=_FREE)
    epochs: int = 10
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = field(default=1, metadata=_FREE)
    drop_last: bool = False
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
    optimiser: Optimiser = "adamw"
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 0
    final_rate: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    moving: Moving = "full"
    lora_rank: int = 8
    batch_stats: BatchStats = "auto"
    drop_path: float | None = None
    grad_checkpointing: bool = field(default=False, metadata=_FREE)
    precision: TrainPrecision = "fp32"
    channels_last: bool = field(default=True, metadata=_FREE)
    seed: int = 0
    device: str = field(default="auto", metadata=_FREE)
    workers: int = field(default=0, metadata=_FREE)
    log_every: int = field(default=10, metadata=_FREE)
    validate_every: int = field(default=0, metadata=_FREE)
    save_every: int = field(default=0, metadata=_FREE)
    validate_at_start: bool = field(default=False, metadata=_FREE)
    tensorboard: bool = field(default=True, metadata=_FREE)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            TypeError: A value is of another type.
            ValueError: A value is out of its range, or two contradict each other.
        """
        for one in fields(self):
            self._check_kind(one.name, str(one.type))
        for name in _POSITIVE:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in _NOT_NEGATIVE:
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("beta1", "beta2", "ema_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        for name, choices in _CHOICES.items():
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._check("learning_rate", self.learning_rate > 0, "above 0")
        self._check("layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        self._check("final_rate", 0 <= self.final_rate <= 1, "from 0 to 1")
        self._check("drop_path", 0 <= (self.drop_path or 0) <= 1, "a probability from 0 to 1")
        self._check("steps", self.steps is None or self.steps >= 1, "at least 1")
        self._check("folder", bool(self.folder), "the name of a folder")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate={self.accumulate} parts cannot be made of batch_size="
                f"{self.batch_size} samples; batch_size counts all samples of a step"
            )

    def _check(self, name: str, is_good: bool, wanted: str) -> None:
        if not is_good:
            raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def _check_kind(self, name: str, annotation: str) -> None:
        """The value must be of the annotated kind; whole numbers do for fractions."""
        value = getattr(self, name)
        kind, _, rest = annotation.partition(" | ")
        kind = kind if kind in _KINDS else "str"
        if value is None and rest == "None":
            return
        if not isinstance(value, _KINDS[kind]) or (kind != "bool" and isinstance(value, bool)):
            raise TypeError(f"{name} must be {kind}, got {value!r} ({type(value).__name__})")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def from_mapping(cls, values: dict[str, object], source: str = "settings") -> TrainSettings:
        """Make settings from names and values.

        Args:
            values: What is not named keeps its default.
            source: Where they come from, for messages.

        Raises:
            ValueError: A name is unknown, ``folder`` is missing, or a value is wrong.
            TypeError: A value is of another type.
        """
        known = {one.name for one in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{source}: unknown settings {', '.join(unknown)}; known are "
                f"{', '.join(sorted(known))}"
            )
        if "folder" not in values:
            raise ValueError(f"{source}: folder is missing; name the folder to write the run in")
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks each

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **changes: object) -> TrainSettings:
        """Read settings from a TOML file of plain ``name = value`` lines.

        Args:
            path: The file.
            changes: Values that go before the file's, such as those of a command line.

        Raises:
            ValueError: The file is no TOML, or as ``from_mapping``.
            TypeError: A value is of another type.
            OSError: The file cannot be read.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise ValueError(f"{path} is no TOML file: {err}") from err
        return cls.from_mapping({**values, **changes}, str(path))

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """Names and values, fit for JSON."""
        return asdict(self)

    def to_toml(self) -> str:
        """The text of a TOML file that ``from_toml`` reads back; what is None is left out."""
        lines = []
        for name, value in self.to_dict().items():
            if value is not None:  # JSON's numbers, strings and booleans are TOML's
                lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}\n")
        return "".join(lines)

    def differences(self, other: TrainSettings) -> list[str]:
        """What stands against going on with a run of ``other``, in words; empty if nothing does."""
        return [
            f"{one.name} was {getattr(other, one.name)!r} and is {getattr(self, one.name)!r}"
            for one in fields(self)
            if not one.metadata.get("is_free")
            and getattr(self, one.name) != getattr(other, one.name)
        ]
