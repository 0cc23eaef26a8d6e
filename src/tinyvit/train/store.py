"""What a teacher said about images, kept in a folder: feature maps or logits, computed once.

    manifest.json             the format and the facts: which teacher, which preparation, ...
    shard-00000.safetensors   some rows: arrays [n, ...], and in the header which rows they are

A shard is there whole or not at all and says by itself what it holds. Rows of features are named by
the image's path and hold ``features`` [C, h, w] float16 (2 * C * h * w bytes: 2 MB for SAM's 256 x
64 x 64), with flips also ``flipped``, those of the mirrored image. Rows of logits are named by the
image's number and hold ``seed`` [V], ``probabilities`` [V, k] and ``classes`` [V, k] of V views.
Folders of the first versions (features of format 1, logits of version 1) are read, never written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tinyvit import __version__
from tinyvit.checkpoints.files import check_format, make_folder, replacing, write_text
from tinyvit.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2
_HEADER = "tinyvit.store"
_FOR_PEOPLE = "teacher"  # the one fact that may differ: a name


class StoreMismatchError(CheckpointError):
    """A store that belongs to something else; the message names every difference."""


@dataclass(frozen=True)
class Row:
    """One row to be stored."""

    name: str  # what it is about
    # by key, of equal shapes and types in all rows; none where there is a ``reason``
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    info: Mapping[str, object] = field(default_factory=dict)  # plain data to keep beside it
    reason: str = ""  # why it could not be computed, or ""


class Entry(NamedTuple):
    """Where a row is: number of the shard and of the row in it, -1 for one with a ``reason``."""

    shard: int
    row: int
    info: Mapping[str, Any]
    reason: str


def image_state(path: Path) -> dict[str, int]:
    """Size in bytes and time of the last change in nanoseconds; -1 if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return {"bytes": -1, "changed": -1}
    return {"bytes": found.st_size, "changed": found.st_mtime_ns}


class Store:
    """Rows of arrays by name; opens what is there, and takes more.

    ``facts`` are what all rows have in common, as plain data; given, they must agree with those of
    a store that exists, the teacher's name apart, and make one that does not. Without them a store
    that exists is opened. A ``StoreMismatchError`` leaves what is there as it is.
    """

    def __init__(
        self, folder: str | os.PathLike[str], facts: Mapping[str, object] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}  # all met so far, by name; also what has no arrays
        self.shapes: dict[str, tuple[int, ...]] = {}  # of a row's arrays; empty before the first
        self.damaged: list[str] = []  # shards that cannot be used; their rows count as missing
        self._next = 0
        self._open: dict[int, Any] = {}
        is_old = (self.folder / _OldLogits.HEADER).is_file()
        self._old_logits = _OldLogits(self.folder) if is_old else None
        self._set_facts(facts)
        if self._old_logits is not None:
            self.entries = self._old_logits.entries
            return
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._take_up(path)

    def __getstate__(self) -> dict[str, object]:
        """Open files stay behind."""
        return {**self.__dict__, "_open": {}}

    @property
    def good(self) -> list[str]:
        """Names of the rows that have arrays, sorted."""
        return sorted(name for name, entry in self.entries.items() if entry.row >= 0)

    @property
    def unreadable(self) -> dict[str, str]:
        """Reason by name of each row that could not be computed."""
        return {name: entry.reason for name, entry in self.entries.items() if entry.row < 0}

    def missing(self, names: Iterable[str], root: Path | None = None) -> list[str]:
        """The names of which nothing is stored; with ``root``, also of files changed since."""
        return [
            name
            for name in names
            if (entry := self.entries.get(name)) is None
            or (root is not None and not image_state(root / name).items() <= entry.info.items())
        ]

    def add(self, rows: Sequence[Row]) -> None:
        """Write a shard; rows of names that are there replace them."""
        rows = sorted(rows, key=lambda row: bool(row.reason))  # those with arrays come first
        good = [row for row in rows if not row.reason]
        for row in good:
            shapes = {key: tuple(array.shape) for key, array in row.arrays.items()}
            self.shapes = self.shapes or shapes
            if shapes != self.shapes:
                raise ValueError(
                    f"all rows of a store have one shape, here {self.shapes}; {row.name!r} has "
                    f"{shapes}. Prepare images with padding, so that all have one size"
                )
        arrays = {key: np.stack([row.arrays[key] for row in good]) for key in self.shapes if good}
        index = [{"name": row.name, "reason": row.reason, **row.info} for row in rows]
        header = json.dumps({"format": FORMAT, "facts": self.facts, "rows": index})
        path = self._path(self._next)
        replacing(path, lambda temporary: save_file(arrays, temporary, {_HEADER: header}))
        self._take_up(path)

    def read(self, name: str, key: str) -> NDArray[Any]:
        """An array of a row."""
        entry = self.entries[name]
        if entry.row < 0:
            raise KeyError(f"{name} could not be read when it was stored: {entry.reason}")
        if self._old_logits is not None:
            return self._old_logits.read(entry.row, key)
        if key not in self.shapes:
            raise ValueError(f"this store has no {key!r}, only {', '.join(sorted(self.shapes))}")
        path = self._path(entry.shard)
        try:
            if entry.shard not in self._open:
                self._open[entry.shard] = safe_open(path, framework="np")
            kept = self._open[entry.shard].get_slice(key)
            return np.asarray(kept[entry.row : entry.row + 1][0])
        except (OSError, SafetensorError) as err:
            raise CheckpointError(
                f"{path} cannot be read ({err!s}); remove it and store again"
            ) from err

    def check(self, **wanted: object) -> None:
        """Refuse a store whose facts have other values; the message names each."""
        differences = [
            f"{key} is {_short(self.facts.get(key))} there and {_short(value)} here"
            for key, value in wanted.items()
            if _text(self.facts.get(key)) != _text(value)
        ]
        if differences:
            raise StoreMismatchError(
                f"{self.folder} belongs to something else: {'; '.join(differences)}; choose "
                "another folder"
            )

    def _set_facts(self, wanted: Mapping[str, object] | None) -> None:
        """Set the facts, which must agree with those wanted; a new store if need be."""
        self.facts: dict[str, Any]
        path = self.folder / MANIFEST
        if self._old_logits is not None:
            self.facts, found = self._old_logits.facts, 1
        elif path.is_file():
            try:
                self.facts = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, TypeError, ValueError) as err:
                raise CheckpointError(f"{path} is no manifest of a store: {err!s}") from err
            writer = self.facts.pop("writer", None)
            found = check_format(self.facts.pop("format", None), FORMAT, writer, str(path))
        elif wanted is None:
            raise CheckpointError(
                f"{self.folder} holds no store: there is no {MANIFEST}; write one with 'tinyvit "
                "train store-features' or 'tinyvit train write-logits'"
            )
        else:
            make_folder(self.folder)
            self.facts, found = json.loads(json.dumps(wanted, default=list)), FORMAT
            content = {"format": FORMAT, "writer": __version__, **self.facts}
            write_text(path, json.dumps(content, indent=1) + "\n")
        if wanted is not None:
            self.check(**{key: value for key, value in wanted.items() if key != _FOR_PEOPLE})
            if found < FORMAT:
                raise CheckpointError(
                    f"{self.folder} is of format {found}, which is read but no longer written; "
                    "choose another folder"
                )

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _take_up(self, path: Path) -> None:
        """Take up what a shard holds; a damaged one is named and its rows count as missing."""
        number = int(path.stem.partition("-")[2])
        self._next = max(self._next, number + 1)
        try:
            with safe_open(path, framework="np") as file:
                facts, rows = _read_index(file.metadata() or {})
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
            good = sum(not row["reason"] for row in rows)
            if facts != self.facts or any(shape[0] != good for shape in shapes.values()):
                raise ValueError("a shard of another store, put here by hand")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            self.damaged.append(path.name)
            return
        if good:
            self.shapes = {key: shape[1:] for key, shape in shapes.items()}
        place = 0
        for row in rows:
            name, reason = row.pop("name"), row.pop("reason")
            self.entries[name] = Entry(number, -1 if reason else place, row, reason)
            place += not reason


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=list)


