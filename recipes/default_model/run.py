"""The default model in one command: fetch, supply, control, train, choose, shrink, evaluate, card.

    python recipes/default_model/run.py WORK --photographs DIR

Each step keeps what is done and may be stopped at any moment; the same command goes on. The steps
that make images and the training know themselves what is done. The last four are passed over
while their inputs and choices are what they were when they ended.

WORK lies outside the repository; nothing in it is ever committed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from history import keep_results, read_stages, trained_by
from tinyvit.errors import TinyViTError

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Choices:
    """What the command was given.

    Attributes:
        work: The folder for everything.
        stages: The file of the training's stages; None takes ``stages.toml`` beside this file.
        photographs: Photos with masks to evaluate on; None takes composites alone.
        composites: How many composites to evaluate on.
        tiny: Two steps of training and a handful of images: whether it runs, not how well.
        machine: What the training ran on, in words, for the card.
        beside: Other weights to evaluate in the same table.
        control: Whether to train and evaluate ``control.toml`` before.
    """

    work: Path
    stages: Path | None = None
    photographs: Path | None = None
    composites: int = 200
    tiny: bool = False
    machine: str = ""
    beside: tuple[str, ...] = (f"previous={HERE / 'start/starter.safetensors'}",)
    control: bool = False

    @property
    def table(self) -> Path:
        """The file of the stages that are trained."""
        return self.stages or HERE / ("tiny.toml" if self.tiny else "stages.toml")


@dataclass(frozen=True)
class Places:
    """Where things lie in the folder ``work``."""

    work: Path

    @property
    def shipped(self) -> Path:
        """The file for the package."""
        return self.work / "weights" / "default.safetensors"

    @property
    def chosen(self) -> Path:
        """What was chosen among the trained weights, and their offsets and thresholds."""
        return self.work / "weights" / "chosen.json"

    @property
    def evaluation(self) -> Path:
        """The folder of metrics and galleries."""
        return self.work / "evaluation"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.work / "weights" / "MODEL_CARD.md"


@dataclass(frozen=True)
class Step:
    """One step of the recipe.

    Attributes:
        name: What ``--only`` calls it.
        words: What it does.
        do: Does it.
        inputs: Files that it reads; with ``outputs`` they say whether it is done.
        outputs: Files that it leaves; none means that it knows itself what is done.
        given: Choices that it depends on, as plain data.
    """

    name: str
    words: str
    do: Callable[[], object]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    given: tuple[object, ...] = ()

    def is_done(self, work: Path) -> bool:
        """Whether outputs are there and nothing has changed since they were made."""
        stamp = self._stamp(work)
        if not self.outputs or not stamp.is_file():
            return False
        if not all(path.is_file() for path in (*self.inputs, *self.outputs)):
            return False
        return stamp.read_text(encoding="utf-8") == self._state()

    def note_done(self, work: Path) -> None:
        """Remember inputs and choices."""
        if not self.outputs:
            return
        stamp = self._stamp(work)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(self._state(), encoding="utf-8")

    def _stamp(self, work: Path) -> Path:
        return work / "steps" / f"{self.name}.json"

    def _state(self) -> str:
        files = {}
        for path in self.inputs:
            facts = path.stat() if path.is_file() else None
            files[path.name] = facts and [facts.st_size, facts.st_mtime_ns]
        return json.dumps({"given": [str(one) for one in self.given], "inputs": files})


def steps_of(choices: Choices) -> list[Step]:
    """The steps in their order; nothing is imported or done yet."""
    work, places = choices.work, Places(choices.work)
    evaluation = places.evaluation / "evaluation.json"
    trained = trained_by(work, choices.table)
    tables = work / "objects" / "photo.csv", work / "backgrounds" / "manifest.csv"
    control = [Step("control", "train and compare the control's stages", lambda: _control(choices))]
    return [
        Step("fetch", "fetch the packages that the images come from", _builder("fetch", work)),
        Step("objects", "cut out objects", _builder("objects", work)),
        Step("backgrounds", "choose background photographs", _builder("backgrounds", work)),
        Step("regions", "find the regions of the photographs", _builder("regions", work)),
        Step("label", "label things in the photographs", _builder("label", work)),
        *(control if choices.control else ()),
        Step("train", "train the network", lambda: _train(choices)),
        Step(
            "choose",
            "choose weights, offsets and thresholds",
            lambda: _choose(choices),
            (trained,),
            (places.chosen,),
            (choices.tiny,),
        ),
        Step(
            "shrink",
            "write the file that ships, in half precision",
            lambda: _shrink(choices),
            (trained, places.chosen),
            (places.shipped,),
        ),
        Step(
            "evaluate",
            "evaluate, beside other weights and baselines",
            lambda: _evaluate(choices),
            (places.shipped, *tables),
            (evaluation,),
            (choices.photographs, choices.composites, choices.tiny, choices.beside),
        ),
        Step(
            "card",
            "write the model card",
            lambda: _card(choices),
            (places.shipped, evaluation, choices.table, *tables),
            (places.card,),
            (choices.machine,),
        ),
    ]


def run(choices: Choices, only: Sequence[str] = (), say: Callable[[str], None] = print) -> None:
    """Do the steps."""
    steps = steps_of(choices)
    unknown = set(only) - {step.name for step in steps}
    if unknown:
        raise ValueError(
            f"there is no step {', '.join(sorted(unknown))}; the steps are "
            f"{', '.join(step.name for step in steps)}"
        )
    choices.work.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        if only and step.name not in only:
            continue
        head = f"[{number}/{len(steps)}] {step.name}"
        if not only and step.is_done(choices.work):
            say(f"{head}: done before")
            continue
        say(f"{head}: {step.words}")
        start = time.monotonic()
        step.do()
        step.note_done(choices.work)
        say(f"{head}: {time.monotonic() - start:.0f} s")


def _builder(name: str, work: Path) -> Callable[[], object]:
    return lambda: _part(name).build(work)


def _part(name: str) -> Any:
    """A file of the recipe; imported late, for not all are needed by each step."""
    return importlib.import_module(name)


def _train(choices: Choices) -> None:
    _part("train").build(choices.work, choices.table)


def _control(choices: Choices) -> None:
    """Train the control, and evaluate it where no photo is: on composites and regions."""
    evaluate, table = _part("evaluate"), HERE / "control.toml"
    _part("train").build(choices.work, table)
    weights = {
        name: str(choices.work / "runs" / name / "last.safetensors") for name in read_stages(table)
    }
    weights |= evaluate.named(choices.beside)
    what = evaluate.Choices(None, choices.work, min(choices.composites, 100), split="val")
    evaluate.build(weights, what, choices.work / "control")
    print((choices.work / "control" / "evaluation.md").read_text(encoding="utf-8"))


def _choose(choices: Choices) -> None:
    _need(trained_by(choices.work, choices.table), "train")
    target = Places(choices.work).chosen
    more = {"most_masks": 4} if choices.tiny else {}
    chosen = _part("choose").build(choices.work, choices.table, target, **more)
    print(
        f"    {chosen.weights}; mean IoU, best mask, error of the score: without offsets "
        f"{_listed(chosen.before)}, with {_listed(chosen.offsets)} {_listed(chosen.after)}"
    )


def _listed(numbers: Sequence[float]) -> str:
    return " / ".join(f"{number:.3f}" for number in numbers)


def _shrink(choices: Choices) -> None:
    places = Places(choices.work)
    _need(places.chosen, "choose")
    chosen = json.loads(places.chosen.read_text(encoding="utf-8"))
    found = _part("shrink").build(
        choices.work / chosen["weights"], places.shipped, chosen["offsets"], chosen["thresholds"]
    )
    print(
        f"    {found.bytes} bytes, sha256 {found.sha256}; largest differences: embeddings "
        f"{found.embedding_error:.2g}, logits {found.logit_error:.2g}"
    )


def _evaluate(choices: Choices) -> None:
    places, evaluate = Places(choices.work), _part("evaluate")
    _need(places.shipped, "shrink")
    weights = {**evaluate.named([str(places.shipped)]), **evaluate.named(choices.beside)}
    what = evaluate.Choices(
        choices.photographs,
        choices.work,
        4 if choices.tiny else choices.composites,
        64 if choices.tiny else 256,
        most_masks=4 if choices.tiny else None,
    )
    evaluate.build(weights, what, places.evaluation)
    print((places.evaluation / "evaluation.md").read_text(encoding="utf-8"))


def _card(choices: Choices) -> None:
    places = Places(choices.work)
    _need(places.evaluation / "evaluation.json", "evaluate")
    files = places.work, places.shipped, places.evaluation, places.card
    _part("card").build(*files, stages=choices.table, machine=choices.machine)
    results = places.work / "results"
    keep_results(places.work, choices.table, places.evaluation, results)
    print(f"    {places.card}; what the repository keeps lies in {results}")


def _need(path: Path, step: str) -> None:
    """Refuse to go on without what an earlier step leaves."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; the step {step!r} makes it")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status."""
    parser = argparse.ArgumentParser(
        description="Make the default model from nothing. The same command goes on where it was."
    )
    parser.add_argument("work", type=Path, help="folder for everything, outside the repository")
    parser.add_argument("--stages", type=Path, help="the training's stages (default stages.toml)")
    parser.add_argument("--photographs", type=Path, help="folder: manifest.csv, images, masks")
    parser.add_argument("--composites", type=int, default=Choices.composites)
    parser.add_argument("--beside", action="append", help="other weights to evaluate, too")
    parser.add_argument("--machine", default="", help="what it was trained on, for the card")
    parser.add_argument("--control", action="store_true", help="train control.toml before")
    parser.add_argument("--tiny", action="store_true", help="two steps of training: does it run?")
    parser.add_argument("--only", action="append", default=[], help="do this step, even if done")
    given = parser.parse_args(arguments)
    choices = Choices(
        given.work,
        given.stages,
        given.photographs,
        given.composites,
        given.tiny,
        given.machine,
        Choices.beside if given.beside is None else tuple(given.beside),
        given.control or "control" in given.only,
    )
    try:
        run(choices, given.only)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (TinyViTError, ValueError, OSError, ImportError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
