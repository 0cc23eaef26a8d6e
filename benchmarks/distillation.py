"""Distil a small encoder, and train the same network on masks for the same time.

Two students of equal size and equal first weights see the same composites (of the recipe's data,
see ``recipes/default_model``) for the same number of seconds:

- *distilled*: trained on the teacher's stored embeddings without masks; uses the teacher's prompt
  encoder and mask decoder. Storing the embeddings counts as training time.
- *masks*: trained on the true masks by prompts; encoder and heads are trained, the heads start from
  the teacher's.

Both are evaluated on composites of objects and backgrounds that neither has seen: the cosine of the
embedding with the teacher's, and mean IoU of the true masks. ``distillation.md`` and
``distillation.json`` are written beside this file:

    .venv/bin/python benchmarks/distillation.py WORK
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

import tinyvit
from tinyvit.bench import machine_facts
from tinyvit.evaluate.segment import EvaluateSettings, evaluate_segment
from tinyvit.modules import TinyViT
from tinyvit.sam import SamPredictor, build_sam
from tinyvit.train import TrainSettings, train
from tinyvit.train.tasks.distill import DistillFeaturesSettings
from tinyvit.train.tasks.distill import make_features_task as make_task
from tinyvit.train.tasks.segment import Segment
from tinyvit.train.tasks.settings import SegmentSettings
from tinyvit.train.tasks.teachers import open_teacher, store_features

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "default_model"
sys.path.insert(0, str(RECIPE))
TEACHER = str(RECIPE / "start" / "first.safetensors")
KINDS = {"photo": 0.5, "render": 0.5}
WARM_STEPS = 4
COLUMNS = "cosine", "cosine_centred", "1 click", "3 clicks", "box"


def new_student(spec) -> TinyViT:
    """A narrower network than the teacher's, always with the same first weights."""
    torch.manual_seed(0)
    student = TinyViT(
        256, embed_dims=(16, 32, 64, 128), num_heads=(1, 1, 2, 4), depths=(2, 2, 4, 2),
        window_sizes=(8, 8, 16, 8), neck_dim=256, head=False,
    )  # fmt: skip
    student.image_spec = spec
    return student


def write_images(scenes, folder: Path) -> None:
    """Each as a PNG."""
    folder.mkdir(parents=True)
    for scene in scenes:
        Image.fromarray(scene.load()[0]).save(folder / f"{scene.name}.png", compress_level=1)