def _short(value: object) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"{len(value)} names from {value[0]!r} to {value[-1]!r}"
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _read_index(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts, rows) of a shard's header, of this format or of format 1 of features."""
    if _HEADER in metadata:
        content = json.loads(metadata[_HEADER])
        return content["facts"], content["rows"]
    content = json.loads(metadata["tinyvit.features"])
    facts = {key: value for key, value in content["facts"].items() if key != "format"}
    for row in content["pictures"]:
        del row["shard"], row["row"]
    return facts, content["pictures"]


class _OldLogits:
    """Logits of version 1: one file of records [V, N], each with a checksum of its own."""

    HEADER = "store.json"

    def __init__(self, folder: Path) -> None:
        try:
            values = json.loads((folder / self.HEADER).read_text(encoding="utf-8"))
            count, views, k = values.pop("pictures"), values["views"], values["k"]
            if values.pop("version") != 1:
                raise ValueError("wanted version 1")
            number = "<u2" if len(values["classes"]) <= 1 << 16 else "<u4"
            size = 8 + k * (2 + np.dtype(number).itemsize)
            self.record = np.dtype(
                [("seed", "<u8"), ("probabilities", "<f2", (k,)), ("classes", number, (k,)),
                 ("padding", "u1", (-size % 4,)), ("checksum", "<u4")]
            )  # fmt: skip
            self.path = folder / "logits.bin"
            self.shape = views, count
            self.good = np.stack([_is_good(view) for view in self._records()])  # [V, N]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            raise CheckpointError(f"{folder} holds no good store of logits: {err}") from err
        self.facts = {"images": count, **values}
        known = np.flatnonzero(self.good.any(axis=0)).tolist()
        self.entries = {str(image): Entry(0, image, {}, "") for image in known}

    def _records(self) -> NDArray[Any]:
        return np.memmap(self.path, self.record, mode="r", shape=self.shape)

    def read(self, image: int, key: str) -> NDArray[Any]:
        """Of the views that are good, [V, ...]."""
        return np.array(self._records()[self.good[:, image], image][key])


def _is_good(records: NDArray[Any]) -> NDArray[np.bool_]:
    """Which records have their checksum: a sum of their words, each with an odd factor."""
    words = np.frombuffer(records.tobytes(), dtype="<u4").reshape(len(records), -1)[:, :-1]
    factors = (np.arange(words.shape[1], dtype=np.uint64) * 0x9E3779B2 + 1) & 0xFFFFFFFF | 1
    sums = (words.astype(np.uint64) * factors % (1 << 32)).sum(axis=1, dtype=np.uint64)
    return np.asarray(records["checksum"] == (sums + np.uint64(0x7E1147F1)) % (1 << 32))
