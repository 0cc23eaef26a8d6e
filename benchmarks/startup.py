"""Measure from the start of a process to the first mask: seconds, memory, size of the installation.

One environment for each way to run: torch, ONNX Runtime, OpenVINO, and the native engine where a
C++ compiler is there. They take turns, so that a busy machine slows all of them. OpenVINO starts
once with its compiled form beside the file and once without. Writes ``startup.md`` and
``startup.json``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tinyvit.bench import machine_facts
from tinyvit.bench.workers import Spread

HERE = Path(__file__).parent
ROOT = HERE.parent
IMAGE = ROOT / "examples" / "pictures" / "chelsea.png"

EXTRAS = {"torch": "torch", "native": "native", "onnx": "onnx", "openvino": "openvino"}
"""Environment -> what is installed there beside the base."""

CONTESTANTS = {
    "torch": ("torch", "tinyvit_sam_2m", "torch"),
    "native": ("native", "tinyvit_sam_2m", "native"),
    "ONNX Runtime": ("onnx", None, "onnx"),
    "OpenVINO, nothing compiled": ("openvino", None, "openvino"),
    "OpenVINO, compiled before": ("openvino", None, "openvino"),
}
"""Name -> (environment, checkpoint or None for the exported folder, backend)."""

FIRST_MASK = """
import sys
from tinyvit import Prompt, Segmenter

image, source, backend, threads = sys.argv[1:]
own = {} if backend == "torch" else {"threads": int(threads)}
segmenter = Segmenter(source, backend=backend, **own)
(masks,) = segmenter.segment([image], [[Prompt([[172, 118]])]])
print(int(masks.mask(0).sum()), "torch" in sys.modules)
"""


def make_environment(folder: Path, name: str, log: Any) -> Path | None:
    """An environment with tinyvit and one extra; None where it cannot be made."""
    place, python = folder / name, folder / name / "bin" / "python"
    if (place / "done").is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    wanted = [str(ROOT)] if name == "native" else [f"{ROOT}[{EXTRAS[name]}]"]
    commands = [["--constraint", str(ROOT / "constraints.txt"), *wanted]]
    if name == "torch":
        cpu = next(x for x in (ROOT / "constraints.txt").read_text().split() if "torch==" in x)
        commands.insert(0, [cpu])
    if name == "native":
        commands.append([str(ROOT / "native")])
    for command in commands:
        install = [str(python), "-m", "pip", "install", "--quiet", *command]
        if subprocess.run(install, stdout=log, stderr=log).returncode:
            print(f"left out {name}: pip install {' '.join(command)} failed", file=sys.stderr)
            return None
    (place / "done").touch()
    return python


def size_of(python: Path) -> int:
    """Bytes on disk of what is installed, without pip and setuptools."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    total = 0
    for entry in site.iterdir():
        if not entry.name.startswith(("pip", "setuptools", "pkg_resources", "_distutils")):
            found = [entry] if entry.is_file() else [p for p in entry.rglob("*") if p.is_file()]
            total += sum(path.stat().st_blocks * 512 for path in found)
    return total


def run(python: Path, source: str, backend: str, threads: int) -> dict[str, Any]:
    """One process: seconds by the wall and of the CPU, peak memory, what it printed."""
    command = [str(python), "-I", "-c", FIRST_MASK, str(IMAGE), source, backend, str(threads)]
    own = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=own)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        words = said.read().strip()
    if process.returncode:
        raise SystemExit(f"{backend} failed:\n{words}")
    pixels, has_torch = words.splitlines()[-1].split()
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory": usage.ru_maxrss * 1024,
        "pixels": int(pixels),
        "loads_torch": has_torch == "True",
    }