def settings_of(folder: Path, options, steps: int) -> TrainSettings:
    """The same for both, except the learning rate; no validation in between."""
    return TrainSettings(
        folder=str(folder), steps=steps, batch_size=options.batch, weight_decay=0.01,
        warmup_steps=min(30, steps // 4), precision="bf16", batch_stats="own", drop_path=0.0,
        tensorboard=False, validate_every=10**6,
    )  # fmt: skip


def distil(options, folder: Path, teacher) -> tuple[dict, TinyViT]:
    """Figures and the student after all steps; storing features is part of the time."""
    began = time.perf_counter()
    store = store_features(teacher, folder / "images", folder / "features", flips=True)
    stored = time.perf_counter() - began
    student = new_student(teacher.image_spec)
    task = make_task(student, store, folder / "images", DistillFeaturesSettings(held_out="val"))
    settings = replace(
        settings_of(folder / "distilled", options, options.steps), learning_rate=3e-3
    )
    result = train(task, settings)
    figures = {"steps": result.steps, "seconds": stored + result.seconds, "storing": stored}
    return figures, student


def train_on_masks(options, folder: Path, samples, spec, seconds: float) -> tuple[dict, object]:
    """Figures and the SAM after as many steps as fit into the seconds."""
    from composites import CompositeSet  # of the recipe

    sam = build_sam(TEACHER)
    sam.image_encoder = new_student(spec)
    own = SegmentSettings("", augment="none", corrective_share=0.2, val_masks=1)
    nothing = CompositeSet(options.work, "test", weights=KINDS, length=1)

    def task():
        return Segment(sam, samples, nothing, own)

    settings = replace(settings_of(folder / "warm", options, WARM_STEPS), learning_rate=1e-9)
    train(task(), settings)  # measures the time of a step, without changing the weights
    lines = (folder / "warm" / "log.jsonl").read_text().splitlines()
    speed = next(
        json.loads(line)["images_per_second"] for line in lines if "images_per_second" in line
    )
    steps = max(1, round(seconds * speed / options.batch))
    sam.image_encoder = new_student(spec)
    settings = replace(settings_of(folder / "masks", options, steps), learning_rate=1e-3)
    result = train(task(), settings)
    return {"steps": result.steps, "seconds": result.seconds}, sam


def masks_of(sam, scenes) -> dict[str, float]:
    """Mean IoU of the true masks."""
    settings = EvaluateSettings((1, 3), most_clicks=3, with_baselines=False)
    report = evaluate_segment(SamPredictor(sam.eval(), fast=False), scenes, settings)
    return {name: value.value for name, value in report.ious.items()}


def cosines(encoder: TinyViT, folder: Path, teacher) -> dict[str, float]:
    """``DistillFeatures``' figures on the held-out images."""
    from tinyvit.train.store import Store

    task = make_task(
        encoder, Store(folder / "features"), folder / "images",
        DistillFeaturesSettings(held_out="val"),
    )  # fmt: skip
    encoder.eval()
    with torch.no_grad():
        return task.validate(encoder)


def measure(options) -> dict:
    """Both students and the teacher; everything about it as plain data."""
    from composites import CompositeSet  # of the recipe

    samples = CompositeSet(options.work, "train", weights=KINDS, length=options.images)
    unseen = CompositeSet(options.work, "test", weights=KINDS, length=options.unseen)
    teacher = open_teacher(TEACHER, device="cpu")
    rows = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(samples[:], folder / "images" / "train")
        write_images(unseen[:], folder / "images" / "val")
        figures, student = distil(options, folder, teacher)
        sam = build_sam(TEACHER)
        sam.image_encoder = student
        rows["distilled"] = {
            **figures, **cosines(student, folder, teacher), "ious": masks_of(sam, unseen)
        }  # fmt: skip
        figures, sam = train_on_masks(
            options, folder, samples, teacher.image_spec, figures["seconds"]
        )
        rows["masks"] = {
            **figures, **cosines(sam.image_encoder, folder, teacher), "ious": masks_of(sam, unseen)
        }  # fmt: skip
        fresh = new_student(teacher.image_spec)
        rows["untrained"] = {"steps": 0, "seconds": 0.0, **cosines(fresh, folder, teacher)}
    rows["teacher"] = {"ious": masks_of(build_sam(TEACHER), unseen)}
    return {
        "command": f"benchmarks/distillation.py WORK --steps {options.steps}",
        "images": options.images,
        "unseen": options.unseen,
        "batch": options.batch,
        "rows": rows,
        "machine": machine_facts(),
    }


def markdown(found: dict) -> str:
    """The page of results."""
    machine = found["machine"]
    lines = [
        "# Distillation",
        "",
        f"Written by `.venv/bin/python {found['command']}`.",
        f"{found['pictures']} composites for training, {found['unseen']} of other objects on",
        f"other backgrounds for evaluation, batches of {found['batch']} in bf16; {machine['cpu']},",
        f"{machine['cores']} cores, torch {machine['torch']}, {machine['date']}.",
        "Both students have the same size, the same first weights and the same time.",
        "",
        "| | steps | seconds | cosine | centred cosine | 1 click | 3 clicks | box |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        figures = {**row, **row.get("ious", {})}
        shown = {"steps": "d", "seconds": ".0f", **dict.fromkeys(COLUMNS, ".3f")}
        cells = [format(figures[key], how) if key in figures else "" for key, how in shown.items()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    baseline = found["rows"]["distilled"]["cosine_floor"]
    lines += [
        "",
        "A student that returns the teacher's mean map for any image has a cosine of",
        f"{baseline:.3f}; the centred cosine has that map subtracted, and its baseline is 0.",
        "Clicks and box: mean IoU with the true masks. *distilled* uses the teacher's heads",
        "unchanged; *masks* trained them.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the recipe's data")
    parser.add_argument("--steps", type=int, default=250, help="of distillation")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--unseen", type=int, default=100)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    options = parser.parse_args()
    tinyvit.tune_allocator()
    found = measure(options)
    (options.output / "distillation.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "distillation.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
