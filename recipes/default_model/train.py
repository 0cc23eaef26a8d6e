"""Train the default model on composites, stage after stage, as ``stages.toml`` says.

Each stage is one run of ``tinyvit.train.train`` in ``WORK/runs/STAGE``: it can be stopped at any
moment and goes on where it was, and begins with the best weights of the stage before it.

    python recipes/default_model/train.py WORK [STAGE ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import tinyvit
from composites import CompositeSet
from history import read_stages
from tinyvit.sam.build import build_sam
from tinyvit.train import TrainSettings, train
from tinyvit.train.run_folder import Progress
from tinyvit.train.tasks.segment import Segment
from tinyvit.train.tasks.settings import SegmentSettings

STAGES = Path(__file__).with_name("stages.toml")

Stage = dict[str, Any]


def build(work: Path, stages: Path = STAGES, report: Callable[[str], None] = print) -> Path:
    """Run every stage that is not done."""
    weights = ""
    for name, stage in read_stages(stages).items():
        weights = str(run_stage(work, name, stage, weights or stage["start"], report))
    return Path(weights)


def run_stage(
    work: Path, name: str, stage: Stage, start: str, report: Callable[[str], None] = print
) -> Path:
    """Run one stage, or what is left of it."""
    folder = work / "runs" / name
    known = {one.name for one in fields(TrainSettings)}
    settings = TrainSettings.from_mapping(
        {
            "folder": str(folder),
            "workers": 1,
            **{key: value for key, value in stage.items() if key in known},
        },
        f"stage {name}",
    )

    def tell(progress: Progress) -> None:
        if progress.step % settings.log_every == 0:
            loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
            report(
                f"{name}: step {progress.step} of {progress.steps}{loss}, "
                f"{progress.images_per_second:.1f} images/s"
            )

    result = train(_task(work, stage, start), settings, resume=True, report=tell)
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items())
    report(f"{name}: done; {metrics}")
    return result.best_weights or result.last_weights


def _task(work: Path, stage: Stage, start: str) -> Segment:
    """The task of a stage."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage["seed"])
        sam = build_sam(beside(start) or None, stage["model"], img_size=stage["img_size"])
    common = {"size": stage["img_size"], "weights": dict(stage["kinds"])}
    samples = CompositeSet(
        work, "train", seed=stage["seed"], regions=stage.get("regions", 0.0), **common
    )
    held_out = CompositeSet(work, "val", seed=0, length=10_000, **common)
    names = "objects", "box_share", "corrective_share", "most_corrections", "focal", "val_masks"
    own = {name: stage[name] for name in names}
    return Segment(sam, samples, held_out, SegmentSettings(str(work), augment="none", **own))


def beside(start: str) -> str:
    """A file of the recipe by its path there; anything else as it is."""
    own = STAGES.parent / start
    return str(own) if start and own.is_file() else start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("stage", nargs="*", help="which stages; all by default")
    parser.add_argument("--weights", default="", help="weights that the first of them begins with")
    options = parser.parse_args()
    tinyvit.tune_allocator()
    stages, start = read_stages(STAGES), options.weights
    for name in options.stage or stages:
        start = str(
            run_stage(options.work, name, stages[name], start or stages[name]["start"], _say)
        )


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
