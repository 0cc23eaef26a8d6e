"""A folder of a teacher's feature maps: computed once, read by every epoch, resumable.

    manifest.json             whose features these are and how images were prepared
    shard-00000.safetensors   features [n, C, h, w] fp16, with the images' names in its header

A shard is there whole or not at all, and says by itself which images it holds: their names, sizes
in bytes, times of change, sizes in pixels; and which images could not be read, with the reason.
So a job that was killed goes on where it stopped, and an image that has changed since is computed
anew (its old row stays unused). With ``flips`` there is a second tensor, ``flipped``: the features
of the mirrored images. An image takes 2 * C * h * w bytes, twice that with flips: 2 MB for SAM's
256 x 64 x 64, 128 kB for 256 x 16 x 16.

Which teacher it was is not known here; ``teachers.py`` knows. Letters: n images of a shard, C
channels, h w the map's grid.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyvit.checkpoints.files import replacing, write_state_dict, write_text
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec

MANIFEST = "manifest.json"
_HEADER = "tinyvit.features"
_FORMAT = 1


@dataclass(frozen=True)
class StoreFacts:
    """What all features of a store have in common.

    Attributes:
        teacher: Its name, for people.
        teacher_sha256: Hash of its weights.
        image_spec: How images were prepared for it.
        flips: Whether mirrored images are stored too.
    """

    teacher: str
    teacher_sha256: str
    image_spec: ImageSpec
    flips: bool = False

    def to_dict(self) -> dict[str, object]:
        """As plain data for JSON."""
        return {
            "format": _FORMAT,
            "teacher": self.teacher,
            "teacher_sha256": self.teacher_sha256,
            "image_spec": self.image_spec.to_dict(),
            "flips": self.flips,
        }


@dataclass(frozen=True)
class StoredImage:
    """An image that was met.

    Attributes:
        name: Its path below the images' folder.
        bytes: Size of its file.
        changed: Time of its last change, in nanoseconds.
        height: In pixels; 0 if it could not be read.
        width: In pixels; 0 if it could not be read.
        reason: Why it could not be read, or "".
        shard: Number of the shard that speaks of it.
        row: Its row there; -1 if it could not be read.
    """

    name: str
    bytes: int
    changed: int
    height: int = 0
    width: int = 0
    reason: str = ""
    shard: int = -1
    row: int = -1


def image_state(path: Path) -> tuple[int, int]:
    """(size in bytes, time of last change in nanoseconds); (-1, -1) if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


