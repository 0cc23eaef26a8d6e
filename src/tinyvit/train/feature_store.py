"""A folder of a teacher's feature maps: computed once, read by every epoch, resumable.

    manifest.json             whose features these are and how pictures were prepared
    shard-00000.safetensors   features [n, C, h, w] fp16, with the pictures' names in its header

A shard is there whole or not at all, and says by itself which pictures it holds: their names, sizes
in bytes, times of change, sizes in pixels; and which pictures could not be read, with the reason.
So a job that was killed goes on where it stopped, and a picture that has changed since is computed
anew (its old row stays unused). With ``flips`` there is a second tensor, ``flipped``: the features
of the mirrored pictures. A picture takes 2 * C * h * w bytes, twice that with flips: 2 MB for SAM's
256 x 64 x 64, 128 kB for 256 x 16 x 16.

Which teacher it was is not known here; ``teachers.py`` knows. Letters: n pictures of a shard, C
channels, h w the map's grid.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyvit.checkpoints.files import replacing, write_state_dict
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec

__all__ = ["FeatureStore", "StoreFacts", "StoredPicture", "picture_state"]

MANIFEST = "manifest.json"
_HEADER = "tinyvit.features"
_FORMAT = 1


@dataclass(frozen=True)
class StoreFacts:
    """What all features of a store have in common.

    Attributes:
        teacher: Its name, for people.
        teacher_sha256: Hash of its weights.
        image_spec: How pictures were prepared for it.
        flips: Whether mirrored pictures are stored too.
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
class StoredPicture:
    """A picture that was met.

    Attributes:
        name: Its path below the pictures' folder.
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


def picture_state(path: Path) -> tuple[int, int]:
    """(size in bytes, time of last change in nanoseconds); (-1, -1) if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


class FeatureStore:
    """Features of pictures by name; opens what is there, and takes more.

    Args:
        folder: The store's folder; made if ``facts`` are given.
        facts: Whose features are to be stored. None opens a store that exists.

    Attributes:
        facts: Whose features these are.
        pictures: Everything met so far, by name; also what could not be read.

    Raises:
        CheckpointError: There is no store, it is of another teacher or preparation (both are
            named), its manifest is damaged, or the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: StoreFacts | None = None) -> None:
        self.folder = Path(folder)
        self.facts = self._agree(facts)
        self.pictures: dict[str, StoredPicture] = {}
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
        """Names of the pictures that have features, sorted."""
        return sorted(name for name, one in self.pictures.items() if one.row >= 0)

    @property
    def broken(self) -> dict[str, str]:
        """Reason by name of each picture that could not be read."""
        return {name: one.reason for name, one in self.pictures.items() if one.row < 0}

    def missing(self, root: Path, names: Sequence[str]) -> list[str]:
        """The names of which nothing is stored, or which have changed since.

        Args:
            root: The pictures' folder.
            names: Paths below it.
        """
        return [name for name in names if not self._is_current(root, name)]

    def add(
        self,
        features: Sequence[Tensor],
        flipped: Sequence[Tensor],
        pictures: Sequence[StoredPicture],
        broken: Sequence[StoredPicture] = (),
    ) -> None:
        """Write a shard.

        Args:
            features: A map [C, h, w] for each picture, finite in fp16.
            flipped: The same of the mirrored pictures; empty without ``flips``.
            pictures: The pictures, in this order.
            broken: Pictures that could not be read.

        Raises:
            ValueError: The maps have other shapes than those before, or are not as many as the
                pictures.
            CheckpointError: The shard cannot be written; what was there before is whole.
        """
        wanted = len(pictures) if self.facts.flips else 0
        if len(features) != len(pictures) or len(flipped) != wanted:
            raise ValueError(
                f"{len(pictures)} pictures want {len(pictures)} maps and {wanted} mirrored ones; "
                f"came {len(features)} and {len(flipped)}"
            )
        for one in (*features, *flipped):
            shape = tuple(one.shape)
            self.shape = self.shape or (shape[0], shape[1], shape[2])
            if shape != self.shape:
                raise ValueError(
                    f"all maps of a store have one shape, here {self.shape}; came {shape}. Prepare "
                    "pictures with padding, so that all have one size"
                )
        tensors = {"features": _stacked(features)}
        if self.facts.flips:
            tensors["flipped"] = _stacked(flipped)
        records = [asdict(one) for one in (*pictures, *broken)]
        header = json.dumps({"facts": self.facts.to_dict(), "pictures": records})
        path = self._path(self._next)
        write_state_dict(path, tensors, metadata={_HEADER: header})
        self._take_up(path)

    def read(self, name: str, flipped: bool = False) -> Tensor:
        """The features of a picture: [C, h, w] float16.

        Raises:
            KeyError: The picture has none.
            ValueError: Mirrored ones are wanted and not stored.
            CheckpointError: The shard is gone or damaged.
        """
        one = self.pictures[name]
        if one.row < 0:
            raise KeyError(f"{name} could not be read when features were stored: {one.reason}")
        if flipped and not self.facts.flips:
            raise ValueError("this store has no features of mirrored pictures; store with flips")
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
        one = self.pictures.get(name)
        return one is not None and (one.bytes, one.changed) == picture_state(root / name)

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
            replacing(path, lambda temporary: _write(temporary, text))
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
        """Take up what a shard holds; a damaged one is named and its pictures count as missing."""
        number = int(path.stem.partition("-")[2])
        self._next = max(self._next, number + 1)
        try:
            with safe_open(path, framework="pt") as file:
                content = json.loads((file.metadata() or {})[_HEADER])
                shape = tuple(file.get_slice("features").get_shape())
            records = [StoredPicture(**record) for record in content["pictures"]]
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
            self.pictures[one.name] = StoredPicture(**kept)


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


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
