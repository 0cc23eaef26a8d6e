"""Views of Sweet Home 3D's models -> cut-outs with alpha and their table.

    python recipes/default_model/render.py WORK [--views 6]

Reads the package in WORK/packages. Writes WORK/objects/render/*.png, WORK/objects/render.csv, and
one small file of notes per model, from which an interrupted run goes on: a view that is done is
not made again, and more views of a model leave its first ones as they are. Randomness is seeded by
the names of the models. ``models.csv`` says which models are used, which split each is in, and who
made it.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from archives import read_members
from manifest import Row, write_rows, write_whole
from meshes import Mesh, Model, read_library
from raytrace import View, render
from tinyvit.checkpoints.files import write_text

PACKAGE = "sweethome3d-furniture 1.8-1"
PACKAGE_FILE = "sweethome3d-furniture_1.8-1_all.deb"
LICENSES = {
    "BlendSwap-CC-0": "CC0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}
LEAST_FILL = 0.12  # of its box; thinner things make masks of nothing but edge
LEAST_SIDE = 32  # pixels; below, a thing is seen from its edge
ATTEMPTS = 4  # how often a view is drawn again before it is given up
EDITION = 1  # raise it when images come out differently: old ones are then made again
MODELS = Path(__file__).with_name("models.csv")


@dataclasses.dataclass(frozen=True)
class Notes:
    """What is done of one model.

    Attributes:
        views: How many views have been asked for and tried.
        rows: Those that came out.
        left_out: Why others did not.
    """

    views: int
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]


def build(
    work: Path, views: int = 6, *, table: Path = MODELS, say: Callable[[str], None] = print
) -> Path:
    """Render all models of the table."""
    package = work / "packages" / PACKAGE_FILE
    if not package.is_file():
        raise FileNotFoundError(f"there is no {package}; run fetch.py on the same folder first")
    with table.open(newline="", encoding="utf-8") as file:
        splits = {(row["library"], row["model"]): row["split"] for row in csv.DictReader(file)}
    folder = work / "objects" / "render"
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[tuple[str, str], Notes] = {}
    for name in splits:
        notes = _read_notes(_notes_file(folder, *name))
        if notes is not None:
            done[name] = notes
    started = time.monotonic()
    wanted = {name for name in splits if name not in done or done[name].views < views}
    for made, (model, read) in enumerate(_models(package, wanted), start=1):
        name = (model.library, model.name)
        try:
            done[name] = render_model(model, read, splits[name], folder, views)
        except ValueError as err:  # a model that cannot be read is reported, and the rest goes on
            done[name] = Notes(views, (), (str(err),))
            _write_notes(_notes_file(folder, *name), done[name])
        if made % 25 == 0:
            pace = (time.monotonic() - started) / made
            say(f"{made} of {len(wanted)} models, {pace:.1f} s each")
            _write_table(folder, done, splits)
    missing = sorted(splits.keys() - done.keys())
    if missing:
        raise ValueError(f"{package} lacks {len(missing)} models of {table}, first {missing[0]}")
    for notes in done.values():
        for reason in notes.left_out:
            say(f"left out: {reason}")
    path = _write_table(folder, done, splits)
    say(f"{sum(len(notes.rows) for notes in done.values())} views of {len(done)} models: {path}")
    return path


def _models(
    package: Path, wanted: set[tuple[str, str]]
) -> Iterator[tuple[Model, Callable[[Model], Mesh]]]:
    """The wanted models of a package, library by library; nothing is read if none is wanted."""
    libraries = {library for library, _ in wanted}
    if not libraries:
        return
    for member, data in read_members(
        package, lambda name: name.endswith(".sh3f") and Path(name).stem in libraries
    ):
        models, read = read_library(Path(member).stem, data)
        for model in models:
            if (model.library, model.name) in wanted:
                yield model, read


def render_model(
    model: Model, read: Callable[[Model], Mesh], split: str, folder: Path, views: int
) -> Notes:
    """Make the views of a model that are not there yet, and note what is done."""
    path = _notes_file(folder, model.library, model.name)
    notes = _read_notes(path) or Notes(0, (), ())
    rows, left_out = list(notes.rows), list(notes.left_out)
    mesh = read(model)
    for number in range(notes.views, views):
        image, reason = _take(mesh, f"{model.library}/{model.name}", number)
        if image is None:
            left_out.append(f"{model.library}/{model.name}, view {number}: {reason}")
            continue
        file = folder / f"{model.library}__{model.name}_{number}.png"
        write_whole(Image.fromarray(image), file)
        rows.append(_row(model, split, f"{folder.name}/{file.name}", image))
    notes = Notes(max(views, notes.views), tuple(rows), tuple(left_out))
    _write_notes(path, notes)
    return notes


def _take(mesh: Mesh, name: str, number: int) -> tuple[NDArray[np.uint8] | None, str]:
    """An image of a view that shows enough, or None and why there is none."""
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            image = render(mesh, draw_view(name, number, attempt))
        except ValueError as err:  # from this side there is nothing to see
            reason = str(err)
            continue
        fill, side = float((image[..., 3] > 127).mean()), min(image.shape[:2])
        if fill >= LEAST_FILL and side >= LEAST_SIDE:
            return image, ""
        reason = f"fill {fill:.3f}, shorter side {side}"
    return None, reason


def draw_view(name: str, number: int, attempt: int = 0) -> View:
    """Draw a random view that depends on the arguments alone.

    The views of a model stand around it evenly, however many they are: each is a golden angle
    further than the one before it.
    """
    common, own = _generator(name), _generator(f"{name}#{number}#{attempt}")
    azimuth = common.uniform(0, 360) + 137.5 * number + own.uniform(-20, 20) + 50 * attempt
    height = (common.uniform() + 0.618 * number + 0.37 * attempt + own.uniform(-0.05, 0.05)) % 1
    warmth = own.uniform(-0.12, 0.12)
    return View(
        azimuth=azimuth % 360,
        elevation=5 + 40 * height,
        roll=own.normal(0, 2.5),
        field=own.uniform(18, 42),
        lamp_azimuth=azimuth + own.uniform(-80, 80),
        lamp_elevation=own.uniform(20, 75),
        lamp_share=own.uniform(0.25, 0.75),
        lamp_width=own.uniform(1, 8),
        lamp_colour=(1 + warmth, 1.0, 1 - warmth),
        exposure=own.uniform(0.65, 1.15),
    )


def _generator(name: str) -> np.random.Generator:
    """Random numbers that belong to a name."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def _row(model: Model, split: str, file: str, image: NDArray[np.uint8]) -> Row:
    """The table's line of an image."""
    return Row(
        file=file,
        kind="cg",
        label=model.name,
        category=model.library,
        width=image.shape[1],
        height=image.shape[0],
        fill=round(float((image[..., 3] > 127).mean()), 3),
        group=f"sh:{model.library}/{model.name}",
        split=split,
        package=PACKAGE,
        source=f"{model.library}.sh3f/{model.name}",
        license=LICENSES[model.library],
    )


def _write_table(
    folder: Path, done: dict[tuple[str, str], Notes], splits: dict[tuple[str, str], str]
) -> Path:
    """Write the table of all views there are so far beside their folder."""
    path = folder.with_suffix(".csv")
    rows = [(row, splits[name]) for name in sorted(done) for row in done[name].rows]
    write_rows(path, (dataclasses.replace(row, split=split) for row, split in rows), Row)
    return path


def _notes_file(folder: Path, library: str, model: str) -> Path:
    """Where the notes on a model are."""
    return folder / "notes" / f"{library}__{model}.json"


def _read_notes(path: Path) -> Notes | None:
    """Notes of this edition whose images are all there; None if there are none."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(Row(**row) for row in values["rows"])
    is_whole = all((path.parents[2] / row.file).is_file() for row in rows)
    if values["edition"] != EDITION or not is_whole:
        return None
    return Notes(values["views"], rows, tuple(values["left_out"]))


def _write_notes(path: Path, notes: Notes) -> None:
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"edition": EDITION, **dataclasses.asdict(notes)}, indent=1)
    write_text(path, text + "\n")
