"""Draw the tables that people look at first: speed beside the peers, and what is installed.

Reads results.json and startup.json; writes docs/pictures/speed.svg and docs/pictures/startup.svg.
Run it in the environment of scripts/peers: .venv-peers/bin/python benchmarks/charts.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "pictures"
OURS, OTHERS = "#00897b", "#9e9e9e"


def draw_speed(case: dict[str, Any], path: Path) -> None:
    """Milliseconds of each contestant of one case, the slowest first."""
    rows = sorted(case["contestants"], key=lambda row: -row["seconds"]["median"])
    names = [row["name"] for row in rows]
    times = [row["seconds"]["median"] * 1e3 for row in rows]
    errors = [
        [t - row["seconds"]["lower"] * 1e3 for t, row in zip(times, rows, strict=True)],
        [row["seconds"]["upper"] * 1e3 - t for t, row in zip(times, rows, strict=True)],
    ]
    colours = [OURS if name.startswith("tinyvit") else OTHERS for name in names]
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(rows) + 1.2), layout="constrained")
    bars = axes.barh(names, times, xerr=errors, color=colours, ecolor="#424242", height=0.7)
    axes.bar_label(bars, [f" {t:.0f}" for t in times], fontsize=9)
    machine = case["machine"]
    title = (
        f"{case['model']}, {case['size']} x {case['size']}: milliseconds an image, less is better"
    )
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date'][:10]}; "
        f"medians and quartiles of {case['rounds']} interleaved rounds",
        fontsize=8,
    )
    finish(figure, axes, path)


def draw_startup(startup: dict[str, Any], path: Path) -> None:
    """CPU seconds to the first mask, peak memory and installed size of each way to compute."""
    names = list(startup["results"])[::-1]
    columns = {
        "CPU seconds to the first mask": ("cpu_seconds", 1.0, "{:.1f}"),
        "peak memory, MB": ("peak_memory", 1e6, "{:.0f}"),
        "installed, MB": ("installed", 1e6, "{:.0f}"),
    }
    figure, parts = pyplot.subplots(
        1, 3, figsize=(9, 0.36 * len(names) + 1.2), sharey=True, layout="constrained"
    )
    for axes, (title, (key, unit, form)) in zip(parts, columns.items(), strict=True):
        found = [startup["results"][name][key] for name in names]
        values = [(one["median"] if isinstance(one, dict) else one) / unit for one in found]
        bars = axes.barh(names, values, color=OURS, height=0.7)
        axes.bar_label(bars, [" " + form.format(value) for value in values], fontsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.margins(x=0.25)
    machine = startup["machine"]
    parts[0].set_xlabel(
        f"{machine['cpu']}, {startup['threads']} thread, {machine['date'][:10]}", fontsize=8
    )
    finish(figure, parts[0], path)


def finish(figure: Any, axes: Any, path: Path) -> None:
    """Plain axes; the same bytes on every run."""
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=9)
    figure.savefig(path, metadata={"Date": None})
    print(path)


def main() -> None:
    """Draw both."""
    matplotlib.rcParams["svg.hashsalt"] = "tinyvit"
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["font.family"] = "sans-serif"
    cases = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["cases"]
    draw_speed(cases[0], PICTURES / "speed.svg")
    draw_startup(
        json.loads((HERE / "startup.json").read_text(encoding="utf-8")), PICTURES / "startup.svg"
    )


if __name__ == "__main__":
    main()
