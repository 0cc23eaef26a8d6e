"""Measure everything mode against MobileSAM with the same weights, and whether the masks agree.

Run it with the environment that ``scripts/peers`` makes. Two halves for each weights and image:

- *prompts*: ``SamPredictor`` with clicks, boxes and refinements, not timed. Masks should agree to
  an IoU of 0.999 and scores to 1e-4.
- *everything*: ``SamAutomaticMaskGenerator.generate``, from the image to the masks, in turns.
  Each mask of one should have a partner of IoU 0.98 in the other.

Each contestant runs in a process of its own (``segmenters.py``). The weights (``sam_weights.py``)
are no published ones: agreement and time count here, not what is found.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import everything_report as report
import numpy as np
from against_peers import compare, say
from mask_agreement import same_prompts, same_things
from PIL import Image

from tinyvit.bench import Spread, Turn, Worker, machine_facts

HERE = Path(__file__).parent
COMMAND = (sys.executable, str(HERE / "segmenters.py"))
PACKAGES = ("mobilesam-mirror", "openvino")
IMAGES = tuple(
    HERE.parent / "examples" / "pictures" / name
    for name in ("coffee.png", "chelsea.png", "rocket.jpg")
)
WEIGHTS = {  # name: variant, size, and the offset at which a third of all masks passes the filters
    "starter": ("tiny_vit_2m_sam", 256, 0.1),
    "5m": ("tiny_vit_5m_sam", 1024, 1.0),
}
BASELINES = ("mobile_sam", "mobile_sam+mallopt")
CONTESTANTS = (*BASELINES, "tinyvit", "tinyvit-bf16")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = {"action": "append", "default": None}
    parser.add_argument("--weights", **several, choices=WEIGHTS, help="both by default")
    parser.add_argument(
        "--image", **several, type=Path, help="files; the three example images by default"
    )
    parser.add_argument("--longer-side", type=int, help="resize images so; as they are")
    parser.add_argument("--contestant", **several, help=f"{', '.join(CONTESTANTS)} by default")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--points-per-batch", type=int, default=64)
    parser.add_argument("--pred-iou-thresh", type=float, default=0.35)
    parser.add_argument("--stability-score-thresh", type=float, default=0.8)
    parser.add_argument("--stability-score-offset", type=float, help="fits the weights by default")
    parser.add_argument("--crop-n-layers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the two files")
    parser.add_argument("--no-output", action="store_true", help="print the tables only")
    return parser.parse_args(arguments)


def cases_of(options: argparse.Namespace) -> Iterator[dict]:
    """What the options ask for: weights by image."""
    for weights in options.weights or WEIGHTS:
        variant, size, offset = WEIGHTS[weights]
        given = options.stability_score_offset
        arguments = {
            "points_per_side": options.points_per_side,
            "points_per_batch": options.points_per_batch,
            "pred_iou_thresh": options.pred_iou_thresh,
            "stability_score_thresh": options.stability_score_thresh,
            "stability_score_offset": offset if given is None else given,
            "crop_n_layers": options.crop_n_layers,
        }
        for image in options.image or IMAGES:
            yield {
                "weights": weights,
                "variant": variant,
                "size": size,
                "picture": Path(image).name,
                "path": str(Path(image).resolve()),
                "arguments": arguments,
            }


def run_case(case: dict, options: argparse.Namespace) -> dict:
    """Measure one case; everything about it as plain data."""
    names = options.contestant or list(CONTESTANTS)
    image = _read(case["path"], options.longer_side)
    say(f"{case['weights']}, {case['picture']}: {len(names)} contestants")
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        np.save(folder / "picture.npy", image)
        environment = _environment(folder)
        spec = {**case, "folder": temporary, "threads": options.threads}
        images = [case["path"]] if options.image else [str(path) for path in IMAGES]
        with Worker(COMMAND, {**spec, "name": "prepare", "pictures": images}, environment):
            say("  weights are made")
        prompts, left_out, workers = {}, [], {}
        for name in names:
            try:
                prompts[name] = _masks_of_prompts({**spec, "name": name}, environment, folder)
                worker = Worker(COMMAND, {**spec, "name": name, "job": "everything"}, environment)
                workers[name] = stack.enter_context(worker)
            except (ImportError, ValueError, OSError) as err:
                left_out.append({"name": name, "reason": str(err)})
                say(f"  left out {name}: {err}")
            else:
                say(f"  started {name}: first result after {worker.first_result_s:.1f} s")
        turns = _in_turns(list(workers.values()), options.rounds)
        things = {name: _saved(worker, folder) for name, worker in workers.items()}
    rows = [_row(name, own) for name, own in zip(workers, turns, strict=True)]
    theirs = BASELINES[0] if BASELINES[0] in workers else next(iter(workers))
    for row in rows:
        row["prompts"] = same_prompts(prompts[theirs], prompts[row["name"]])
        row["everything"] = same_things(things[theirs], things[row["name"]])
    baselines = [name for name in BASELINES if name in workers]
    compare(rows, baselines)
    return {
        **{key: value for key, value in case.items() if key != "path"},
        "image_size": list(image.shape[:2]),
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": machine_facts(*PACKAGES),
        "command": options.command,
        "compared_with": theirs,
        "baselines": baselines,
        "contestants": rows,
        "left_out": left_out,
    }


def _read(path: str, longer_side: int | None) -> np.ndarray:
    """An image as RGB [H, W, 3] uint8."""
    image = Image.open(path).convert("RGB")
    if longer_side is not None:
        scale = longer_side / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size])
    return np.array(image)


def _masks_of_prompts(spec: dict, environment: dict[str, str], folder: Path) -> np.ndarray:
    with Worker(COMMAND, {**spec, "job": "prompts"}, environment) as worker:
        return _saved(worker, folder)


def _in_turns(workers: Sequence[Worker], rounds: int) -> list[list[Turn]]:
    """As ``take_turns``, without its first round: a call takes long, and each turn warms up."""
    turns: list[list[Turn]] = [[] for _ in workers]
    for number in range(rounds):
        for own, worker in zip(turns, workers, strict=True):
            own.append(worker.turn(0))
        say(f"  round {number + 1} of {rounds}")
    return turns


def _saved(worker: Worker, folder: Path) -> np.ndarray:
    worker.save(folder / "masks.npy")
    return np.load(folder / "masks.npy")


def _environment(folder: Path) -> dict[str, str]:
    """Caches of this run only; nothing asks the network, and old names in timm warn of nothing."""
    here = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return {
        "PYTHONPATH": here.rstrip(os.pathsep),
        "PYTHONWARNINGS": "ignore",
        "TINYVIT_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }


def _row(name: str, turns: Sequence[Turn]) -> dict:
    rounds = [turn.seconds for turn in turns]
    return {
        "name": name,
        "seconds": asdict(Spread.of(rounds)),
        "rounds": rounds,
        "peak_memory": turns[-1].peak_memory,
    }


def main(arguments: Sequence[str]) -> None:
    """Measure the cases of the options; results are written after each case."""
    options = parse(arguments)
    options.command = shlex.join([".venv-peers/bin/python", "benchmarks/everything.py", *arguments])
    for case in cases_of(options):
        result = run_case(case, options)
        print(report.markdown(result), flush=True)
        if not options.no_output:
            report.write(options.output, report.merge(report.read(options.output), [result]))


if __name__ == "__main__":
    main(sys.argv[1:])
