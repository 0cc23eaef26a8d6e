"""Compare the speed of tinyvit with other projects.

Run it with the environment that ``scripts/peers`` makes. ``benchmarks/README.md`` explains
the columns. Each contestant runs in its own process (``contestants.py``), all with the same
weights and images (``weights.py``), and they take turns round by round (``tinyvit.bench``).
"""

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import report

from tinyvit.bench import Spread, Turn, Worker, machine_facts, take_turns
from tinyvit.catalog import get_variant

HERE = Path(__file__).parent
COMMAND = (sys.executable, str(HERE / "contestants.py"))
PACKAGES = ("ultralytics", "mobilesam-mirror", "timm", "onnxruntime", "openvino")
MODELS = ("tiny_vit_5m_sam", "tiny_vit_5m_224", "tiny_vit_11m_224", "tiny_vit_21m_224")
QUICK_SIZES = {"tiny_vit_5m_sam": 256, "tiny_vit_5m_224": 224}
BASELINES = {
    "sam": ("ultralytics", "ultralytics+mallopt"),
    "classification": ("timm", "timm+mallopt"),
}
OTHERS = {"sam": ("mobile_sam",), "classification": ()}
FOR_ALL = (
    *("onnxruntime", "openvino-fp32", "openvino-bf16"),
    *("tinyvit-native-fp32", "tinyvit-native-bf16"),
    *("tinyvit-torch-fp32", "tinyvit-torch-bf16"),
    *("tinyvit-openvino-fp32", "tinyvit-openvino-bf16", "tinyvit-onnx-fp32"),
    *("tinyvit-openvinograph-fp32", "tinyvit-openvinograph-bf16"),
)
COMPARED = 4  # images of a batch whose outputs are compared with the plain model's


