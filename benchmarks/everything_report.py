"""The results of ``everything.py`` as JSON and as Markdown.

A *case* is weights, an image and the arguments of everything mode, with all its contestants, as
plain data. Cases of earlier runs stay until the same case is measured again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

_FACTS = ("cpu", "cores", "instruction_sets", "os")
_HEADS = ("contestant", "s", "quartiles", "peak MB", "masks", "least IoU", "alone", "score differs")
_INTRODUCTION = """# Everything mode

Written by `benchmarks/everything.py`. The whole of everything mode: encoding, decoding of a
grid of points, filters, NMS; each contestant in its own process, interleaved, with the same weights
and arguments. Times hold for this machine and this run; compare ratios.

**The weights.** No published weights. `starter` is the first embedded model, at 256 pixels. `5m`
is MobileSAM's network at 1024 pixels for its speed: a random encoder with a neck fitted to the
starter's embedding of these images, and the starter's heads with logits ten times as steep
(`benchmarks/sam_weights.py`). Predicted IoU and stability are lower than with published weights,
so the thresholds are lower too, the same for all: about a third of the candidates passes, as with
published weights. The masks say nothing about quality; the benchmark is about speed and about
equal results.

**The columns.** *least IoU* is that of the worst pair when each mask is paired with the nearest
of MobileSAM's; *alone* counts masks without a partner of IoU 0.98, MobileSAM's + the
contestant's: a mask whose score is at a threshold up to rounding, or that ties in NMS, may be
kept on one side only. MobileSAM's suppression of duplicates is a replacement in numpy for
torchvision's (`nms_kernel.py`), which takes milliseconds. *prompts* compares `SamPredictor` on
clicks, boxes and refinements.
"""


def merge(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Old cases with the new ones in their places, or at the end."""
    cases = {_key(case): case for case in [*old, *new]}
    return list(cases.values())


def read(folder: Path) -> list[dict]:
    """The cases in ``everything.json`` of a folder; none if there is no file."""
    path = folder / "everything.json"
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else []


def write(folder: Path, cases: Sequence[dict]) -> None:
    """Write ``everything.json`` and ``everything.md``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "everything.json": json.dumps({"cases": cases}, indent=1) + "\n",
        "everything.md": "\n".join([_INTRODUCTION, *map(markdown, cases)]),
    }
    for name, text in texts.items():
        fresh = folder / f".{name}.part"
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, folder / name)


def markdown(case: Mapping) -> str:
    """One case: a title, the machine, the arguments, and a table."""
    machine = case["machine"]
    height, width = case["image_size"]
    shown = ", ".join(str(machine[key]) for key in _FACTS if machine.get(key))
    known = (*_FACTS, "date", "memory")
    versions = ", ".join(f"{key} {value}" for key, value in machine.items() if key not in known)
    arguments = ", ".join(f"{key}={value}" for key, value in case["arguments"].items())
    lines = [
        f"## {case['weights']} ({case['variant']}, {case['size']} px), {case['picture']} "
        f"{width}x{height}",
        "",
        f"    {case['command']}",
        "",
        f"- {arguments}",
        f"- {shown}; threads: {case['threads']}; {case['rounds']} rounds; {machine['date']}",
        f"- {versions}",
        "",
        *_table(case),
        "",
    ]
    lines += [f"Left out {row['name']}: {row['reason']}  " for row in case["left_out"]]
    return "\n".join([*lines, ""])


def _table(case: Mapping) -> list[str]:
    baselines = list(case["baselines"])
    more = ("prompts: least IoU", "score differs")
    heads = [*_HEADS[:3], *(f"x {name}" for name in baselines), *_HEADS[3:], *more]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    rows += [_row(row, baselines) for row in case["contestants"]]
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(row: Mapping, baselines: Sequence[str]) -> list[str]:
    seconds, things, prompts = row["seconds"], row["everything"], row["prompts"]
    return [
        row["name"],
        f"{seconds['median']:.3g}",
        f"{seconds['lower']:.3g}-{seconds['upper']:.3g}",
        *(f"{row['times_as_fast'][name]['median']:.1f}" for name in baselines),
        "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:.0f}",
        f"{things['ours']}",
        "-" if things["least_iou"] is None else f"{things['least_iou']:.4f}",
        f"{things['theirs_alone']} + {things['ours_alone']}",
        f"{things.get('most_score_difference', 0):.1e}",
        f"{prompts['least_iou']:.4f}",
        f"{prompts['most_score_difference']:.1e}",
    ]


def _key(case: Mapping) -> tuple:
    size = tuple(case["image_size"])
    return case["weights"], case["picture"], size, json.dumps(case["arguments"], sort_keys=True)
