"""Train the default model on what the supply gives, stage after stage, as a file of stages says.

Each stage is one run of ``tinyvit.train.train`` in ``WORK/runs/STAGE``: it can be stopped at any
moment and goes on where it was.

    python recipes/default_model/train.py WORK [STAGE ...] [--stages FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import tinyvit
from composites import CompositeSet, CompositeSettings
from history import read_stages
from lite import LiteEncoder, build_lite, fit_neck, open_backbone, open_lite
from tinyvit.checkpoints import read_state_dict
from tinyvit.images.preprocess import to_input
from tinyvit.sam.embedding import spec_of
from tinyvit.sam.model import Sam, build_sam
from tinyvit.train import TrainSettings, train
from tinyvit.train.optim import join_processes
from tinyvit.train.run_folder import Progress
from tinyvit.train.tasks.segment import Maps, MaskSamples, Segment
from tinyvit.train.tasks.settings import SegmentSettings

STAGES = Path(__file__).with_name("stages.toml")
VAL_REGIONS = 0.4  # of the samples that choose the best weights; the others are composites
_NECK_IMAGES = 200

Stage = dict[str, Any]


def build(
    work: Path,
    stages: Path = STAGES,
    report: Callable[[str], None] = print,
    names: Sequence[str] = (),
) -> None:
    """Run every stage that is not done, or those named."""
    tinyvit.tune_allocator()
    table = read_stages(stages)
    with join_processes():  # once for all stages: torch hangs where it is left and joined again
        for name in names or table:
            run_stage(work, name, table[name], report)


def run_stage(work: Path, name: str, stage: Stage, report: Callable[[str], None] = print) -> Path:
    """Run one stage, or what is left of it."""
    folder = work / "runs" / name
    settings = TrainSettings.from_mapping(
        {"folder": str(folder), "workers": 1, **_own(TrainSettings, stage)}, f"stage {name}"
    )

    def tell(progress: Progress) -> None:
        if progress.step % settings.log_every == 0:
            loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
            report(
                f"{name}: step {progress.step} of {progress.steps}{loss}, "
                f"{progress.images_per_second:.1f} images/s"
            )

    result = train(task_of(work, stage), settings, resume=True, report=tell)
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items())
    report(f"{name}: done; {metrics}")
    return result.best_weights or result.last_weights


def task_of(work: Path, stage: Stage) -> Segment:
    """The task of a stage."""
    common: dict[str, Any] = {"size": stage["img_size"], "weights": dict(stage["kinds"])}
    drawn = CompositeSettings(**_own(CompositeSettings, stage))
    shares = {name: stage.get(name, 0.0) for name in ("regions", "things")}
    samples = CompositeSet(work, "train", seed=stage["seed"], settings=drawn, **shares, **common)
    held_out = CompositeSet(work, "val", seed=0, length=10_000, regions=VAL_REGIONS, **common)
    own = _own(SegmentSettings, stage, ("teacher", "model", "img_size", "seed"))
    settings = SegmentSettings(str(work), augment="none", **own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage["seed"])
        sam = _model(work, stage, samples)
        teacher: Maps | None = None
        if name := stage.get("teacher"):
            teacher = _teacher(work, name, stage["img_size"])
        data = cast(MaskSamples, samples)
        return Segment(sam, data, cast(Any, held_out), settings, teacher)


def _teacher(work: Path, name: str, size: int) -> Maps:
    """What a stage learns from: another stage's embedding and its backbone, or a backbone alone."""
    if name == "lite2":
        encoder = LiteEncoder(open_backbone(work, size), size)
        return lambda images: (None, *encoder.maps(images))
    encoder = cast(Any, open_lite(work, Path(found(work, name)), size).image_encoder)
    return cast(Maps, encoder.everything)


def _model(work: Path, stage: Stage, samples: CompositeSet) -> Sam:
    """What a stage begins with."""
    start, size = found(work, stage["start"]), stage["img_size"]
    if stage.get("encoder") == "lite2":
        sam = build_lite(work, start, size)
        encoder = cast(LiteEncoder, sam.image_encoder)
        old = build_sam(start, img_size=size).eval()
        explained = fit_neck(encoder, old.image_encoder, _batches(sam, samples))
        print(f"    the neck explains {explained:.3f} of the embedding's variance")
        return sam
    sam = build_sam(start or None, stage["model"], img_size=size)
    if name := stage.get("decoder"):
        tensors = read_state_dict(found(work, name)).tensors
        own = {key: v for key, v in tensors.items() if not key.startswith("image_encoder.")}
        sam.load_state_dict(own, strict=False)
    return sam


def _batches(sam: Sam, samples: CompositeSet) -> list[torch.Tensor]:
    """Images for the neck, normalised and padded."""
    spec = spec_of(sam)
    drawn = [to_input(one.load()[0], spec)[0] for one in samples[:_NECK_IMAGES]]
    batches = [np.stack(drawn[first : first + 8]) for first in range(0, len(drawn), 8)]
    return [torch.from_numpy(batch) for batch in batches]


def found(work: Path, name: str) -> str:
    """The weights of a stage by its name, a file of the recipe by its path there; else as it is."""
    folder = work / "runs" / name
    places = folder / "best.safetensors", folder / "last.safetensors", STAGES.parent / name
    return next((str(place) for place in places if name and place.is_file()), name)


def _own(kind: type, stage: Stage, but: Sequence[str] = ()) -> Stage:
    """What a stage says about the fields of a class."""
    names = {one.name for one in fields(kind)} - set(but)
    return {name: value for name, value in stage.items() if name in names}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("stage", nargs="*", help="which stages; all by default")
    parser.add_argument("--stages", type=Path, default=STAGES, help="the file of the stages")
    given = parser.parse_args()
    build(given.work, given.stages, _say, given.stage)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
