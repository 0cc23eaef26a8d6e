"""Measure weights beside each other: on photographs with masks, and on composites held out.

One report for each file of weights and set of images; the floors that need no network stand in
the same table. All measuring is ``tinyvit.evaluate``'s. Written are ``evaluation.json`` (figures),
``cases.json`` (every mask), ``evaluation.md`` (tables) and one contact sheet for each report.

    python evaluate.py new.safetensors tinyvit_starter --photographs DIR --work WORK --out FOLDER

Knows nothing of how the weights were made.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinyvit.bench.machine import machine_facts
from tinyvit.checkpoints.open import find_checkpoint
from tinyvit.evaluate.segment import (
    ContactSheet,
    LabelledImage,
    MeasureSettings,
    SegmentReport,
    evaluate_segment,
)
from tinyvit.train.data.masks import open_mask_set

__all__ = ["Choices", "Images", "build", "measure", "open_sets", "tables"]

JSON, MARKDOWN, CASES = "evaluation.json", "evaluation.md", "cases.json"
PROMPTS = ("1 click", "3 clicks", "box")
_GRABCUT_MADE = "GrabCut helped to make these masks, so it is no fair floor here."


@dataclass(frozen=True)
class Choices:
    """What to measure on.

    Attributes:
        photographs: A folder with ``manifest.csv``, ``images`` and ``masks``; None for none.
        work: The folder of the supply, for composites; None for none.
        composites: How many composites.
        size: Their longest side in pixels.
        seed: Of the composites.
        most_masks: Stop after so many masks of each set; None measures all.
        floors: An earlier ``evaluation.json`` of the same images, whose floors are taken: they do
            not hang on the model, and GrabCut is slow. None measures them.
    """

    photographs: Path | None = None
    work: Path | None = None
    composites: int = 200
    size: int = 256
    seed: int = 2024
    most_masks: int | None = None
    floors: Path | None = None


@dataclass(frozen=True)
class Images:
    """A set to measure on.

    Attributes:
        name: What to call it: "photographs" or "composites".
        images: Its images with masks.
        faults: What was left out when it was opened.
        note: What a reader of its figures should know.
    """

    name: str
    images: Sequence[LabelledImage]
    faults: tuple[str, ...] = ()
    note: str = ""


def open_sets(choices: Choices) -> list[Images]:
    """The sets that the choices name, photographs first.

    Raises:
        ValueError: None is named, or one of them holds nothing good.
    """
    found = []
    if choices.photographs is not None:
        masks = open_mask_set(choices.photographs)
        found.append(Images("photographs", masks, masks.faults, _note(choices.photographs)))
    if choices.work is not None:
        from composites import CompositeSet

        composites = CompositeSet(choices.work, "test", choices.size, choices.seed)
        drawn = composites[: choices.composites]
        found.append(Images("composites", drawn, note="Objects held out, pasted on photographs."))
    if not found:
        raise ValueError("there is nothing to measure on: give --photographs DIR or --work WORK")
    return found


def _note(folder: Path) -> str:
    """Whether GrabCut made the masks, as far as the manifest has a column ``method``."""
    table = folder / "manifest.csv"
    if not table.is_file():
        return ""
    with table.open(newline="", encoding="utf-8") as lines:
        methods = [row.get("method") or "" for row in csv.DictReader(lines)]
    return _GRABCUT_MADE if any("grabcut" in method.lower() for method in methods) else ""


def measure(
    weights: Mapping[str, str],
    sets: Sequence[Images],
    *,
    out: Path | None = None,
    most_masks: int | None = None,
    earlier: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure every model on every set.

    Args:
        weights: Name in the tables -> path, or name of a checkpoint.
        sets: What to measure on.
        out: Folder of the contact sheets; None draws none.
        most_masks: Stop after so many masks of each set.
        earlier: What this function gave for the same sets; its floors are taken.
        say: Told what is being done.

    Returns:
        Plain data for JSON: ``grabcut`` (whether that floor could run), ``machine``, ``weights``
        and, by name of each set, its figures; single masks under ``cases``.

    Raises:
        ValueError: A set holds not one good mask, or ``earlier`` is of other images.
        CheckpointError: A file cannot be read, or holds no whole SAM.
    """
    results: dict[str, Any] = {
        "grabcut": earlier["grabcut"] if earlier else find_spec("cv2") is not None,
        "machine": machine_facts(),
        "weights": {name: _file_facts(path) for name, path in weights.items()},
        "sets": {},
    }
    for images in sets:
        reports: dict[str, SegmentReport] = {}
        for name, path in weights.items():
            say(f"measuring {name} on {images.name}")
            sheet = None if out is None else ContactSheet()
            # The floors are those of the images, not of the model: once is enough.
            settings = MeasureSettings(
                (1, 3),
                most_clicks=3,
                with_floors=not (reports or earlier),
                most_masks=most_masks,
            )
            reports[name] = evaluate_segment(
                path,
                images.images,
                settings,
                name=name,
                data=images.name,
                faults=images.faults,
                watch=sheet,
            )
            if sheet is not None and out is not None:
                sheet.save(out / f"{images.name}_{name}.png", f"{name}, one click")
        figures = _figures(images, reports)
        if earlier:
            figures["floors"] = _floors_of(earlier, images.name, figures)
        results["sets"][images.name] = figures
    return results


