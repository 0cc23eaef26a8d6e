"""What the folders of the training's runs tell of it: images, steps, hours, and the results kept.

A run's folder is one of ``tinyvit.train``; each stage of ``stages.toml`` has one in ``WORK/runs``.
Hours are those that the steps took at the logged speed, validation included; a run that was resumed
counts once.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

KEPT = ("settings.toml", "log.jsonl", "curves.png")


@dataclass(frozen=True)
class History:
    """How long the training took.

    Attributes:
        start: The checkpoint that the first stage began with; empty for random weights.
        steps: Steps of the optimiser.
        images: Images seen.
        hours: That they took; 0 where nothing is logged.
    """

    start: str
    steps: int
    images: int
    hours: float


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data."""
    content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return content


def read_stages(path: Path) -> dict[str, dict[str, Any]]:
    """The stages by name, in order; each has what stands in [common] and not in itself.

    ``base`` in [common] names a file beside it, whose [common] comes first.
    """
    stages: dict[str, dict[str, Any]] = read_toml(path)
    common = stages.pop("common", {})
    if base := common.pop("base", ""):
        common = {**read_toml(path.with_name(base))["common"], **common}
    stages = {name: {**common, **stage} for name, stage in stages.items()}
    if not stages:
        raise ValueError(f"{path} has no stage; write a table [NAME] for each")
    return stages


def trained_by(work: Path, stages: Path) -> Path:
    """The weights that the last stage leaves, there or not: its best, else its last."""
    folder = work / "runs" / list(read_stages(stages))[-1]
    best, last = folder / "best.safetensors", folder / "last.safetensors"
    return last if last.is_file() and not best.is_file() else best


def read_history(work: Path, stages: Path) -> History:
    """Add up the logs of all stages."""
    table = read_stages(stages)
    steps, images, seconds = 0, 0, 0.0
    for name, stage in table.items():
        log = work / "runs" / name / "log.jsonl"
        if not log.is_file():
            continue
        batch, before = int(stage.get("batch_size", 8)), 0
        for line in _lines(log.read_text(encoding="utf-8").splitlines()):
            if line.get("kind") != "train":
                continue
            new = (int(line["step"]) - before) * batch
            before = int(line["step"])
            speed = line.get("images_per_second")
            seconds += new / speed if speed else 0.0
            images += new
        steps += before
    start = str(next(iter(table.values())).get("start", ""))
    return History(start, steps, images, seconds / 3600)


def _lines(texts: Iterable[str]) -> Iterable[dict[str, Any]]:
    """The whole lines of a log; a kill may have cut off the last one."""
    for text in texts:
        try:
            yield json.loads(text)
        except ValueError:
            continue


def keep_results(work: Path, stages: Path, evaluation: Path, target: Path) -> list[Path]:
    """Copy what the repository keeps of a run: settings, logs, curves and metrics, no images."""
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name in read_stages(stages):
        for kept in KEPT:
            source = work / "runs" / name / kept
            if not source.is_file():
                continue
            written.append(target / f"{name}_{kept}")
            if kept.endswith(".toml"):  # a folder of somebody's machine says nothing to others
                text = source.read_text(encoding="utf-8").replace(str(work), "WORK")
                written[-1].write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(source, written[-1])
    for kept in ("evaluation.md", "evaluation.json"):
        if (evaluation / kept).is_file():
            written.append(Path(shutil.copyfile(evaluation / kept, target / kept)))
    return written
