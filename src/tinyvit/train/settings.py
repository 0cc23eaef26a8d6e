"""What can be chosen about a training run: the class all settings share, and the loop's settings.

A setting is a field of a dataclass: type and choices stand in the annotation, bounds and flags in
``Annotated``, the explanation under ``Attributes:``. Checks, TOML, the comparison with a run that
is resumed and the options of the command line (``cli/settings_options.py``) are derived from that.
No torch is loaded here. A 0 turns a thing off. None means "choose for me" and is always the
default, since TOML has no word for it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

if TYPE_CHECKING:
    from typing_extensions import Self

Value: TypeAlias = str | int | float | bool | tuple[int, ...] | None

Trainable: TypeAlias = Literal["full", "decoder", "neck", "head", "lora"]
BatchStats: TypeAlias = Literal["auto", "frozen", "own", "synchronised"]
Optimiser: TypeAlias = Literal["adamw", "muon"]
TrainPrecision: TypeAlias = Literal["fp32", "bf16"]
Strength: TypeAlias = Literal["none", "light", "full"]
OnBroken: TypeAlias = Literal["skip", "error"]

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "whole numbers, such as [7, 7, 14, 7]",
}


class SettingsError(ValueError, TypeError):
    """Settings are wrong: ``before``, then (name, words) of each setting, then ``after``."""

    def __init__(self, before: str, settings: Sequence[tuple[str, str]], after: str = "") -> None:
        super().__init__(before, settings, after)

    def said(self, name_of: Callable[[str], str]) -> str:
        """The message, with each setting called as ``name_of`` its field gives: as an option."""
        before, settings, after = self.args
        words = "; ".join(f"{name_of(name)} {words}" for name, words in settings)
        return f"{before}{words}{after}"

    def __str__(self) -> str:
        return self.said(str)

    def __reduce__(self) -> tuple[object, ...]:
        return SettingsError, self.args  # the subclasses take other arguments


class SettingError(SettingsError):
    """A setting is wrong; ``wanted`` stands after "must be"."""

    def __init__(self, field: str, wanted: str, got: object, source: str = "") -> None:
        super().__init__(*_words(source, field, f"must be {wanted}, got {got!r}"))


class ChangedSettingsError(SettingsError):
    """A run cannot be resumed: ``changes`` has (name, value before, value now) of settings."""

    def __init__(self, where: str, changes: Sequence[tuple[str, object, object]]) -> None:
        super().__init__(
            f"{where} is of a run with other settings, and resuming would not give its numbers: ",
            [(name, f"was {before!r} and is {now!r}") for name, before, now in changes],
            ". Set them as they were, or start in another folder",
        )


def _words(source: str, field: str, words: str) -> tuple[str, list[tuple[str, str]]]:
    """What ``SettingsError`` takes; in a file settings are called as fields, never as options."""
    return (f"{source}: {field} {words}", []) if source else ("", [(field, words)])


@dataclass(frozen=True)
class Range:
    """Bounds of a number: ``least`` and ``most`` belong to it, ``above`` and ``below`` do not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        names = {"at least": self.least, "above": self.above, "at most": self.most}
        bounds = {**names, "below": self.below}.items()
        return " and ".join(f"{name} {bound:g}" for name, bound in bounds if math.isfinite(bound))


@dataclass(frozen=True)
class Group:
    """In ``Annotated``: the heading that an option stands under in the help."""

    title: str


class Flag:
    """How a command line takes a setting, where that does not follow from its name.

    ``metavar`` stands for the value in the help; "hidden" is no option at all.
    """

    def __init__(
        self,
        *flags: str,
        metavar: str | None = None,
        kind: Literal["option", "argument", "hidden"] = "option",
    ) -> None:
        self.flags, self.metavar, self.kind = flags, metavar, kind


FREE: Literal["free"] = "free"
"""May differ when a run is resumed: the numbers do not depend on it."""

