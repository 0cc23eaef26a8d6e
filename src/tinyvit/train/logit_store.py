"""A teacher's answers, kept on the disk: sparse, in records of one size, safe against a kill.

TinyViT's fast pretraining distillation (Wu et al., ECCV 2022, arXiv 2207.10666) runs the teacher
once and keeps, for each view of each picture, its k largest probabilities and the seed of the
chance that made the view. Any student is then trained without the teacher.

A store is a folder. ``store.json`` says what the answers belong to. ``logits.bin`` holds one record
for each (view, picture), at byte (view * N + picture) * record size, little-endian:

    seed           uint64
    probabilities  k x float16, falling
    classes        k x uint16 (uint32 for more than 65536 classes)
    padding        zeros to the next multiple of 4 bytes
    checksum       uint32

That is 12 + 4k bytes for a view (6k above 65536 classes): 52 bytes at k = 10, so 300 views of each
of ImageNet's 1.28 million pictures are 20 GB and one view is 67 MB. The file has its full length
from the start (sparse where the disk can); a record counts once its checksum is right, so a kill in
the middle of a write costs the records that were being written, and nothing else.

No model and no picture is known here.

Letters: N pictures, V views, k classes that are kept, n records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyvit.checkpoints.files import replacing

__all__ = ["LogitStore", "StoreHeader", "StoreMismatchError"]

HEADER, RECORDS = "store.json", "logits.bin"
_VERSION = 1
_SALT = 0x7E1147F1  # so that a record of zeros is none
_SCANNED = 1 << 16  # records looked at together

Records = NDArray[np.void]


class StoreMismatchError(ValueError):
    """A store of answers that belongs to something else; the message names every difference."""


@dataclass(frozen=True)
class StoreHeader:
    """What answers belong to.

    Attributes:
        pictures: N.
        views: V, views of each picture.
        k: Probabilities that are kept of each view.
        classes: Names of the classes.
        data: Fingerprint of the list of pictures (``data_sets.fingerprint``).
        augmentation: The chance that views are made with, as plain data.
        teacher: The teacher's name, for people.
        teacher_sha256: Hash of the teacher's file or weights.
        teacher_input: How pictures are prepared for the teacher, as plain data.
        seed: Source of the views' seeds.
    """

    pictures: int
    views: int
    k: int
    classes: tuple[str, ...]
    data: str
    augmentation: Mapping[str, object]
    teacher: str
    teacher_sha256: str
    teacher_input: Mapping[str, object]
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A number is out of its range.
        """
        if self.pictures < 1 or self.views < 1:
            raise ValueError(
                f"a store wants pictures and views, got {self.pictures} and {self.views}"
            )
        if not 1 <= self.k <= len(self.classes):
            raise ValueError(
                f"k must be from 1 to the number of classes, {len(self.classes)}, got {self.k}"
            )

    @property
    def record(self) -> np.dtype[np.void]:
        """The layout of one record."""
        number = np.uint16 if len(self.classes) <= 1 << 16 else np.uint32
        size = 8 + self.k * (2 + np.dtype(number).itemsize)
        parts = [
            ("seed", "<u8"),
            ("probabilities", "<f2", (self.k,)),
            ("classes", np.dtype(number).newbyteorder("<"), (self.k,)),
            ("padding", "u1", (-size % 4,)),
            ("checksum", "<u4"),
        ]
        return np.dtype(parts)

    @property
    def bytes_per_picture(self) -> int:
        """Bytes of all views of one picture."""
        return int(self.record.itemsize) * self.views

    def differences(self, other: StoreHeader, *, but: tuple[str, ...] = ()) -> list[str]:
        """In which fields two headers differ, in words.

        Args:
            other: What is there.
            but: Fields that do not matter.
        """
        found = []
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if one.name not in but and _plain(mine) != _plain(theirs):
                found.append(f"{one.name} is {_short(theirs)} there and {_short(mine)} here")
        return found


