"""Processes that are timed in turn, and what runs in them: a TinyViT, or a matrix product.

Work is counted as useful multiply-accumulates, two operations each: a window's padding is none.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit import errors
from tinyvit.allocator import peak_memory as peak_memory
from tinyvit.catalog import find_variant, get_checkpoint, get_variant, list_checkpoints
from tinyvit.checkpoints.detection import Architecture, encoder_shapes
from tinyvit.checkpoints.families import part_of
from tinyvit.inference.bundle import ExportedEncoder, engine_for, is_exported
from tinyvit.inference.read_ahead import cores

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tinyvit.factory import StoredModel
    from tinyvit.inference.engine import Engine
    from tinyvit.modules import TinyViT


Call = Callable[[], object]
Progress = Callable[[int, "int | None"], None]

_SETTLE_S = 0.1  # threads of the one before spin on for a while after its last call
_EXPECTED = (errors.TinyViTError, ValueError, TypeError, OSError)
LONG = 5.0
"""Seconds from which on a call counts without one before it: the cold start does not matter."""


def make(spec: Mapping[str, Any]) -> tuple[Call, dict[str, object]]:
    """From a spec (the fields of a ``Contestant``, or of a matrix product) to a call and its facts.

    A matrix product has {"matmul": side, "precision", "device", "threads"}. Facts are precision,
    device, threads and, for a TinyViT, chose, backend, size, gflop, invented_s.
    """
    if (threads := spec["threads"]) is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if "matmul" in spec:
        return _make_matmul(spec["matmul"], spec["precision"], spec["device"], threads)
    if is_exported(spec["checkpoint"]):
        return _make_on_arrays(spec, spec["checkpoint"])
    if engine_for(spec["checkpoint"], spec["backend"], spec["device"]) == "native":
        from tinyvit.factory import leave_to_torch

        start = time.perf_counter()
        with leave_to_torch():
            stored = _open_stored(spec)
            invented = time.perf_counter() - start if spec["checkpoint"] is None else 0.0
            return _make_on_arrays(spec, stored, invented)
    return _make_tiny_vit(spec)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random tensors of a TinyViT, its batch statistics too; values stay of order one."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape, np.float32)
        if name.endswith("num_batches_tracked"):
            noise = np.zeros(shape, np.int64)
        elif name.endswith("running_var"):
            noise = 0.5 + abs(noise)
        elif name.endswith(("running_mean", "bias")):
            noise *= 0.2
        elif len(shape) == 1:  # weight of a norm
            noise = 1 + 0.2 * noise
        elif not name.endswith("attention_biases"):
            noise *= math.prod(shape[1:]) ** -0.5
        tensors[name] = noise
    return tensors


def fill_randomly(model: TinyViT, seed: int = 0) -> None:
    """Give every tensor of a model the values of ``random_tensors``."""
    import torch

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = random_tensors(shapes, seed).items()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in found})


def count_gflop(model: TinyViT, size: tuple[int, int], name: str | None = None) -> float:
    """Useful operations for one image of this (height, width), in 1e9.

    Those of the variant ``name`` are scaled by the pixels; None counts the model's own.
    """
    if name is not None:
        row = get_variant(name)
        return 2 * row.gmacs * size[0] * size[1] / row.img_size**2
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(1, model.in_chans, *size, device="meta"))
    return float(counter.get_total_flops()) / 1e9


def _make_tiny_vit(spec: Mapping[str, Any]) -> tuple[Callable[[], Tensor], dict[str, object]]:
    import torch

    from tinyvit.factory import create_model
    from tinyvit.inference.engine import Engine

    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])  # other backends are told by the engine
    model_name, checkpoint = spec["model"], spec["checkpoint"]
    model = create_model(model_name, checkpoint, img_size=spec["size"])
    start = time.perf_counter()
    if checkpoint is None:
        fill_randomly(model)
    elif checkpoint in list_checkpoints() and model_name is None:
        model_name = get_checkpoint(checkpoint).variant
    if model.image_spec is None:
        raise ValueError("this model does not say how its images are prepared; give --size")
    size = model.image_spec.size
    gflop = count_gflop(model, size, model_name)
    batch = torch.randn(spec["batch"], model.in_chans, *size)
    invented = time.perf_counter() - start
    ways = {name: spec[name] for name in ("backend", "precision", "device")}
    if spec["backend"] not in ("auto", "torch"):
        ways["threads"] = spec["threads"]
    engine = Engine(model, **ways)
    facts = _facts_of(engine, torch.get_num_threads(), gflop, invented)
    return lambda: engine.backend(batch), facts


def _facts_of(
    engine: Engine, threads: int | None, gflop: float, invented: float
) -> dict[str, object]:
    return {
        "chose": engine.explain(),
        "backend": engine.backend.name,
        "precision": engine.precision,
        "device": engine.backend.device,
        "size": engine.image_spec.size,
        "threads": threads,
        "gflop": gflop,
        "invented_s": invented,
    }


def _open_stored(spec: Mapping[str, Any]) -> StoredModel:
    """A contestant for the native engine: of its file, or with random tensors."""
    from tinyvit.factory import StoredModel, open_stored

    if spec["checkpoint"] is not None:
        return open_stored(spec["checkpoint"], spec["size"], name=spec["model"])
    row = get_variant(spec["model"])
    names = (field.name for field in fields(Architecture))
    sizes = {name: getattr(row, name) for name in names if hasattr(row, name)}
    shapes = encoder_shapes(
        Architecture(**sizes, mlp_ratio=4.0, mbconv_expand_ratio=4.0, local_conv_size=3, in_chans=3)
    )
    parts = {"trunk", *(["head"] if row.head else []), *(["neck"] if row.neck_dim else [])}
    own = {key: shape for key, shape in shapes.items() if part_of(key) in parts}
    side = spec["size"] or row.img_size
    image_spec = replace(row.image_spec, size=(side, side))
    tensors = random_tensors(own)
    return StoredModel(row.arguments(), tensors, image_spec, {}, {}, Path(row.name), "tinyvit")


def _make_on_arrays(
    spec: Mapping[str, Any], source: StoredModel | str, invented: float = 0.0
) -> tuple[Call, dict[str, object]]:
    """What runs without torch: the encoder of an exported folder, or the native engine."""
    from tinyvit.inference.engine import Engine

    names = ("backend", "precision", "device", "threads")
    engine = Engine(source, **{name: spec[name] for name in names})
    encoder: Any = engine.backend
    size = engine.image_spec.size
    if isinstance(encoder, ExportedEncoder):
        variant, sides = encoder.facts.variant, (encoder.facts.network_side or max(size),) * 2
    else:
        variant, sides = find_variant(source.arguments), size  # type: ignore[union-attr]
    row = None if variant is None else get_variant(variant)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((spec["batch"], 3, *size), np.float32)
    gflop = 0.0 if row is None else 2 * row.gmacs * math.prod(sides) / row.img_size**2
    threads = spec["threads"] or os.cpu_count()
    return lambda: encoder(batch), _facts_of(engine, threads, gflop, invented)


def _make_matmul(
    side: int, precision: str, device: str, threads: int | None
) -> tuple[Call, dict[str, object]]:
    """The quicker of two ways to a product of square matrices: torch's own and a 1x1 convolution.

    They go by different libraries on a CPU, and which one is better depends on the precision.
    Without torch it is numpy's product.
    """
    if find_spec("torch") is None:
        if precision != "fp32":
            raise errors.MissingExtraError(
                f"a matrix product in {precision} to compare with needs torch; pip install "
                "'tinyvit[torch]', or measure fp32"
            )
        left, right = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
        count = threads or os.cpu_count()
        return lambda: left @ right, {"precision": precision, "device": device, "threads": count}
    import torch

    from tinyvit.inference.torch_backend import DTYPES

    if threads is not None:
        torch.set_num_threads(threads)
    place = device if device.startswith("cuda") else "cpu"
    a, b = (torch.randn(side, side, device=place).to(DTYPES[precision]) for _ in range(2))
    # [side, side] as [1, side, side, 1], channels-last: the same product
    image = a.reshape(1, side, 1, side).permute(0, 3, 1, 2)
    kernel = b[:, :, None, None].contiguous(memory_format=torch.channels_last)

    def product(is_plain: bool) -> Tensor:
        with torch.inference_mode():
            found = a @ b if is_plain else torch.nn.functional.conv2d(image, kernel)
        if place != "cpu":
            torch.cuda.synchronize()
        return found

    def seconds_of(is_plain: bool) -> float:
        product(is_plain)
        start = time.perf_counter()
        product(is_plain)
        product(is_plain)
        return time.perf_counter() - start

    quicker = partial(product, min((True, False), key=seconds_of))
    return quicker, {"precision": precision, "device": device, "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Turn:
    """One turn of a contestant."""

    seconds: float  # median of its timed calls
    calls: int  # how many were timed
    page_faults: float | None  # minor ones for each call, or None where nobody counts them
    peak_memory: int | None  # largest resident size of the process so far in bytes, or None


class Worker(AbstractContextManager["Worker"]):
    """A process with one contestant in it, alive until closed.

    ``facts`` is what the contestant says of itself; ``first_result_s`` is the time from the start
    of the process to its first result, without the time in which weights were invented.

    Args:
        command: What to start; it calls ``serve``.
        spec: Plain data that says what to run.
        environment: Variables to add to this process's own.

    Raises:
        TinyViTError: The contestant cannot be had here, e.g. ``MissingExtraError``.
        ValueError: It is not possible at all.
        ChildProcessError: It broke.
    """

    def __init__(
        self,
        command: Sequence[str],
        spec: Mapping[str, object],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.facts = self._ask(spec)
        except BaseException:
            self.close()
            raise
        self.first_result_s = time.perf_counter() - start - self.facts.get("invented_s", 0.0)

    def turn(self, least_seconds: float = 0.2) -> Turn:
        """Let it have its turn; timed calls fill ``least_seconds``."""
        return Turn(**self._ask({"do": "turn", "least_seconds": least_seconds}))

    def save(self, path: Path) -> None:
        """Let it write what it computes as a ``.npy`` file."""
        self._ask({"do": "save", "path": str(path)})

    def close(self) -> None:
        """End the process."""
        try:
            self._process.communicate(timeout=10)  # closes its stdin, which ends it
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.communicate()
        self._stderr.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        line, stdin, stdout = "", self._process.stdin, self._process.stdout
        if stdin is not None and stdout is not None:
            with suppress(BrokenPipeError):  # it has ended; stderr says why
                stdin.write(json.dumps(request) + "\n")
                stdin.flush()
                line = stdout.readline()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().strip() or "nothing on stderr, as where memory is short"
            raise ChildProcessError(
                f"a contestant's process ended with exit code {code}: {said.splitlines()[-1]}"
            )
        reply: dict[str, Any] = json.loads(line)
        if name := reply.get("error"):
            message = reply["message"]
            if name in ("ValueError", "TypeError"):
                raise ValueError(message)
            kind = getattr(errors, name, None)
            raise kind(message) if kind else ChildProcessError(f"{name}: {message}")
        return reply


def take_turns(
    workers: Sequence[Worker],
    rounds: int,
    *,
    least_seconds: float = 0.2,
    progress: Progress | None = None,
) -> list[list[Turn]]:
    """Let all have their turns, round by round, after a round that does not count.

    Args:
        workers: In the order of their turns.
        rounds: Turns that count, for each.
        least_seconds: Timed calls of a turn fill this time.
        progress: Called with (turns done, turns in all).

    Returns:
        For each worker its turns, in the order of the rounds.

    Raises:
        ValueError: Less than one round.
        ChildProcessError: A worker broke.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    turns: list[list[Turn]] = [[] for _ in workers]
    for number in range(rounds + 1):
        for i, worker in enumerate(workers):
            time.sleep(_SETTLE_S)
            turn = worker.turn(least_seconds)
            if number:
                turns[i].append(turn)
            if progress is not None:
                progress(number * len(workers) + i + 1, (rounds + 1) * len(workers))
    return turns


