"""The tables that tell what the images of the recipe are: rows, reading, writing, splits.

A table is a CSV file with one header line. Here are the two kinds of rows, and the rule that puts
a group of images into train, val or test.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from PIL import Image

from tinyvit.checkpoints.files import write_text

SPLITS = ("train", "val", "test")
SELECTION = Path(__file__).resolve().parent / "selection"


@dataclasses.dataclass(frozen=True)
class Row:
    """An object cut out of its image.

    Attributes:
        file: The PNG, RGBA, relative to the folder of the table.
        kind: ``photo``, ``emoji``, ``clipart`` or ``cg``.
        label: What it shows, in words.
        category: A coarse word for it.
        width: Pixels.
        height: Pixels.
        fill: Share of the pixels whose alpha is above 127, 0..1.
        group: What shares the object: mirrors, poses, views. A group is never split.
        split: ``train``, ``val`` or ``test``.
        package: Name and version of the package it comes from.
        source: The file in the package.
        license: Under which licence it stands there.
    """

    file: str
    kind: str
    label: str
    category: str
    width: int
    height: int
    fill: float
    group: str
    split: str
    package: str
    source: str
    license: str


@dataclasses.dataclass(frozen=True)
class Background:
    """A background photo.

    Attributes:
        file: The JPEG, relative to the folder of the table.
        width: Pixels.
        height: Pixels.
        package: Name and version of the package it comes from.
        source: The file in the package.
        license: Under which licence it stands there.
        split: ``train``, ``val`` or ``test``.
    """

    file: str
    width: int
    height: int
    package: str
    source: str
    license: str
    split: str


AnyRow = TypeVar("AnyRow", Row, Background)


def read_rows(path: Path, kind: type[AnyRow]) -> list[AnyRow]:
    """Read a table."""
    wanted = [field.name for field in dataclasses.fields(kind)]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != wanted:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}, wanted {wanted}; remove the file "
                "and build it again"
            )
        return [_read_row(path, reader.line_num, values, kind) for values in reader]


def _read_row(path: Path, line: int, values: dict[str, str], kind: type[AnyRow]) -> AnyRow:
    """One line with its numbers as numbers."""
    numbers = {"width": int, "height": int, "fill": float}
    if None in values or None in values.values():
        raise ValueError(f"{path}, line {line} has more or fewer fields than columns")
    try:
        return kind(**{name: numbers.get(name, str)(text) for name, text in values.items()})
    except ValueError as err:
        raise ValueError(f"{path}, line {line}: {err}") from err


def write_rows(path: Path, rows: Iterable[AnyRow], kind: type[AnyRow]) -> None:
    """Write a table atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(kind)])
    writer.writerows(dataclasses.astuple(row) for row in rows)
    write_text(path, lines.getvalue())


def is_done(path: Path, kind: type[AnyRow]) -> bool:
    """Whether a table is there and so is every image that it names."""
    if not path.is_file():
        return False
    rows = read_rows(path, kind)
    return all((path.parent / row.file).is_file() for row in rows)


def split_of(group: str) -> str:
    """Put a group into a split: 85 % train, 5 % val, 10 % test.

    The choice hangs on the group's name alone, so that an image added later moves no other.
    """
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") / 2**32
    if share < 0.85:
        return "train"
    return "val" if share < 0.9 else "test"


def read_selection(name: str) -> list[dict[str, str]]:
    """The rows of ``selection/NAME.csv``, a list chosen by eye."""
    with (SELECTION / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_whole(image: Image.Image, path: Path, **options: int | bool) -> None:
    """Write an image atomically; the suffix says in which format, ``options`` go to its writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    image.save(temporary, None, **options)
    os.replace(temporary, path)
