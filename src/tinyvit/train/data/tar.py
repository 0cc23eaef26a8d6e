"""Labelled images in tar files, in the layout of WebDataset, read at random.

A sample is the members that share a name up to the first dot: ``000000.jpg`` and ``000000.cls``
(or ``000000.json``). The tar files are walked once, for an index of where each image's bytes lie;
it is kept in a file beside them, so that the next start takes no time. Reading an image afterwards
is one seek, in any order and in any process. Compressed tar files cannot be read so.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyvit.checkpoints.files import write_bytes
from tinyvit.errors import CheckpointError
from tinyvit.folders.images import IMAGE_SUFFIXES
from tinyvit.labels import read_labels

from .lists import ImageList, Labels, number_classes

INDEX = ".tinyvit-index.json.gz"
_VERSION = 2
_KEYS = ("label", "cls", "class", "target", "class_name")
_NAMES = ("classes.txt", "labels.txt", "classes.json", "labels.json")

logger = logging.getLogger("tinyvit")


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
    marks = [_VERSION, *([name, state.st_size, state.st_mtime_ns] for name, state in states)]
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
        beside = (shards[0].parent / name for name in _NAMES)
        file = next((path for path in beside if path.is_file()), None)
        classes = None if file is None else read_labels(file)
    labels, known = _labels(texts, classes, str(shards[0].parent))
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
        lost = [key for key in images if key not in labels]
        if lost:
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
                content = None
                if suffix in (".cls", ".json"):
                    file = tar.extractfile(member)
                    content = None if file is None else file.read()
                yield str(plain.parent / stem), suffix, member, content
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError) as err:
        raise ValueError(
            f"{str(path)!r} is cut short, damaged or compressed ({err}) after {count} members; "
            "copy or download it again, and unpack .gz first"
        ) from err


def _check_end(path: Path, offset: int) -> None:
    """A tar file ends with blocks of zeros; one without them was cut between two members.

    ``tarfile`` takes a header that is cut, too, for the end.
    """
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError("unexpected end of data")


def _label(content: bytes, suffix: str, name: str) -> str:
    try:
        text = content.decode("utf-8").strip()
        value: object = json.loads(text) if suffix == ".json" else text
    except ValueError as err:
        raise ValueError(f"the label {name!r} is no {suffix[1:]}: {err}") from err
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if key in value), None)
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value):
        return str(value)
    raise ValueError(
        f"the label {name!r} is {text[:60]!r}; wanted a number or a name, in .json under one of "
        f"{', '.join(_KEYS)}"
    )


def _labels(
    texts: Sequence[str], classes: Sequence[str] | None, origin: str
) -> tuple[Labels, tuple[str, ...]]:
    """Numbers of classes; labels that are numbers count positions among given classes."""
    if classes is None or not all(text.isdecimal() for text in texts) or set(texts) <= set(classes):
        return number_classes(texts, classes, origin)
    highest = max(int(text) for text in texts)
    if highest >= len(classes):
        raise ValueError(
            f"{origin} has the label {highest}, but there are {len(classes)} classes (0 to "
            f"{len(classes) - 1})"
        )
    return number_classes([classes[int(text)] for text in texts], classes, origin)


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
