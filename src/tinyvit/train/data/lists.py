"""Lists of labelled images in folders, CSV files and tar files; where each image is.

Images are listed here and never opened: what is wrong with one shows when it is read. Tar files
have the layout of WebDataset: a sample is the members that share a name up to the first dot,
``000000.jpg`` and ``000000.cls`` (or ``000000.json``). They are walked once, for an index of where
each image's bytes lie, which is kept in a file beside them; reading an image afterwards is one
seek. Compressed tar files cannot be read so. At the end are readers of JSON, tables and names of
files as other tools write them.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import logging
import os
import tarfile
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from tinyvit.checkpoints.files import write_bytes
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.folders.images import IMAGE_SUFFIXES, walk_images
from tinyvit.labels import read_labels

Labels = NDArray[np.int64]

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "validate", "dev", "eval", "test", "testing")
PART_NAMES = (*TRAIN_NAMES, *VAL_NAMES, "unlabeled", "unlabelled", "extra")

_PATHS = ("path", "file", "filename", "file_name", "image", "image_path", "picture")
_LABELS = ("label", "class", "class_name", "target", "category")

INDEX = ".tinyvit-index.json.gz"
_INDEX_VERSION = 2
_LABEL_KEYS = ("label", "cls", "class", "target", "class_name")
_CLASS_FILES = ("classes.txt", "labels.txt", "classes.json", "labels.json")

SHOWN = 5  # names in a message

logger = logging.getLogger("tinyvit")


@dataclass(frozen=True)
class ImageList:
    """Labelled images that are files, or lie in tar files."""

    names: tuple[str, ...]  # of each image: its path, or shard/member
    labels: Labels  # [N] int64, number of each image's class
    classes: tuple[str, ...]  # names of the classes, in the order of their numbers
    roots: tuple[Path, ...]  # the folder that ``names`` are relative to; or the tar files
    # [3, N]: number of the tar file, byte at which the image begins, its bytes; None for files
    places: Labels | None = None
    parts: tuple[str, ...] | None = None  # what a table's column ``split`` says of each image

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """What to call an image in messages."""
        return self.names[index]

    def part(self, indices: Sequence[int] | Labels) -> ImageList:
        """Some of the images."""
        which = np.asarray(indices, np.int64)
        names = tuple(self.names[index] for index in which.tolist())
        places = None if self.places is None else self.places[:, which]
        return replace(self, names=names, labels=self.labels[which], places=places, parts=None)

    def identities(self) -> list[Hashable]:
        """What tells each image from all others, whatever names or links lead to it."""
        if self.places is None:
            return [identity(self.roots[0] / name) for name in self.names]
        shards = [identity(path) for path in self.roots]
        return [(shards[number], offset) for number, offset, _ in self.places.T.tolist()]

    def source(self, index: int) -> Path | bytes:
        """The file of an image, or its bytes; ImageError if its tar file is gone or shorter."""
        if self.places is None:
            return self.roots[0] / self.names[index]
        number, offset, size = self.places[:, index].tolist()
        path = self.roots[number]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data: bytes = file.read(size)
        except OSError as err:
            raise ImageError(f"{str(path)!r} cannot be read: {err}") from err
        if len(data) < size:
            raise ImageError(
                f"{self.names[index]!r} ends beyond its tar file, which has become shorter; "
                "copy or download it again"
            )
        return data


def read_folder(folder: str | os.PathLike[str], classes: Sequence[str] | None = None) -> ImageList:
    """List a folder that has one subfolder for each class, sorted by class and name.

    The name of a subfolder is the class; images may lie at any depth in it. Hidden files and
    folders do not count. ``classes`` number a part that belongs to another one; by default those of
    the folder, sorted by name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"there is no folder {str(root)!r}; check the path")
    there = visible_folders(root)
    parts = [name for name in there if name.lower() in PART_NAMES and visible_folders(root / name)]
    if parts:
        raise ValueError(
            f"{some(parts)} in {str(root)!r} are called like parts of a data set and hold folders, "
            "so they are no classes; give one of them, and another one to validate on (--val), or "
            "rename them"
        )
    found = {
        name: sorted(path.relative_to(root).as_posix() for path in walk_images(root / name))
        for name in there
    }
    if not any(found.values()):
        raise ValueError(
            f"{str(root)!r} has no subfolders with images; wanted one subfolder for each class, "
            f"with images of {' '.join(IMAGE_SUFFIXES)}"
        )
    if empty := [name for name in there if not found[name]]:
        raise ValueError(
            f"{_classes(empty)} in {str(root)!r} without an image; put images "
            "there or remove the folder"
        )
    names = [name for group in found.values() for name in group]
    texts = [label for label, group in found.items() for _ in group]
    labels, known = number_classes(texts, classes, str(root))
    return ImageList(tuple(names), labels, known, (root,))