def _floors_of(
    earlier: Mapping[str, Any], name: str, figures: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The floors of a set that was measured before.

    Raises:
        ValueError: It was not, or had other images.
    """
    found = earlier["sets"].get(name)
    if found is None:
        raise ValueError(f"the earlier evaluation has no {name}; measure their floors with them")
    if any(found[key] != figures[key] for key in ("pictures", "masks", "left_out")):
        raise ValueError(
            f"the earlier evaluation has other {name}: {found['masks']} masks of "
            f"{found['pictures']} images, not {figures['masks']} of {figures['pictures']}; "
            "measure the floors anew"
        )
    floors: Mapping[str, Any] = found["floors"]
    return floors


def _file_facts(path: str) -> dict[str, object]:
    """Name, bytes and hash of a file of weights; its folder is nobody's business."""
    file, _ = find_checkpoint(path)
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return {"file": file.name, "bytes": len(content), "sha256": sha256}


def _figures(images: Images, reports: Mapping[str, SegmentReport]) -> dict[str, Any]:
    plain = {name: json.loads(report.to_json()) for name, report in reports.items()}
    first, shared = next(iter(plain.values())), ("pictures", "masks", "left_out", "floors")
    own = ("ious", "boundary_fs", "calibrations", "cost", "cases")
    return {
        "note": images.note,
        **{key: first[key] for key in shared},
        "models": {name: {key: report[key] for key in own} for name, report in plain.items()},
    }


def tables(results: Mapping[str, Any]) -> str:
    """The figures as Markdown, a table for each set; models first, floors below them."""
    parts = []
    for name, found in results["sets"].items():
        head = f"### {name.capitalize()}: {found['pictures']} images, {found['masks']} masks"
        rows = [
            "| mean IoU | 1 click | 3 clicks | box | predicted IoU: correlation, mean distance |",
            "|---|---|---|---|---|",
        ]
        rows += [_model_row(model, figures) for model, figures in found["models"].items()]
        rows += _floor_rows(found["floors"])
        words = [found["note"]] if found["note"] else []
        if not results["grabcut"]:
            words.append("GrabCut was not measured: OpenCV is not installed.")
        if found["left_out"]:
            words.append(f"Left out: {'; '.join(found['left_out'])}.")
        parts.append("\n".join([head, "", *rows, *(["", " ".join(words)] if words else [])]))
    legend = "In brackets: 95 % of 1000 means over images drawn anew, with replacement."
    return "\n\n".join([*parts, legend]) + "\n"


def _model_row(name: str, figures: Mapping[str, Any]) -> str:
    shown = [_with_interval(figures["ious"][prompt]) for prompt in PROMPTS]
    estimate = figures["calibrations"]["1 click"]
    correlation, error = estimate["correlation"], estimate["mean_absolute_error"]
    told = "-" if correlation is None else f"{correlation:.2f}"
    return f"| {name} | {' | '.join(shown)} | {told}, {error:.3f} |"


def _floor_rows(floors: Mapping[str, Any]) -> list[str]:
    clicks, boxes = floors["1 click"], floors["box"]
    rows = ["| floor: disc around the click, ellipse in the box | {} | - | {} | - |"]
    values = [(clicks["disc"], boxes["ellipse"])]
    if "grabcut" in clicks:
        rows.append("| floor: GrabCut from the click, in the box | {} | - | {} | - |")
        values.append((clicks["grabcut"], boxes["grabcut"]))
    return [
        row.format(*(_with_interval(figure) for figure in pair))
        for row, pair in zip(rows, values, strict=True)
    ]


def _with_interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def build(
    weights: Mapping[str, str],
    choices: Choices,
    out: Path,
    say: Callable[[str], None] = print,
) -> Path:
    """Measure and write everything into a folder.

    Args:
        weights: Name in the tables -> path, or name of a checkpoint.
        choices: What to measure on.
        out: The folder; made if need be.
        say: Told what is being done.

    Returns:
        The path of ``evaluation.json``, which is written last.

    Raises:
        ValueError: There is nothing to measure on.
        CheckpointError: A file cannot be read, or holds no whole SAM.
    """
    out.mkdir(parents=True, exist_ok=True)
    earlier = None
    if choices.floors is not None:
        earlier = json.loads(choices.floors.read_text(encoding="utf-8"))
    results = measure(
        weights,
        open_sets(choices),
        out=out,
        most_masks=choices.most_masks,
        earlier=earlier,
        say=say,
    )
    cases = {
        name: {model: figures.pop("cases") for model, figures in found["models"].items()}
        for name, found in results["sets"].items()
    }
    _write(out / CASES, json.dumps(cases))
    _write(out / MARKDOWN, tables(results))
    _write(out / JSON, json.dumps(results, indent=2))
    return out / JSON


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def named(weights: Sequence[str]) -> dict[str, str]:
    """A short name for each: the file's stem, or the name of the checkpoint.

    Raises:
        ValueError: Two would have the same name.
    """
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
    parser.add_argument("--floors", type=Path, help="earlier evaluation.json to take floors from")
    parser.add_argument("--out", type=Path, default=Path("evaluation"))
    given = parser.parse_args(arguments)
    sets = given.photographs, given.work, given.composites, given.size
    choices = Choices(*sets, most_masks=given.most_masks, floors=given.floors)
    build(named(given.weights), choices, given.out)
    print((given.out / MARKDOWN).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
