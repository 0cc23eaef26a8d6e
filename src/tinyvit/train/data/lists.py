"""Labelled images in folders and in CSV files: names, numbers of classes, and where each image is.

A folder has one subfolder for each class; a CSV file has a path and a label in each line. Images
are listed here and never opened: what is wrong with one shows when it is read.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyvit.folders.images import IMAGE_SUFFIXES

Labels = NDArray[np.int64]

_PATHS = {"path", "file", "filename", "file_name", "image", "image_path", "picture"}
_LABELS = {"label", "class", "class_name", "target", "category"}
_SHOWN = 5


@dataclass(frozen=True)
class FileList:
    """Labelled images that are files."""

    root: Path  # the folder that ``names`` are relative to
    names: tuple[str, ...]  # path of each image, with slashes
    labels: Labels  # [N] int64, number of each image's class
    classes: tuple[str, ...]  # names of the classes, in the order of their numbers

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """What to call an image in messages."""
        return self.names[index]

    def source(self, index: int) -> Path | bytes:
        """Where an image is read from."""
        return self.root / self.names[index]


def read_folder(folder: str | os.PathLike[str], classes: Sequence[str] | None = None) -> FileList:
    """List a folder that has one subfolder for each class, sorted by class and name.

    The name of a subfolder is the class; images may lie at any depth in it. Hidden files and
    folders do not count. ``classes`` number a part that belongs to another one; by default those of
    the folder, sorted by name.

    Raises:
        ValueError: No such folder, no class folders, a class without images, or a class that is
            not in ``classes``.

    Warns:
        UserWarning: ``classes`` are given and some have no image here.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"there is no folder {str(root)!r}; check the path")
    there = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {name: sorted(_images(root, name)) for name in there}
    if not any(found.values()):
        raise ValueError(
            f"{str(root)!r} has no subfolders with images; wanted one subfolder for each class, "
            f"with images of {' '.join(IMAGE_SUFFIXES)}"
        )
    empty = [name for name in there if not found[name]]
    if empty:
        raise ValueError(
            f"{_these('class', empty, 'es')} in {str(root)!r} without an image; put images "
            "there or remove the folder"
        )
    names = [name for group in found.values() for name in group]
    texts = [label for label, group in found.items() for _ in group]
    labels, known = number_classes(texts, classes, str(root))
    return FileList(root, tuple(names), labels, known)


def _images(root: Path, name: str) -> Iterator[str]:
    """The images of one class, relative to the root."""
    for place, folders, files in os.walk(root / name):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        for file in files:
            if not file.startswith(".") and Path(file).suffix.lower() in IMAGE_SUFFIXES:
                yield (Path(place) / file).relative_to(root).as_posix()


def read_csv(
    path: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> tuple[FileList, tuple[str, ...] | None]:
    """List the images of a CSV file, and the text of each one's ``split`` column if there is one.

    A first line that names its columns (``path``, ``label`` and, if wanted, ``split``; a few usual
    other names are understood) is a header; without one the first two columns are the path and the
    label. Paths are relative to the file. Comma, semicolon and tab separate. ``classes`` number a
    part that belongs to another one; by default those of the file, as ``number_classes`` sorts.

    Raises:
        ValueError: The file cannot be read, has no rows, a row is too short, a label is empty or
            not in ``classes``, or images are not there.

    Warns:
        UserWarning: ``classes`` are given and some have no image here.
    """
    path = Path(path)
    rows = _rows(path)
    header = [cell.strip().lower() for cell in rows[0][1]]
    found = (_column(header, _PATHS), _column(header, _LABELS))
    part = _column(header, {"split"})
    if found[0] is not None and found[1] is not None:
        where, what = found[0], found[1]
        rows = rows[1:]
    else:
        where, what, part = 0, 1, None
    wanted = max(where, what, -1 if part is None else part) + 1
    for line, cells in rows:
        if len(cells) < wanted or not cells[where].strip() or not cells[what].strip():
            raise ValueError(
                f"line {line} of {str(path)!r} is {','.join(cells)!r}; wanted a path and a label"
            )
    names = tuple(cells[where].strip() for _, cells in rows)
    if not names:
        raise ValueError(f"{str(path)!r} has a header and no rows; wanted a path and a label each")
    lost = [name for name in names if not (path.parent / name).is_file()]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(names)} images of {str(path)!r} are not there: "
            f"{_some(lost)}; paths are relative to {str(path.parent)!r}"
        )
    labels, known = number_classes([cells[what].strip() for _, cells in rows], classes, str(path))
    parts = None if part is None else tuple(cells[part].strip() for _, cells in rows)
    return FileList(path.parent, names, labels, known), parts


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """(number of the line, cells) of each line that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            mark = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=mark)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise ValueError(f"the list {str(path)!r} cannot be read as CSV text: {err}") from err
    if not rows:
        raise ValueError(f"the list {str(path)!r} is empty; wanted a path and a label in each line")
    return rows


def _column(header: Sequence[str], names: set[str]) -> int | None:
    return next((number for number, cell in enumerate(header) if cell in names), None)


def number_classes(
    texts: Sequence[str], classes: Sequence[str] | None, origin: str
) -> tuple[Labels, tuple[str, ...]]:
    """Number the class of each image: [N] int64, and the names in the order of the numbers.

    The order is that of ``classes``, or else sorted (as numbers, if all are whole numbers).
    ``origin`` is what to call the data in messages.

    Raises:
        ValueError: A text is not in ``classes``.

    Warns:
        UserWarning: ``classes`` are given and some are not in ``texts``.

    Example:
        >>> number_classes(["cat", "ant", "cat"], None, "mine")
        (array([1, 0, 1]), ('ant', 'cat'))
    """
    distinct = set(texts)
    if classes is None:
        is_numbers = all(text.isdecimal() for text in distinct)
        known = tuple(sorted(distinct, key=lambda t: (int(t) if is_numbers else 0, t)))
    else:
        known = tuple(classes)
        unknown = sorted(distinct - set(known))
        if unknown:
            raise ValueError(
                f"{origin} has {len(unknown)} classes that the other part does not have: "
                f"{_some(unknown)}; both parts must have the same classes"
            )
        lacking = [name for name in known if name not in distinct]
        if lacking:
            warnings.warn(
                f"{_these('class', lacking, 'es')} without an image in {origin}", stacklevel=3
            )
    numbers = {name: number for number, name in enumerate(known)}
    return np.array([numbers[text] for text in texts], dtype=np.int64), known


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def _these(noun: str, names: Sequence[str], plural: str) -> str:
    return f"{len(names)} {noun}{plural if len(names) > 1 else ''} ({_some(names)})"