class FeatureStore:
    """Features of images by name; opens what is there, and takes more.

    Args:
        folder: The store's folder; made if ``facts`` are given.
        facts: Whose features are to be stored. None opens a store that exists.

    Attributes:
        facts: Whose features these are.
        images: Everything met so far, by name; also what could not be read.

    Raises:
        CheckpointError: There is no store, it is of another teacher or preparation (both are
            named), its manifest is damaged, or the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: StoreFacts | None = None) -> None:
        self.folder = Path(folder)
        self.facts = self._agree(facts)
        self.images: dict[str, StoredImage] = {}
        self.damaged: list[str] = []
        self.shape: tuple[int, int, int] | None = None
        self._next = 0
        self._open: dict[int, Any] = {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._take_up(path)

    def __getstate__(self) -> dict[str, object]:
        """Open files stay behind."""
        return {**self.__dict__, "_open": {}}

    @property
    def good(self) -> list[str]:
        """Names of the images that have features, sorted."""
        return sorted(name for name, one in self.images.items() if one.row >= 0)

    @property
    def broken(self) -> dict[str, str]:
        """Reason by name of each image that could not be read."""
        return {name: one.reason for name, one in self.images.items() if one.row < 0}

    def missing(self, root: Path, names: Sequence[str]) -> list[str]:
        """The names of which nothing is stored, or which have changed since.

        Args:
            root: The images' folder.
            names: Paths below it.
        """
        return [name for name in names if not self._is_current(root, name)]

    def add(
        self,
        features: Sequence[Tensor],
        flipped: Sequence[Tensor],
        images: Sequence[StoredImage],
        broken: Sequence[StoredImage] = (),
    ) -> None:
        """Write a shard.

        Args:
            features: A map [C, h, w] for each image, finite in fp16.
            flipped: The same of the mirrored images; empty without ``flips``.
            images: The images, in this order.
            broken: Images that could not be read.

        Raises:
            ValueError: The maps have other shapes than those before, or are not as many as the
                images.
            CheckpointError: The shard cannot be written; what was there before is whole.
        """
        wanted = len(images) if self.facts.flips else 0
        if len(features) != len(images) or len(flipped) != wanted:
            raise ValueError(
                f"{len(images)} images want {len(images)} maps and {wanted} mirrored ones; "
                f"came {len(features)} and {len(flipped)}"
            )
        for one in (*features, *flipped):
            shape = tuple(one.shape)
            self.shape = self.shape or (shape[0], shape[1], shape[2])
            if shape != self.shape:
                raise ValueError(
                    f"all maps of a store have one shape, here {self.shape}; came {shape}. Prepare "
                    "images with padding, so that all have one size"
                )
        tensors = {"features": _stacked(features)}
        if self.facts.flips:
            tensors["flipped"] = _stacked(flipped)
        records = [asdict(one) for one in (*images, *broken)]
        header = json.dumps({"facts": self.facts.to_dict(), "pictures": records})
        path = self._path(self._next)
        write_state_dict(path, tensors, metadata={_HEADER: header})
        self._take_up(path)

    def read(self, name: str, flipped: bool = False) -> Tensor:
        """The features of an image: [C, h, w] float16.

        Raises:
            KeyError: The image has none.
            ValueError: Mirrored ones are wanted and not stored.
            CheckpointError: The shard is gone or damaged.
        """
        one = self.images[name]
        if one.row < 0:
            raise KeyError(f"{name} could not be read when features were stored: {one.reason}")
        if flipped and not self.facts.flips:
            raise ValueError("this store has no features of mirrored images; store with flips")
        path = self._path(one.shard)
        try:
            if one.shard not in self._open:
                self._open[one.shard] = safe_open(path, framework="pt")
            kept = self._open[one.shard].get_slice("flipped" if flipped else "features")
            value: Tensor = kept[one.row : one.row + 1][0]
        except (OSError, SafetensorError) as err:
            raise CheckpointError(
                f"{path} cannot be read ({err!s}); remove it and store again"
            ) from err
        return value

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _is_current(self, root: Path, name: str) -> bool:
        one = self.images.get(name)
        return one is not None and (one.bytes, one.changed) == image_state(root / name)

    def _agree(self, facts: StoreFacts | None) -> StoreFacts:
        """The facts of the store, which must be those wanted."""
        path = self.folder / MANIFEST
        if not path.exists():
            if facts is None:
                raise CheckpointError(f"{self.folder} holds no features: there is no {MANIFEST}")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise CheckpointError(f"{self.folder} cannot be made a folder: {err}") from err
            text = json.dumps(facts.to_dict(), indent=1)
            write_text(path, text)
            return facts
        before = _read_facts(path)
        for key, value in (facts or before).to_dict().items():
            kept = before.to_dict()[key]
            if kept != value:
                raise CheckpointError(
                    f"{self.folder} holds features with {key} {kept!r}, wanted {value!r}; choose "
                    "another folder"
                )
        return before

    def _take_up(self, path: Path) -> None:
        """Take up what a shard holds; a damaged one is named and its images count as missing."""
        number = int(path.stem.partition("-")[2])
        self._next = max(self._next, number + 1)
        try:
            with safe_open(path, framework="pt") as file:
                content = json.loads((file.metadata() or {})[_HEADER])
                shape = tuple(file.get_slice("features").get_shape())
            records = [StoredImage(**record) for record in content["pictures"]]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            self.damaged.append(path.name)
            return
        if content["facts"] != json.loads(json.dumps(self.facts.to_dict())):
            self.damaged.append(path.name)  # of another teacher: put here by hand
            return
        good = [one for one in records if not one.reason]
        if len(good) != shape[0]:
            self.damaged.append(path.name)
            return
        if good:
            self.shape = (shape[1], shape[2], shape[3])
        rows: Iterator[int] = iter(range(len(good)))
        for one in records:
            row = -1 if one.reason else next(rows)
            kept = {**asdict(one), "shard": number, "row": row}
            self.images[one.name] = StoredImage(**kept)


def _stacked(maps: Sequence[Tensor]) -> Tensor:
    """[n, C, h, w] fp16; of no maps an empty tensor."""
    if not maps:
        return torch.empty(0, 0, 0, 0, dtype=torch.float16)
    return torch.stack([one.to(torch.float16) for one in maps])


def _read_facts(path: Path) -> StoreFacts:
    try:
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']}, this program knows {_FORMAT}")
        return StoreFacts(
            str(values["teacher"]),
            str(values["teacher_sha256"]),
            ImageSpec.from_dict(values["image_spec"]),
            bool(values["flips"]),
        )
    except (OSError, KeyError, TypeError, ValueError) as err:
        raise CheckpointError(f"{path} is no manifest of features: {err!s}") from err


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
        images: N.
        views: V, views of each image.
        k: Probabilities that are kept of each view.
        classes: Names of the classes.
        data: Fingerprint of the list of images (``data_sets.fingerprint``).
        augmentation: The chance that views are made with, as plain data.
        teacher: The teacher's name, for people.
        teacher_sha256: Hash of the teacher's file or weights.
        teacher_input: How images are prepared for the teacher, as plain data.
        seed: Source of the views' seeds.
    """

    images: int
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
        if self.images < 1 or self.views < 1:
            raise ValueError(f"a store wants images and views, got {self.images} and {self.views}")
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
    def bytes_per_image(self) -> int:
        """Bytes of all views of one image."""
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
        size = header.bytes_per_image * header.images
        replacing(folder / RECORDS, lambda path: os.truncate(path, size))
        facts = {"pictures": header.images, **asdict(header)}
        del facts["images"]
        text = json.dumps({"version": _VERSION, **facts}, indent=1) + "\n"
        write_text(folder / HEADER, text)
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
            values["images"] = values.pop("pictures")
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
        wanted = header.bytes_per_image * header.images
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
        """Images of a view without a good record, rising.

        Raises:
            ValueError: The store has no such view.
        """
        good = np.zeros(self.header.images, dtype=bool)
        for first in range(0, self.header.images, _SCANNED):
            count = min(_SCANNED, self.header.images - first)
            good[first : first + count] = _is_good(self._read(view, first, count))
        return np.flatnonzero(~good).astype(np.int64)

    def write(
        self,
        view: int,
        images: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        probabilities: NDArray[np.floating],
        classes: NDArray[np.integer],
    ) -> None:
        """Write records, and see that they are on the disk.

        Args:
            view: Of which view.
            images: [n] of which images.
            seeds: [n] uint64.
            probabilities: [n, k].
            classes: [n, k], distinct in a row.

        Raises:
            ValueError: The store has no such view or image.
            OSError: The disk is full or cannot be written; records written before stay good.
        """
        records = np.zeros(len(images), dtype=self.header.record)
        records["seed"], records["probabilities"] = seeds, probabilities
        records["classes"] = classes
        records["checksum"] = _checksums(records)
        raw = records.tobytes()
        size = records.dtype.itemsize
        with (self.folder / RECORDS).open("r+b", buffering=0) as file:
            for number, image in enumerate(images.tolist()):
                file.seek(self._place(view, image))
                file.write(raw[number * size : (number + 1) * size])
            os.fsync(file.fileno())

    def read(
        self, view: int, image: int
    ) -> tuple[int, NDArray[np.float32], NDArray[np.int64]] | None:
        """One record.

        Args:
            view: Of which view.
            image: Of which image.

        Returns:
            (seed, probabilities [k] float32, classes [k] int64); None where there is no good one.

        Raises:
            ValueError: The store has no such view or image.
        """
        records = self._read(view, image, 1)
        if not _is_good(records)[0]:
            return None
        record = records[0]
        return (
            int(record["seed"]),
            record["probabilities"].astype(np.float32),
            record["classes"].astype(np.int64),
        )

    def _read(self, view: int, first: int, count: int) -> Records:
        """Records of neighbouring images."""
        layout = self.header.record
        with (self.folder / RECORDS).open("rb", buffering=0) as file:
            file.seek(self._place(view, first))
            raw = file.read(count * layout.itemsize)
        return np.frombuffer(raw.ljust(count * layout.itemsize, b"\0"), dtype=layout)

    def _place(self, view: int, image: int) -> int:
        header = self.header
        if not (0 <= view < header.views and 0 <= image < header.images):
            raise ValueError(
                f"the store has views 0 to {header.views - 1} and images 0 to "
                f"{header.images - 1}, got view {view} and image {image}"
            )
        return (view * header.images + image) * int(header.record.itemsize)


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