def visible_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def read_csv(path: str | os.PathLike[str], classes: Sequence[str] | None = None) -> ImageList:
    """List the images of a CSV file.

    A first line that names its columns (``path``, ``label`` and, if wanted, ``split``; a few usual
    other names are understood) is a header; without one the first two columns are the path and the
    label. Paths are relative to the file. ``classes`` number a part that belongs to another one; by
    default those of the file, as ``number_classes`` sorts.
    """
    path = Path(path)
    rows = read_table(path)
    header = rows[0][1]
    where, what = find_column(header, _PATHS), find_column(header, _LABELS)
    part = find_column(header, ("split",))
    if where is not None and what is not None:
        rows = rows[1:]
    else:
        where, what, part = 0, 1, None
    wanted = max(where, what, -1 if part is None else part) + 1
    for line, cells in rows:
        if len(cells) < wanted or not cells[where] or not cells[what]:
            raise ValueError(
                f"line {line} of {str(path)!r} is {','.join(cells)!r}; wanted a path and a label"
            )
    if not rows:
        raise ValueError(f"{str(path)!r} has a header and no rows; wanted a path and a label each")
    files = [(cells[where], find_file(cells[where], [path.parent])) for _, cells in rows]
    if lost := [name for name, file in files if file is None]:
        raise ValueError(
            f"{len(lost)} of {len(rows)} images of {str(path)!r} are not there: "
            f"{some(lost)}; paths are relative to {str(path.parent)!r}"
        )
    names = tuple(
        name if file == path.parent / name else os.path.relpath(file, path.parent)
        for name, file in files
        if file is not None
    )
    labels, known = number_classes([cells[what] for _, cells in rows], classes, str(path))
    parts = None if part is None else tuple(cells[part] for _, cells in rows)
    return ImageList(names, labels, known, (path.parent,), parts=parts)


def number_classes(
    texts: Sequence[str], classes: Sequence[str] | None, origin: str
) -> tuple[Labels, tuple[str, ...]]:
    """Number the class of each image: [N] int64, and the names in the order of the numbers.

    The order is that of ``classes``, or else sorted (as numbers, if all are whole numbers).
    ``origin`` is what to call the data in messages.
    """
    distinct = set(texts)
    if classes is None:
        is_numbers = all(text.isdecimal() for text in distinct)
        known = tuple(sorted(distinct, key=lambda t: (int(t) if is_numbers else 0, t)))
    else:
        known = tuple(classes)
        if unknown := sorted(distinct - set(known)):
            raise ValueError(
                f"{origin} has {len(unknown)} classes that the other part does not have: "
                f"{some(unknown)}; both parts must have the same classes"
            )
        if lacking := [name for name in known if name not in distinct]:
            warnings.warn(f"{_classes(lacking)} without an image in {origin}", stacklevel=3)
    numbers = {name: number for number, name in enumerate(known)}
    return np.array([numbers[text] for text in texts], dtype=np.int64), known


def _classes(names: Sequence[str]) -> str:
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({some(names)})"


