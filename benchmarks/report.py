"""The results of ``against_peers.py`` as JSON and as Markdown.

A *case* is a model at a size and a batch, with all its contestants, as plain data. Cases of earlier
runs stay until the same case is measured again; each keeps its own date, command and machine.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

_FACTS = {  # fact: its name for people
    "cpu": "processor",
    "cores": "cores",
    "instruction_sets": "instructions",
    "memory": "memory",
    "os": "system",
}
_HEADS = (
    *("contestant", "ms", "quartiles", "images/s", "GFLOP/s"),
    *("max error", "peak MB", "faults", "first result s"),
)
_INTRODUCTION = """# Against the peers

Written by `benchmarks/against_peers.py`; `benchmarks/README.md` says how to run it and how to read
this. Times hold for this machine and this run; compare ratios. All contestants have the same random
weights and images, run in a process of their own, and take turns.
"""


def merge(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Old cases with the new ones in their places, or at the end."""
    cases = {_key(case): case for case in [*old, *new]}
    return list(cases.values())


def read(path: Path) -> list[dict]:
    """The cases in a file; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else []


def write(folder: Path, cases: Sequence[dict]) -> None:
    """Write ``results.json`` and ``results.md``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.json": json.dumps({"cases": cases}, indent=1) + "\n",
        "results.md": "\n".join([_INTRODUCTION, *map(markdown, cases)]),
    }
    for name, text in texts.items():
        fresh = folder / f".{name}.part"
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, folder / name)


def markdown(case: Mapping) -> str:
    """One case: a title, the machine, and a table."""
    machine, size = case["machine"], case["size"]
    facts = {**machine, "memory": f"{(machine.get('memory') or 0) / 1e9:.0f} GB"}
    shown = ", ".join(f"{name}: {facts[key]}" for key, name in _FACTS.items() if facts.get(key))
    versions = ", ".join(
        f"{key} {value}" for key, value in machine.items() if key not in (*_FACTS, "date")
    )
    threads = case["threads"] or "each library's choice"
    lines = [
        f"## {case['model']}, {size}x{size}, batch {case['batch']}",
        "",
        f"{case['gflop']:.1f} GFLOP an image; {case['rounds']} rounds; outputs up to "
        f"{case['largest_output']:.1f}; {machine['date']}",
        "",
        f"    {case['command']}",
        "",
        f"- {shown}; threads: {threads}",
        f"- {versions}",
        "",
        *_table(case),
        "",
    ]
    lines += [f"Left out {row['name']}: {row['reason']}  " for row in case["left_out"]]
    return "\n".join([*lines, ""])


def _table(case: Mapping) -> list[str]:
    baselines = list(case["baselines"])
    heads = [*_HEADS[:5], *(f"x {name}" for name in baselines), *_HEADS[5:]]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    rows += [_row(row, baselines) for row in case["contestants"]]
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(row: Mapping, baselines: Sequence[str]) -> list[str]:
    seconds = row["seconds"]
    return [
        row["name"],
        f"{1e3 * seconds['median']:.1f}",
        f"{1e3 * seconds['lower']:.1f}-{1e3 * seconds['upper']:.1f}",
        f"{row['images_per_s']:.2f}",
        f"{row['gflops']:.0f}",
        *(f"{row['times_as_fast'][name]['median']:.2f}" for name in baselines),
        f"{row['max_abs_error']:.1e}",
        "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:.0f}",
        "-" if row["page_faults"] is None else f"{row['page_faults']:.0f}",
        f"{row['first_result_s']:.1f}",
    ]


def _key(case: Mapping) -> tuple:
    return case["model"], case["size"], case["batch"]