@dataclass(frozen=True)
class Case:
    """A model at a size and a batch."""

    model: str
    size: int
    batch: int

    @property
    def task(self) -> str:
        """What the model is for; it decides who can take part."""
        return get_variant(self.model).task

    @property
    def gflop(self) -> float:
        """Useful operations for one image, in 1e9."""
        row = get_variant(self.model)
        return 2 * row.gmacs * self.size**2 / row.img_size**2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = {"action": "append", "default": None}
    parser.add_argument("--model", **several, help=f"a variant; {', '.join(MODELS)} by default")
    parser.add_argument("--size", **several, type=int, help="pixels; the variant's by default")
    parser.add_argument(
        "--batch", **several, type=int, help="1, and 32 for classifiers, by default"
    )
    parser.add_argument("--contestant", **several, help="all that fit the model, by default")
    parser.add_argument("--rounds", type=int, default=None, help="7 by default")
    parser.add_argument("--starts", type=int, default=None, help="starts of each; 3 by default")
    parser.add_argument("--threads", type=int, default=None, help="each library's own by default")
    parser.add_argument(
        "--quick", action="store_true", help="small images, 2 rounds, 1 start; prints the tables"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="folder of results.md and results.json; this one"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.starts = options.starts or (1 if options.quick else 3)
    if options.output is None and not options.quick:
        options.output = HERE
    return options


def cases_of(options: argparse.Namespace) -> list[Case]:
    """What the options ask for.

    Raises:
        ValueError: An unknown variant.
    """
    cases = []
    for model in options.model or (QUICK_SIZES if options.quick else MODELS):
        row = get_variant(model)
        own_size = QUICK_SIZES.get(model, row.img_size) if options.quick else row.img_size
        own_batches = [1] if row.task == "sam" or options.quick else [1, 32]
        for size in options.size or [own_size]:
            cases += [Case(model, size, batch) for batch in options.batch or own_batches]
    return cases


def contestants_of(case: Case, asked: Sequence[str] | None) -> list[str]:
    """Who takes part in a case, in the order of turns."""
    fitting = [*BASELINES[case.task], *OTHERS[case.task], *FOR_ALL]
    if asked is None:
        return fitting
    own = {name.partition("+")[0] for name in fitting}
    foreign = {"ultralytics", "mobile_sam", "timm"} - own
    return [name for name in asked if name.partition("+")[0] not in foreign]


def run_case(case: Case, options: argparse.Namespace) -> dict:
    """Measure one case; everything about it as plain data."""
    names = contestants_of(case, options.contestant)
    say(f"{case.model}, {case.size}x{case.size}, batch {case.batch}: {len(names)} contestants")
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        environment = _environment(folder)
        spec = {**asdict(case), "folder": temporary, "threads": options.threads}
        spec |= {"compared": min(COMPARED, case.batch)}
        spec |= {"export": any("onnx" in name or "openvino" in name for name in names)}
        for name in ("prepare", "reference"):
            with Worker(COMMAND, {**spec, "name": name}, environment) as worker:
                say(f"  {name}: {worker.first_result_s:.1f} s")
                if name == "reference":
                    worker.save(folder / "reference.npy")
        reference = np.load(folder / "reference.npy")
        workers, firsts, left_out = {}, {}, []
        for name in names:
            try:
                workers[name], firsts[name] = _start(
                    {**spec, "name": name}, environment, options.starts, stack
                )
            except (ImportError, ValueError, OSError) as err:
                left_out.append({"name": name, "reason": str(err)})
                say(f"  left out {name}: {err}")
            else:
                say(f"  started {name}: first result after {firsts[name]:.1f} s")
        turns = take_turns(list(workers.values()), options.rounds, progress=_show)
        measured = []
        for (name, worker), own in zip(workers.items(), turns, strict=True):
            worker.save(folder / "output.npy")
            output = np.load(folder / "output.npy")[: len(reference)]
            error = float(np.abs(output - reference).max())
            measured.append(_row(case, name, own, error, firsts[name]))
    baselines = [name for name in BASELINES[case.task] if name in workers]
    compare(measured, baselines)
    return {
        **asdict(case),
        "gflop": case.gflop,
        "rounds": options.rounds,
        "starts": options.starts,
        "threads": options.threads,
        "largest_output": float(np.abs(reference).max()),
        "machine": machine_facts(*PACKAGES),
        "command": options.command,
        "baselines": baselines,
        "contestants": measured,
        "left_out": left_out,
    }


def compare(rows: Sequence[dict], baselines: Sequence[str]) -> None:
    """Add to each row how many times as fast as each baseline it was, taken round by round."""
    rounds = {row["name"]: row["rounds"] for row in rows}
    for row in rows:
        row["times_as_fast"] = {
            name: asdict(
                Spread.of([b / own for b, own in zip(rounds[name], row["rounds"], strict=True)])
            )
            for name in baselines
        }


def say(words: str) -> None:
    """A line about how it goes."""
    print(words, file=sys.stderr, flush=True)


def _environment(folder: Path) -> dict[str, str]:
    """Caches and settings of this run only; nothing asks the network."""
    here = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return {
        "PYTHONPATH": here.rstrip(os.pathsep),
        "TINYVIT_CACHE": str(folder / "cache"),
        "YOLO_CONFIG_DIR": str(folder),
        "YOLO_OFFLINE": "true",
        "HF_HUB_OFFLINE": "1",
    }


def _start(
    spec: dict, environment: dict[str, str], starts: int, stack: ExitStack
) -> tuple[Worker, float]:
    """The last of some starts, and the quickest time to a first result."""
    seconds = []
    for _ in range(starts - 1):
        with Worker(COMMAND, spec, environment) as worker:
            seconds.append(worker.first_result_s)
    worker = stack.enter_context(Worker(COMMAND, spec, environment))
    return worker, min([*seconds, worker.first_result_s])


def _row(case: Case, name: str, turns: Sequence[Turn], error: float, first: float) -> dict:
    rounds = [turn.seconds for turn in turns]
    seconds = Spread.of(rounds)
    faults = [turn.page_faults for turn in turns if turn.page_faults is not None]
    return {
        "name": name,
        "seconds": asdict(seconds),
        "rounds": rounds,
        "images_per_s": case.batch / seconds.median,
        "gflops": case.gflop * case.batch / seconds.median,
        "max_abs_error": error,
        "page_faults": statistics.median(faults) if faults else None,
        "peak_memory": turns[-1].peak_memory,
        "first_result_s": first,
    }


def _show(done: int, total: int | None) -> None:
    if sys.stderr.isatty():
        print(f"\r  turn {done} of {total} ", end="\n" if done == total else "", file=sys.stderr)


def main(arguments: Sequence[str]) -> None:
    """Measure the cases of the options; results are written after each case."""
    options = parse(arguments)
    options.command = shlex.join(
        [".venv-peers/bin/python", "benchmarks/against_peers.py", *arguments]
    )
    for case in cases_of(options):
        result = run_case(case, options)
        print(report.markdown(result), flush=True)
        if options.output is not None:
            cases = report.merge(report.read(options.output / "results.json"), [result])
            report.write(options.output, cases)


if __name__ == "__main__":
    main(sys.argv[1:])
