"""Facts of the machine and of this process; the median and the spread of numbers."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tinyvit.allocator import peak_memory as peak_memory


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, str | int | None] = {
        "cpu": _cpu(),
        "cores": cores,
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