PLACE: Literal["place"] = "place"
"""A file, a folder or a name, which may have moved since; free as well."""


Mark = TypeVar("Mark")


class Setting:
    """One field of a settings class, as its annotation and its docstring describe it."""

    def __init__(self, field: dataclasses.Field[Any], hint: Any, line: str) -> None:
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        literals = [get_args(member) for member in members if get_origin(member) is Literal]

        def first(kind: type[Mark]) -> Mark | None:
            return next((mark for mark in marks if isinstance(mark, kind)), None)

        self.name, self.default, self.help = field.name, field.default, line
        # of its value; ``tuple`` is of whole numbers
        self.kinds: tuple[type, ...] = tuple(
            str if get_origin(member) is Literal else get_origin(member) or member
            for member in members
            if member is not type(None)
        )
        # the only texts it takes; empty for any
        self.choices: tuple[str, ...] = tuple(word for words in literals for word in words)
        self.is_optional, self.bounds = type(None) in members, first(Range)
        self.is_place, self.is_free = PLACE in marks, FREE in marks or PLACE in marks
        self.flag, self.group = first(Flag) or Flag(), getattr(first(Group), "title", None)

    def checked(self, value: object, source: str = "") -> object:
        """The value, lists as tuples; SettingError for another type, choice or size."""
        if value is None and self.is_optional:
            return value
        if isinstance(value, list | tuple) and all(type(item) is int for item in value):
            value = tuple(value)
        is_whole_for_fraction = type(value) is int and float in self.kinds
        if type(value) not in self.kinds and not is_whole_for_fraction:
            wanted = " or ".join(_KINDS[kind] for kind in self.kinds)
        elif self.choices and value not in self.choices:
            wanted = f"one of {', '.join(self.choices)}"
        elif isinstance(value, int | float) and not math.isfinite(value):
            wanted = "a finite number"
        elif isinstance(value, int | float) and self.bounds and value not in self.bounds:
            wanted = str(self.bounds)
        else:
            return value
        raise SettingError(self.name, wanted, value, source)


def settings_of(cls: type[Settings]) -> dict[str, Setting]:
    """The settings of a class by name, in order."""
    hints, lines = get_type_hints(cls, include_extras=True), _attribute_lines(cls)
    fields = dataclasses.fields(cls)
    return {one.name: Setting(one, hints[one.name], lines.get(one.name, "")) for one in fields}


def _attribute_lines(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say under ``Attributes:``, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for name, words in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE):
            found[name] = " ".join(words.split()).replace("``", "")
    return found


@dataclass(frozen=True)
class Settings:
    """What frozen dataclasses of settings have in common; checked when made."""

    former_names: ClassVar[Mapping[str, str]] = {}
    """Names in files of earlier versions, with those of today."""

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            object.__setattr__(self, name, setting.checked(getattr(self, name)))

    @classmethod
    def from_mapping(cls, values: Mapping[str, object], source: str = "") -> Self:
        """Make settings from names and values.

        Args:
            values: What is not named keeps its default.
            source: The file they come from, for messages.

        Raises:
            ValueError: A name is unknown or missing, or a value is wrong.
        """
        known = settings_of(cls)
        values = checked_settings(known, values, source, cls.former_names)
        for name, setting in known.items():
            if name not in values and setting.default is dataclasses.MISSING:
                raise SettingsError(*_words(source, name, f"is missing: {setting.help}"))
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **changes: object) -> Self:
        """Read settings from a TOML file of plain ``name = value`` lines.

        Args:
            path: The file.
            changes: Values that go before the file's, such as those of a command line.

        Raises:
            ValueError: The file is no TOML, or as ``from_mapping``.
            OSError: The file cannot be read.
        """
        return cls.from_mapping({**read_toml(path), **changes}, str(path))

    def to_dict(self) -> dict[str, Value]:
        """Names and values, fit for JSON."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}

    def to_toml(self) -> str:
        """The text of a TOML file that ``from_toml`` reads back; what is None is left out."""
        return "".join(  # JSON's numbers, strings, booleans and lists are TOML's
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in self.to_dict().items()
            if value is not None
        )

    def changes(self, other: Self) -> list[tuple[str, object, object]]:
        """(name, its value, this value) of all that differ and that a run's numbers depend on."""
        return [
            (name, getattr(other, name), getattr(self, name))
            for name, setting in settings_of(type(self)).items()
            if not setting.is_free and getattr(other, name) != getattr(self, name)
        ]

    def differences(self, other: Self) -> list[str]:
        """``changes`` in words; empty where a run with settings ``other`` can be resumed."""
        return [f"{name} was {a!r} and is {b!r}" for name, a, b in self.changes(other)]


