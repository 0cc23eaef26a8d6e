"""Evaluate weights on photos with masks, on held-out composites, and on held-out regions.

One report for each file of weights and set of images; the baselines that need no network are in
the same table. ``tinyvit.evaluate`` computes everything. Written are ``evaluation.json`` (metrics),
``cases.json`` (every mask), ``evaluation.md`` (tables) and one gallery for each report.

    python evaluate.py new.safetensors tinyvit_sam_2m --photographs DIR --work WORK --out FOLDER
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

from lite import is_lite, open_lite
from tinyvit.bench import machine_facts
from tinyvit.checkpoints.files import file_sha256, write_text
from tinyvit.checkpoints.open import find_checkpoint
from tinyvit.evaluate.segment import (
    EvaluateSettings,
    Gallery,
    LabelledImage,
    SegmentReport,
    evaluate_segment,
)
from tinyvit.sam import SamPredictor
from tinyvit.train.data.masks import open_mask_set

JSON, MARKDOWN, CASES = "evaluation.json", "evaluation.md", "cases.json"
PROMPTS = ("1 click", "3 clicks", "box")
_GRABCUT_MADE = "GrabCut helped to make these masks, so it is no fair baseline here."


@dataclass(frozen=True)
class Choices:
    """What to evaluate on.

    Attributes:
        photographs: A folder with ``manifest.csv``, ``images`` and ``masks``; None for none.
        work: The folder of the supply, for composites and regions; None for none.
        composites: How many composites; and of photographs with regions a quarter of that, since
            each has many.
        size: Their longest side in pixels.
        seed: Of the composites.
        most_masks: Stop after so many masks of each set; None takes all.
        split: "test", or "val" to choose by: its objects are others.
    """

    photographs: Path | None = None
    work: Path | None = None
    composites: int = 200
    size: int = 256
    seed: int = 2024
    most_masks: int | None = None
    split: Literal["val", "test"] = "test"


@dataclass(frozen=True)
class Images:
    """A set of images to evaluate on.

    Attributes:
        name: What to call it: "photographs" or "composites".
        images: Its images with masks.
        faults: What was left out when it was opened.
        note: What a reader of its metrics should know.
    """

    name: str
    images: Sequence[LabelledImage]
    faults: tuple[str, ...] = ()
    note: str = ""


def open_sets(choices: Choices) -> list[Images]:
    """The sets that the choices name, photographs first."""
    found = []
    if choices.photographs is not None:
        masks = open_mask_set(choices.photographs)
        found.append(Images("photographs", masks.scenes, masks.faults, _note(choices.photographs)))
    if choices.work is not None:
        from composites import CompositeSet

        common = choices.work, choices.split, choices.size, choices.seed
        for name, share, part, note in (
            ("composites", 0.0, 1, "Objects held out, pasted on photographs."),
            ("regions", 1.0, 4, "Regions that an algorithm found in photographs held out."),
        ):
            if share and not (choices.work / "regions").is_dir():
                continue
            drawn = CompositeSet(*common, regions=share)[: -(-choices.composites // part)]
            found.append(Images(name, cast("Sequence[LabelledImage]", drawn), note=note))
    if not found:
        raise ValueError("there is nothing to evaluate on: give --photographs DIR or --work WORK")
    return found


def _note(folder: Path) -> str:
    """Whether GrabCut made the masks, as far as the manifest has a column ``method``."""
    table = folder / "manifest.csv"
    if not table.is_file():
        return ""
    with table.open(newline="", encoding="utf-8") as lines:
        methods = [row.get("method") or "" for row in csv.DictReader(lines)]
    return _GRABCUT_MADE if any("grabcut" in method.lower() for method in methods) else ""


def evaluate(
    weights: Mapping[str, str],
    sets: Sequence[Images],
    *,
    out: Path | None = None,
    most_masks: int | None = None,
    work: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate every model on every set."""
    results: dict[str, Any] = {
        "grabcut": find_spec("cv2") is not None,
        "machine": machine_facts(),
        "weights": {name: _file_facts(path) for name, path in weights.items()},
        "sets": {},
    }
    for images in sets:
        reports: dict[str, SegmentReport] = {}
        for name, path in weights.items():
            say(f"evaluating {name} on {images.name}")
            sheet = None if out is None else Gallery()
            # Baselines do not depend on the model: once is enough.
            settings = EvaluateSettings(
                (1, 3),
                most_clicks=3,
                with_baselines=not reports,
                most_masks=most_masks,
            )
            reports[name] = evaluate_segment(
                open_weights(path, work),
                images.images,
                settings,
                name=name,
                data=images.name,
                faults=images.faults,
                watch=sheet,
            )
            if sheet is not None and out is not None:
                sheet.save(out / f"{images.name}_{name}.png", f"{name}, one click")
        results["sets"][images.name] = _metrics(images, reports)
    return results