def serve(make: Callable[[Mapping[str, object]], tuple[Call, Mapping[str, object]]]) -> None:
    """Be a worker: read requests from stdin and answer them on stdout until stdin ends.

    Args:
        make: From the spec to (what to time, facts about it as plain data). A fact called
            "invented_s" is left out of the time to the first result. A call gives an array or a
            tensor.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply

    def reply(content: Mapping[str, object]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    try:
        call, facts = make(json.loads(sys.stdin.readline()))
        call()
    except _EXPECTED as err:
        reply({"error": type(err).__name__, "message": str(err)})
        return
    reply(facts)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "turn":
            reply(asdict(_take_turn(call, request["least_seconds"])))
        else:
            np.save(request["path"], np.asarray(call()))
            reply({})


def _take_turn(call: Call, least_seconds: float) -> Turn:
    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    before, first = minor_faults(), timed()
    times = [first] if first >= LONG else []
    if not times:
        before = minor_faults()
    while not times or sum(times) < least_seconds:
        times.append(timed())
    after = minor_faults()
    faults = None if before is None or after is None else (after - before) / len(times)
    return Turn(statistics.median(times), len(times), faults, peak_memory())


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of some numbers."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """The spread of some numbers.

        Raises:
            ValueError: There are none.

        Examples:
            >>> Spread.of([1.0, 2.0, 3.0, 4.0, 50.0])
            Spread(median=3.0, lower=2.0, upper=4.0)
        """
        if not numbers:
            raise ValueError("a spread wants at least one number, got none")
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, lower, upper)

    @property
    def relative(self) -> float:
        """The distance of the quartiles, as a share of the median."""
        return (self.upper - self.lower) / self.median if self.median else 0.0


_CPUINFO = Path("/proc/cpuinfo")
_SHOWN_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "sve"),
)


def machine_facts(*packages: str) -> dict[str, str | int | None]:
    """What a table of times is worth nothing without, as plain data.

    Args:
        packages: Distributions whose versions are wanted beside those of torch and tinyvit.

    Returns:
        cpu, cores (that this process may use), instruction_sets, memory (in bytes), os, python, one
        entry for each installed package, and date (UTC).
    """
    flags = (_line_of(_CPUINFO, "flags") or _line_of(_CPUINFO, "Features") or "").split()
    memory = _line_of(Path("/proc/meminfo"), "MemTotal")
    facts: dict[str, str | int | None] = {
        "cpu": _cpu(),
        "cores": cores(),
        "instruction_sets": " ".join(name for name in _SHOWN_SETS if name in flags),
        "memory": None if memory is None else int(memory.split()[0]) * 1024,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("torch", "tinyvit", *packages):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return facts


def minor_faults() -> int | None:
    """Page faults of this process so far that read no disk; None where nobody counts them."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _cpu() -> str:
    name = _line_of(_CPUINFO, "model name")
    if name is None and platform.system() == "Darwin":
        command = ("sysctl", "-n", "machdep.cpu.brand_string")
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            name = done.stdout.strip()
    return name or platform.processor() or platform.machine()


def _line_of(path: Path, name: str) -> str | None:
    """What stands behind ``name:`` in one of the kernel's files, or None."""
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, colon, value = line.partition(":")
            if colon and key.strip() == name:
                return value.strip()
    return None