def checked_settings(
    known: Mapping[str, Setting],
    values: Mapping[str, object],
    source: str,
    former_names: Mapping[str, str],
) -> dict[str, Any]:
    """The values under today's names; ValueError where a name is unknown or a value wrong."""
    values = {former_names.get(name, name): value for name, value in values.items()}
    if unknown := sorted(set(values) - set(known)):
        where = f"{source}: " if source else ""
        raise ValueError(
            f"{where}unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return {name: known[name].checked(value, source) for name, value in values.items()}


def read_toml(path: str | os.PathLike[str]) -> dict[str, object]:
    """The names and values of a TOML file; ValueError where it is none."""
    try:
        return dict(tomllib.loads(Path(path).read_text(encoding="utf-8-sig")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is no TOML file: {err}") from err


Class = TypeVar("Class", bound=type[Settings])


def _accepts_former_names(cls: Class) -> Class:
    """Let the constructor take ``former_names`` too, and give attributes by them."""
    make = vars(cls)["__init__"]

    @functools.wraps(make)
    def init(self: object, *args: object, **values: object) -> None:
        today = {cls.former_names.get(name, name): value for name, value in values.items()}
        make(self, *args, **today)

    type.__setattr__(cls, "__init__", init)
    for name, today in cls.former_names.items():
        setattr(cls, name, property(attrgetter(today)))
    return cls


_LENGTH, _RATES = Group("How long and how fast"), Group("How it learns")
_MACHINE, _LOG = Group("What it runs on"), Group("What is written")


@_accepts_former_names
@dataclass(frozen=True)
class TrainSettings(Settings):
    """The settings of a training run that do not depend on the task.

    Attributes:
        folder: Folder of the run: state, weights, log and curves are written there; made if it is
            not there.
        epochs: Passes over the data.
        steps: Steps of the optimiser; overrides ``epochs``.
        batch_size: Samples of one step, over all processes and accumulated parts, so that a run
            is the same on one device and on eight.
        accumulate: Parts that a process computes one after the other for one step; more parts
            need less memory.
        drop_last: Leave out an epoch's last step where it would have fewer than ``batch_size``
            samples.
        learning_rate: The highest learning rate, of the last block, the heads and the neck.
        layer_decay: Factor on the learning rate from each block to the one before it; 1 for none.
        optimiser: AdamW for everything, or Muon for the matrices of linear layers with AdamW for
            the rest: a step takes longer, and fewer may do. One learning rate fits both.
        weight_decay: Decay of matrices and kernels; norms, biases, attention biases and
            embeddings have none.
        beta1: AdamW's decay of the mean of the gradient.
        beta2: AdamW's decay of the mean of its square.
        warmup_steps: Steps in which the learning rate rises in a straight line.
        final_rate: The learning rate of the last step, as a part of the highest.
        clip_norm: Largest norm of the gradient; 0 does not clip.
        ema_decay: Decay of averaged weights, such as 0.999, which are then validated and saved; 0
            for none.
        trainable: What is trained: the full network; the decoder, neck or head alone; or low-rank
            additions to frozen weights (lora).
        lora_rank: Rank of those additions.
        batch_stats: Statistics of batch norms: frozen, or updated by each process (own) or by all
            together (synchronised, on GPUs). auto freezes statistics that were trained before and
            updates untouched ones.
        drop_path: Stochastic depth of the last block, rising from 0 in the first. By default the
            model's own.
        grad_checkpointing: Compute activations twice instead of keeping them.
        precision: What to compute in; bf16 by autocast.
        channels_last: Keep kernels and maps in channels-last memory.
        seed: Seed of all random numbers.
        device: cpu, cuda, cuda:1, mps, ...; auto takes a GPU if there is one.
        workers: Processes that prepare samples; 0 prepares them in the main process.
        log_every: Steps between two lines of the log.
        validate_every: Steps between two validations; 0 validates at the end of each epoch.
        save_every: Steps between two saved states; 0 saves after each validation.
        validate_at_start: Validate before the first step as well.
        tensorboard: Write TensorBoard's files too, if it is installed.
    """

    former_names = types.MappingProxyType({"moving": "trainable"})

    folder: Annotated[str, Flag("--output", "-o", metavar="RUN_FOLDER"), FREE]
    epochs: Annotated[int, Range(1), _LENGTH] = 10
    steps: Annotated[int | None, Range(1), _LENGTH] = None
    batch_size: Annotated[int, Range(1), _LENGTH] = 8
    accumulate: Annotated[int, Range(1), _LENGTH, FREE] = 1
    drop_last: Annotated[bool, _LENGTH] = False
    learning_rate: Annotated[float, Range(above=0), Flag("--lr", "--learning-rate"), _RATES] = 1e-3
    layer_decay: Annotated[float, Range(above=0, most=1), _RATES] = 1.0
    optimiser: Annotated[Optimiser, Flag("--optimiser", "--optimizer"), _RATES] = "adamw"
    weight_decay: Annotated[float, Range(0), _RATES] = 0.05
    beta1: Annotated[float, Range(0, below=1), _RATES] = 0.9
    beta2: Annotated[float, Range(0, below=1), _RATES] = 0.999
    warmup_steps: Annotated[int, Range(0), Flag("--warmup", "--warmup-steps"), _RATES] = 0
    final_rate: Annotated[float, Range(0, 1), _RATES] = 0.01
    clip_norm: Annotated[float, Range(0), Flag("--clip", "--clip-norm"), _RATES] = 1.0
    ema_decay: Annotated[float, Range(0, below=1), Flag("--ema", "--ema-decay"), _RATES] = 0.0
    trainable: Annotated[Trainable, Flag("--trainable", "--move", "--moving"), _RATES] = "full"
    lora_rank: Annotated[int, Range(1), _RATES] = 8
    batch_stats: Annotated[BatchStats, _RATES] = "auto"
    drop_path: Annotated[float | None, Range(0, 1), _RATES] = None
    grad_checkpointing: Annotated[bool, _MACHINE, FREE] = False
    precision: Annotated[TrainPrecision, _MACHINE] = "fp32"
    channels_last: Annotated[bool, _MACHINE, FREE] = True
    seed: Annotated[int, Range(0), _LENGTH] = 0
    device: Annotated[str, _MACHINE, FREE] = "auto"
    workers: Annotated[int, Range(0), _MACHINE, FREE] = 0
    log_every: Annotated[int, Range(1), _LOG, FREE] = 10
    validate_every: Annotated[int, Range(0), _LOG, FREE] = 0
    save_every: Annotated[int, Range(0), _LOG, FREE] = 0
    validate_at_start: Annotated[bool, _LOG, FREE] = False
    tensorboard: Annotated[bool, _LOG, FREE] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.folder:
            raise SettingError("folder", "the name of a folder", self.folder)
        if self.accumulate > self.batch_size:
            wanted = f"at most the batch size of {self.batch_size}, since each part has a sample"
            raise SettingError("accumulate", wanted, self.accumulate)