@dataclass(frozen=True)
class LogitStore:
    """An open store; make one with ``create`` or ``open``.

    Attributes:
        folder: Where it is.
        header: What it belongs to.
    """

    folder: Path
    header: StoreHeader

    @classmethod
    def create(cls, folder: str | os.PathLike[str], header: StoreHeader) -> LogitStore:
        """Make a store, or go on with one that belongs to the same.

        Args:
            folder: Made if need be.
            header: What the answers will belong to.

        Returns:
            The store; ``missing`` says what is left to write.

        Raises:
            StoreMismatchError: A store of something else is in the folder; it is left as it is.
            ValueError: The store there is damaged.
            CheckpointError: The folder cannot be written.
        """
        folder = Path(folder)
        if (folder / HEADER).exists():
            store = cls.open(folder)
            differences = header.differences(store.header, but=("teacher",))
            if differences:
                raise StoreMismatchError(
                    f"{folder} holds answers that belong to something else: "
                    f"{'; '.join(differences)}. Choose another folder, or remove it"
                )
            return store
        folder.mkdir(parents=True, exist_ok=True)
        size = header.bytes_per_picture * header.pictures
        replacing(folder / RECORDS, lambda path: os.truncate(path, size))
        text = json.dumps({"version": _VERSION, **asdict(header)}, indent=1) + "\n"
        replacing(folder / HEADER, lambda path: _write_text(path, text))
        return cls(folder, header)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> LogitStore:
        """Open a store to read or to go on with.

        Raises:
            ValueError: There is none, it is damaged, or of another version.
        """
        folder = Path(folder)
        try:
            values = json.loads((folder / HEADER).read_text(encoding="utf-8"))
            version = values.pop("version")
            values["classes"] = tuple(values["classes"])
            header = StoreHeader(**values)
            size = (folder / RECORDS).stat().st_size
        except FileNotFoundError as err:
            raise ValueError(
                f"{folder} holds no store of answers ({err.filename} is missing); write one with "
                "tinyvit.train.distill_logits.write_logits"
            ) from err
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"{folder / HEADER} is damaged: {err}") from err
        if version != _VERSION:
            raise ValueError(f"{folder} is a store of version {version}; this reads {_VERSION}")
        wanted = header.bytes_per_picture * header.pictures
        if size != wanted:
            raise ValueError(
                f"{folder / RECORDS} has {size} bytes and should have {wanted}: it is cut short or "
                "of another store; copy it again, or write it anew"
            )
        return cls(folder, header)

    def check(self, **wanted: object) -> None:
        """Refuse answers that belong to something else.

        Args:
            wanted: Fields of ``StoreHeader`` and the values they must have.

        Raises:
            StoreMismatchError: Some have others; the message names each.
        """
        differences = [
            f"{name} is {_short(getattr(self.header, name))} there and {_short(value)} here"
            for name, value in wanted.items()
            if _plain(getattr(self.header, name)) != _plain(value)
        ]
        if differences:
            raise StoreMismatchError(
                f"the answers in {self.folder} belong to something else: {'; '.join(differences)}"
            )

    def missing(self, view: int) -> NDArray[np.int64]:
        """Pictures of a view without a good record, rising.

        Raises:
            ValueError: The store has no such view.
        """
        good = np.zeros(self.header.pictures, dtype=bool)
        for first in range(0, self.header.pictures, _SCANNED):
            count = min(_SCANNED, self.header.pictures - first)
            good[first : first + count] = _is_good(self._read(view, first, count))
        return np.flatnonzero(~good).astype(np.int64)

    def write(
        self,
        view: int,
        pictures: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        probabilities: NDArray[np.floating],
        classes: NDArray[np.integer],
    ) -> None:
        """Write records, and see that they are on the disk.

        Args:
            view: Of which view.
            pictures: [n] of which pictures.
            seeds: [n] uint64.
            probabilities: [n, k].
            classes: [n, k], distinct in a row.

        Raises:
            ValueError: The store has no such view or picture.
            OSError: The disk is full or cannot be written; records written before stay good.
        """
        records = np.zeros(len(pictures), dtype=self.header.record)
        records["seed"], records["probabilities"] = seeds, probabilities
        records["classes"] = classes
        records["checksum"] = _checksums(records)
        raw = records.tobytes()
        size = records.dtype.itemsize
        with (self.folder / RECORDS).open("r+b", buffering=0) as file:
            for number, picture in enumerate(pictures.tolist()):
                file.seek(self._place(view, picture))
                file.write(raw[number * size : (number + 1) * size])
            os.fsync(file.fileno())

    def read(
        self, view: int, picture: int
    ) -> tuple[int, NDArray[np.float32], NDArray[np.int64]] | None:
        """One record.

        Args:
            view: Of which view.
            picture: Of which picture.

        Returns:
            (seed, probabilities [k] float32, classes [k] int64); None where there is no good one.

        Raises:
            ValueError: The store has no such view or picture.
        """
        records = self._read(view, picture, 1)
        if not _is_good(records)[0]:
            return None
        record = records[0]
        return (
            int(record["seed"]),
            record["probabilities"].astype(np.float32),
            record["classes"].astype(np.int64),
        )

    def _read(self, view: int, first: int, count: int) -> Records:
        """Records of neighbouring pictures."""
        layout = self.header.record
        with (self.folder / RECORDS).open("rb", buffering=0) as file:
            file.seek(self._place(view, first))
            raw = file.read(count * layout.itemsize)
        return np.frombuffer(raw.ljust(count * layout.itemsize, b"\0"), dtype=layout)

    def _place(self, view: int, picture: int) -> int:
        header = self.header
        if not (0 <= view < header.views and 0 <= picture < header.pictures):
            raise ValueError(
                f"the store has views 0 to {header.views - 1} and pictures 0 to "
                f"{header.pictures - 1}, got view {view} and picture {picture}"
            )
        return (view * header.pictures + picture) * int(header.record.itemsize)


def _checksums(records: Records) -> NDArray[np.uint32]:
    """[n]: a sum of each record's words, each with an odd factor of its own, modulo 2**32.

    Any change of one word changes it, and so do nearly all others.
    """
    words = np.frombuffer(records.tobytes(), dtype="<u4").reshape(len(records), -1)[:, :-1]
    factors = (np.arange(words.shape[1], dtype=np.uint64) * 0x9E3779B2 + 1) & 0xFFFFFFFF | 1
    mixed = words.astype(np.uint64) * factors % (1 << 32)  # [n, words]
    sums: NDArray[np.uint64] = mixed.sum(axis=1, dtype=np.uint64)  # [n]
    found: NDArray[np.uint32] = ((sums + np.uint64(_SALT)) % np.uint64(1 << 32)).astype(np.uint32)
    return found


def _is_good(records: Records) -> NDArray[np.bool_]:
    good: NDArray[np.bool_] = records["checksum"] == _checksums(records)
    return good


def _plain(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=list)


def _short(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 4:
        return f"{len(value)} names from {value[0]!r} to {value[-1]!r}"
    text = repr(dict(value)) if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