def measure(pythons: dict[str, Path], exported: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Rounds of all contestants in turn, after one that does not count."""
    folders = {name: exported.with_name(f"exported-{i}") for i, name in enumerate(CONTESTANTS)}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported, folder)
    rows: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds + 1):
        for name, (environment, checkpoint, backend) in CONTESTANTS.items():
            if environment not in pythons:
                continue
            if name.endswith("nothing compiled"):
                for kept in folders[name].glob("*.compiled"):
                    shutil.rmtree(kept)
            source = checkpoint or str(folders[name])
            row = run(pythons[environment], source, backend, threads)
            if number:
                rows.setdefault(name, []).append(row)
            print(f"{number}/{rounds} {name}: {row['seconds']:.2f} s", file=sys.stderr)
    return {name: summary(pythons, name, found) for name, found in rows.items()}


def summary(pythons: dict[str, Path], name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and quartiles of a contestant's rounds."""
    found: dict[str, Any] = {}
    for fact in ("seconds", "cpu_seconds", "peak_memory"):
        spread = Spread.of([row[fact] for row in rows])
        found[fact] = {"median": spread.median, "lower": spread.lower, "upper": spread.upper}
    installed = size_of(pythons[CONTESTANTS[name][0]])
    return {**found, "installed": installed, "pixels": rows[0]["pixels"],
            "loads_torch": rows[0]["loads_torch"]}  # fmt: skip


def write(report: dict[str, Any], output: Path) -> None:
    """The table and the numbers."""
    (output / "startup.json").write_text(json.dumps(report, indent=1) + "\n")
    facts = ", ".join(f"{name} {value}" for name, value in report["machine"].items() if value)
    cores = report["machine"]["cores"]
    busy = [
        f"**Other programs ran meanwhile (load {report['load']:.0f} on {cores} cores): memory and "
        "CPU seconds count, the seconds of the clock do not.**",
        "",
    ]
    lines = [
        "# From the start of a process to the first mask",
        "",
        "Written by `benchmarks/startup.py`: one process after the other loads the embedded",
        "weights (256 px), or the folder that `tinyvit export` makes of them, encodes an image and",
        "decodes one click. Medians, quartiles in brackets; *installed* is without pip.",
        "",
        "    python benchmarks/startup.py "
        f"--rounds {report['rounds']} --threads {report['threads']}",
        "",
        *(busy if report["load"] > 1.5 * cores else []),
        f"- {facts}; load at the end {report['load']:.1f}",
        "",
        "| | seconds | CPU seconds | peak MB | installed MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in report["results"].items():
        cells = [
            "{median:.2f} ({lower:.2f} to {upper:.2f})".format(**row[fact])
            for fact in ("seconds", "cpu_seconds")
        ]
        memory = row["peak_memory"]["median"] / 1e6
        cells += [f"{memory:.0f}", f"{row['installed'] / 1e6:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    pixels = [row["pixels"] for row in report["results"].values()]
    lines += ["", f"The masks have {min(pixels)} to {max(pixels)} pixels."]
    (output / "startup.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Make environments, export, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-startup")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--only", action="append", choices=EXTRAS, help="environments to make")
    given = parser.parse_args()
    given.environments.mkdir(parents=True, exist_ok=True)
    pythons: dict[str, Path] = {}
    with (given.environments / "pip.log").open("w") as log:
        for name in given.only or EXTRAS:
            python = make_environment(given.environments, name, log)
            if python is not None:
                pythons[name] = python
    exported = given.environments / "exported"
    if not exported.is_dir():
        export = [sys.executable, "-m", "tinyvit", "export", "tinyvit_sam_2m", "-o", str(exported)]
        subprocess.run(export, check=True)
    results = measure(pythons, exported, given.rounds, given.threads)
    packages = ("onnxruntime", "openvino", "tinyvit-native", "numpy")
    report = {
        "machine": machine_facts(*packages),
        "rounds": given.rounds,
        "threads": given.threads,
        "load": os.getloadavg()[0],
        "results": results,
    }
    write(report, given.output)


if __name__ == "__main__":
    main()