# -- tar files -----------------------------------------------------------------------------------


def find_shards(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The tar files of a path, a folder, or a pattern such as ``train-*.tar``; maybe none."""
    here = Path(path)
    if here.is_dir():
        return tuple(sorted(p for p in here.glob("*.tar") if not p.name.startswith(".")))
    if here.suffix == ".tar" and here.is_file():
        return (here,)
    return tuple(sorted(Path(p) for p in glob.glob(os.fspath(path)) if p.endswith(".tar")))


def read_shards(shards: Sequence[Path], classes: Sequence[str] | None = None) -> ImageList:
    """Index tar files, in their order.

    Names of classes come from ``classes``, or else from a file ``classes.txt`` (or ``labels.txt``,
    ``.json``) beside the tar files, or else from the labels themselves; labels that are numbers
    count positions in the first two. The index is kept beside the first tar file if that place can
    be written, and one that fits is used.
    """
    if not shards:
        raise ValueError("wanted at least one tar file, got none")
    states = ((path.name, path.stat()) for path in shards)
    marks = [_INDEX_VERSION, *([name, state.st_size, state.st_mtime_ns] for name, state in states)]
    place = shards[0].parent / INDEX
    found = _read_index(place, marks)
    if found is None:
        found = _index(shards)
        data = json.dumps([marks, found[0], found[1].tolist(), found[2]]).encode()
        try:
            write_bytes(place, gzip.compress(data, 1))
        except CheckpointError as err:
            logger.info("the index of the tar files stays in memory: %s", err)
    names, places, texts = found
    if classes is None:
        beside = (shards[0].parent / name for name in _CLASS_FILES)
        file = next((path for path in beside if path.is_file()), None)
        classes = None if file is None else read_labels(file)
    origin = str(shards[0].parent)
    if classes and not set(texts) <= set(classes) and all(text.isdecimal() for text in texts):
        highest = max(map(int, texts))  # they count positions among the given classes
        if highest >= len(classes):
            raise ValueError(
                f"{origin} has the label {highest}, but there are {len(classes)} classes (0 to "
                f"{len(classes) - 1})"
            )
        texts = [classes[int(text)] for text in texts]
    labels, known = number_classes(texts, classes, origin)
    return ImageList(tuple(names), labels, known, tuple(shards), places)


_Index = tuple[list[str], NDArray[np.int64], list[str]]
"""Names, [3, N] of (shard, offset, size), and labels as they stand in the files."""


def _index(shards: Sequence[Path]) -> _Index:
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    texts: list[str] = []
    for number, path in enumerate(shards):
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, str] = {}
        for key, suffix, member, content in _members(path):
            if suffix in IMAGE_SUFFIXES:
                images[key] = (member.name, member.offset_data, member.size)
            elif content is not None and (suffix == ".cls" or key not in labels):
                labels[key] = _label(content, suffix, f"{path.name}/{member.name}")
        if lost := [key for key in images if key not in labels]:
            raise ValueError(
                f"{len(lost)} images of {str(path)!r} have no label, the first is {lost[0]!r}; "
                f"wanted {lost[0]}.cls or {lost[0]}.json beside it"
            )
        for key, (name, offset, size) in images.items():
            names.append(f"{path.name}/{name}")
            places.append((number, offset, size))
            texts.append(labels[key])
    if not names:
        raise ValueError(
            f"there are no images in {len(shards)} tar files, the first is {str(shards[0])!r}; "
            "wanted members such as 000000.jpg and 000000.cls"
        )
    return names, np.array(places, dtype=np.int64).T, texts


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes | None]]:
    """(name up to the first dot, suffix, member, its bytes where it may hold a label)."""
    count = 0
    try:
        with tarfile.open(path, "r:") as tar:
            end = path.stat().st_size
            for member in tar:
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                count += 1
                plain = PurePosixPath(member.name)
                if not member.isfile() or plain.name.startswith("."):
                    continue
                stem, _, rest = plain.name.partition(".")
                suffix = f".{rest.lower()}"
                file = tar.extractfile(member) if suffix in (".cls", ".json") else None
                content = None if file is None else file.read()
                yield str(plain.parent / stem), suffix, member, content
            # it ends with blocks of zeros; ``tarfile`` takes a header that is cut for the end, too
            with path.open("rb") as raw:
                raw.seek(tar.offset)
                block = raw.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE or any(block):
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError) as err:
        raise ValueError(
            f"{str(path)!r} is cut short, damaged or compressed ({err}) after {count} members; "
            "copy or download it again, and unpack .gz first"
        ) from err


def _label(content: bytes, suffix: str, name: str) -> str:
    try:
        text = content.decode("utf-8").strip()
        value: object = json.loads(text) if suffix == ".json" else text
    except ValueError as err:
        raise ValueError(f"the label {name!r} is no {suffix[1:]}: {err}") from err
    if isinstance(value, dict):
        value = next((value[key] for key in _LABEL_KEYS if key in value), None)
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value):
        return str(value)
    raise ValueError(
        f"the label {name!r} is {text[:60]!r}; wanted a number or a name, in .json under one of "
        f"{', '.join(_LABEL_KEYS)}"
    )


def _read_index(place: Path, marks: list[Any]) -> _Index | None:
    """The index that is kept, if the tar files are still those that were indexed."""
    try:
        before, names, places, texts = json.loads(gzip.decompress(place.read_bytes()))
        return (names, np.array(places, np.int64), texts) if before == marks else None
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, EOFError, zlib.error) as err:
        logger.warning("%s is damaged (%s) and is rebuilt", place, err)
        return None


# -- files of other tools ------------------------------------------------------------------------


def load_json(path: Path) -> Any:
    """The content of a JSON file, in UTF-8, 16 or 32, with a byte order mark or without."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"{path} cannot be read as JSON: {err}") from err


def read_table(path: Path) -> list[tuple[int, list[str]]]:
    """(number of the line, stripped cells) of each line that is not empty, of at least one.

    Comma, semicolon or tab separate: what the first line has most of, Excel's ``sep=;`` too.
    """
    try:
        data = path.read_bytes()
        is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
        first = text.partition("\n")[0]
        mark = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        lines = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
        rows = [(number, cells) for number, cells in lines if any(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise ValueError(f"the list {str(path)!r} cannot be read as CSV text: {err}") from err
    rows = rows[1:] if first.lower().startswith("sep=") else rows
    if not rows:
        raise ValueError(f"the list {str(path)!r} is empty; wanted names of files in each line")
    return rows


def find_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    """The place of the first of these names in a header, in any case."""
    found = [cell.lower() for cell in header]
    return next((found.index(name) for name in names if name in found), None)


def find_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of this name in one of the folders, or that of the longest end of the name there."""
    straight = name.replace("\\", "/").rpartition("?d=")[2]  # Label Studio: local-files/?d=...
    names = [name, straight, unquote(straight)]
    parts = PurePosixPath(straight).parts
    names += ["/".join(parts[n:]) for n in range(1, len(parts)) if parts[n] != ".."]
    places = (folder / one for one in names for folder in folders)
    return next((place for place in places if os.path.isfile(place)), None)


def identity(path: Path) -> Hashable:
    """What tells a file from all others, whatever name or link leads to it."""
    try:
        found = path.stat()
    except OSError:
        return str(path)
    return (found.st_dev, found.st_ino) if found.st_ino else str(path.resolve())


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


def inner_folder(
    path: Path, names: Sequence[str], is_wanted: Callable[[Path], object] = Path.is_dir
) -> Path | None:
    """The first wanted folder in a folder that has one of these names, in any case."""
    there = {name.lower(): path / name for name in visible_folders(path)} if path.is_dir() else {}
    return next((there[name] for name in names if name in there and is_wanted(there[name])), None)