def open_weights(path: str, work: Path | None) -> str | SamPredictor:
    """What a checkpoint or file is evaluated as; a teacher of the recipe is built in ``work``."""
    if work is None or not is_lite(Path(path)):
        return path
    return SamPredictor(open_lite(work, Path(path), Choices.size), fast=False)


def _file_facts(path: str) -> dict[str, object]:
    """Name, bytes and hash of a file of weights; its folder is nobody's business."""
    file, _ = find_checkpoint(path)
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _metrics(images: Images, reports: Mapping[str, SegmentReport]) -> dict[str, Any]:
    plain = {name: json.loads(report.to_json()) for name, report in reports.items()}
    first, shared = next(iter(plain.values())), ("pictures", "masks", "left_out", "floors")
    own = ("ious", "boundary_fs", "calibrations", "cost", "cases")
    return {
        "note": images.note,
        **{key: first[key] for key in shared},
        "models": {name: {key: report[key] for key in own} for name, report in plain.items()},
    }


def tables(results: Mapping[str, Any]) -> str:
    """The metrics as Markdown, a table for each set; models first, baselines below."""
    parts = []
    for name, found in results["sets"].items():
        head = f"### {name.capitalize()}: {found['pictures']} images, {found['masks']} masks"
        rows = [
            "| mean IoU | 1 click | 3 clicks | box | predicted IoU: correlation, mean distance |",
            "|---|---|---|---|---|",
        ]
        rows += [_model_row(model, metrics) for model, metrics in found["models"].items()]
        rows += _baseline_rows(found["floors"])
        words = [found["note"]] if found["note"] else []
        if not results["grabcut"]:
            words.append("GrabCut was not run: OpenCV is not installed.")
        if found["left_out"]:
            words.append(f"Left out: {'; '.join(found['left_out'])}.")
        parts.append("\n".join([head, "", *rows, *(["", " ".join(words)] if words else [])]))
    legend = "In brackets: 95 % bootstrap intervals over images (1000 resamples)."
    return "\n\n".join([*parts, legend]) + "\n"


def _model_row(name: str, metrics: Mapping[str, Any]) -> str:
    shown = [_with_interval(metrics["ious"][prompt]) for prompt in PROMPTS]
    estimate = metrics["calibrations"]["1 click"]
    correlation, error = estimate["correlation"], estimate["mean_absolute_error"]
    told = "-" if correlation is None else f"{correlation:.2f}"
    return f"| {name} | {' | '.join(shown)} | {told}, {error:.3f} |"


def _baseline_rows(baselines: Mapping[str, Any]) -> list[str]:
    clicks, boxes = baselines["1 click"], baselines["box"]
    rows = ["| baseline: disc around the click, ellipse in the box | {} | - | {} | - |"]
    values = [(clicks["disc"], boxes["ellipse"])]
    if "grabcut" in clicks:
        rows.append("| baseline: GrabCut from the click, in the box | {} | - | {} | - |")
        values.append((clicks["grabcut"], boxes["grabcut"]))
    return [
        row.format(*(_with_interval(metric) for metric in pair))
        for row, pair in zip(rows, values, strict=True)
    ]


def _with_interval(metric: Mapping[str, float]) -> str:
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def build(
    weights: Mapping[str, str],
    choices: Choices,
    out: Path,
    say: Callable[[str], None] = print,
) -> Path:
    """Evaluate, and write everything into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    results = evaluate(
        weights,
        open_sets(choices),
        out=out,
        most_masks=choices.most_masks,
        work=choices.work,
        say=say,
    )
    cases = {
        name: {model: metrics.pop("cases") for model, metrics in found["models"].items()}
        for name, found in results["sets"].items()
    }
    write_text(out / CASES, json.dumps(cases))
    write_text(out / MARKDOWN, tables(results))
    write_text(out / JSON, json.dumps(results, indent=2))
    return out / JSON


def named(weights: Sequence[str]) -> dict[str, str]:
    """A short name for each: the file's stem, or the name of the checkpoint."""
    found: dict[str, str] = {}
    for one in weights:
        name, _, path = one.partition("=") if "=" in one else (Path(one).stem, "", one)
        if name in found:
            raise ValueError(f"two weights are called {name!r}; write NAME=PATH to tell them apart")
        found[name] = path
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", nargs="+", help="[NAME=]PATH, or a name of 'tinyvit models'")
    parser.add_argument("--photographs", type=Path, help="folder: manifest.csv, images, masks")
    parser.add_argument("--work", type=Path, help="folder of the recipe's supply, for composites")
    parser.add_argument("--composites", type=int, default=Choices.composites)
    parser.add_argument("--size", type=int, default=Choices.size, help="of composites, pixels")
    parser.add_argument("--most-masks", type=int, help="of each set; default all")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val to choose by")
    parser.add_argument("--out", type=Path, default=Path("evaluation"))
    given = parser.parse_args(arguments)
    sets = given.photographs, given.work, given.composites, given.size
    choices = Choices(*sets, most_masks=given.most_masks, split=given.split)
    build(named(given.weights), choices, given.out)
    print((given.out / MARKDOWN).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
