"""Labelled images of any source, and which of them are held out for validation.

``open_data_set`` takes folders, CSV files and tar files and gives two parts. ``hold_out`` parts
names without labels: a hash of each name says its side, whatever other names come or go.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyvit.errors import ImageError
from tinyvit.evaluate.classify import LabelledImages, Loaded
from tinyvit.train.settings import OnBroken

from . import lists
from .lists import ImageList, Labels, find_shards

_TRIES = 20  # unreadable images in a row that end the training


def hold_out(names: Sequence[str], part: float | str, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split names into those to train on and those held out, each in their order.

    About ``part`` of them is held out, above 0 and below 1, at least one name on each side; or the
    folder of that name. Which names is decided by ``seed``.
    """
    if isinstance(part, str):
        prefix = part.strip("/") + "/"
        chosen = {name for name in names if name.startswith(prefix)}
        if not chosen or len(chosen) == len(names):
            raise ValueError(
                f"held_out={part!r} leaves {len(names) - len(chosen)} images to train on and "
                f"{len(chosen)} to validate on; wanted a folder below the images' with some of them"
            )
        return [n for n in names if n not in chosen], [n for n in names if n in chosen]
    if not 0 < part < 1:
        raise ValueError(f"held_out must be a part above 0 and below 1, got {part}")
    if len(names) < 2:
        raise ValueError(
            f"training and validation want at least 2 images, got {len(names)}; validation on an "
            "image that was trained on says nothing"
        )
    digests = {name: hashlib.sha256(f"{seed} {name}".encode()).digest()[:8] for name in names}
    drawn = {name: int.from_bytes(digest, "big") / 2**64 for name, digest in digests.items()}
    least, most = min(drawn, key=drawn.__getitem__), max(drawn, key=drawn.__getitem__)
    chosen = {n for n in names if n == least or (drawn[n] < part and n != most)}
    return [n for n in names if n not in chosen], [n for n in names if n in chosen]


def split(
    labels: Labels, part: float, seed: int, groups: Labels | None = None
) -> tuple[Labels, Labels]:
    """Choose images to hold out, the same part of each class.

    A class of two or more images gives at least one and keeps at least one; a class of one keeps
    it for training. What has one number in ``groups`` stays together and counts once. The same
    seed gives the same split. Gives the indices to train on and to hold out, each sorted.
    """
    if not 0 < part < 1:
        raise ValueError(f"the part to hold out must be above 0 and below 1, got {part}")
    if groups is not None:
        _, first, place = np.unique(groups, return_index=True, return_inverse=True)
        is_held = np.isin(place, split(labels[first], part, seed)[1])
        return np.flatnonzero(~is_held), np.flatnonzero(is_held)
    held: list[Labels] = []
    rng = np.random.default_rng(seed)
    for number in np.unique(labels):
        of_class = np.flatnonzero(labels == number)
        if len(of_class) > 1:
            count = min(max(round(part * len(of_class)), 1), len(of_class) - 1)
            held.append(rng.permutation(of_class)[:count])
    if not held:
        raise ValueError(
            f"nothing can be held out: {len(labels)} images and no class with more than one; an "
            "image cannot be trained and validated on. Add images, or give a part of its own for "
            "validation"
        )
    out = np.sort(np.concatenate(held)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), out), out


@dataclass(frozen=True)
class DataSet:
    """Two parts that share no image."""

    train: ImageList  # what is trained on
    val: ImageList  # what is validated on
    origin: str  # where both come from, in words

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return self.train.classes


def open_data_set(
    data: str | os.PathLike[str],
    val: str | os.PathLike[str] | None = None,
    *,
    val_part: float = 0.1,
    split_seed: int = 0,
) -> DataSet:
    """Open labelled images and split them into two parts that share no image.

    An image that is named several times (in a CSV, or by links) stays in one part.

    Args:
        data: A folder with one subfolder for each class; a folder with such folders ``train`` and
            ``val`` (or ``Test``, ``dev``, ...; or with tar files in them); a CSV file, perhaps with
            a column ``split``; a tar file, a folder of them, or a pattern such as ``train-*.tar``.
        val: The part to validate on, of any of these kinds; None takes the one that ``data`` names
            itself, or holds out ``val_part`` of each class.
        val_part: Part of each class to hold out where neither names one, above 0 and below 1.
        split_seed: The same seed gives the same split.

    Returns:
        The two parts.

    Raises:
        ValueError: Unreadable data, a class without an image to train on, or none to hold out.

    Warns:
        UserWarning: A class has no image to validate on, or images stand in both parts; these are
            validated on and not trained on.
    """
    path = Path(data)
    inner, inner_val = (
        lists.inner_folder(path, names, lambda one: lists.visible_folders(one) or find_shards(one))
        for names in (lists.TRAIN_NAMES, lists.VAL_NAMES)
    )
    held = val or (inner and inner_val)
    if held is not None:
        train = open_part(inner or path)
        return _disjoint(train, open_part(held, train.classes), f"{inner or path} and {held}")
    siblings = lists.visible_folders(path) if inner is not None else []
    is_alone = all(name.lower() in lists.PART_NAMES for name in siblings)
    whole = open_part(inner if inner is not None and is_alone else path)
    if whole.parts is not None:
        return _by_column(whole, path)
    first: dict[Hashable, int] = {}  # place of each image where it is named first
    groups = [first.setdefault(one, place) for place, one in enumerate(whole.identities())]
    kept, out = split(whole.labels, val_part, split_seed, np.array(groups, np.int64))
    words = f"{path}, {val_part:.0%} of each class held out with seed {split_seed}"
    return DataSet(whole.part(kept), whole.part(out), words)


def _disjoint(train: ImageList, held: ImageList, origin: str) -> DataSet:
    """Two parts; an image of both is validated on and not trained on."""
    there = set(held.identities())
    is_shared = np.array([one in there for one in train.identities()], np.bool_)
    if not is_shared.any():
        return DataSet(train, held, origin)
    if is_shared.all():
        raise ValueError(f"all {len(train)} images to train on are validated on too: {origin}")
    shared = [train.name(int(index)) for index in np.flatnonzero(is_shared)]
    warnings.warn(
        f"{len(shared)} images stand in both parts of {origin} and are not trained on: "
        f"{lists.some(shared)}",
        stacklevel=3,
    )
    return DataSet(train.part(np.flatnonzero(~is_shared)), held, origin)


def open_part(data: str | os.PathLike[str], classes: Sequence[str] | None = None) -> ImageList:
    """Open labelled images as they are; ``classes`` number a part that belongs to another one."""
    path = Path(data)
    if path.suffix.lower() in (".csv", ".tsv"):
        return lists.read_csv(path, classes)
    if shards := find_shards(path):
        return lists.read_shards(shards, classes)
    if not path.exists():
        raise ValueError(
            f"there is no file or folder {str(path)!r}; wanted a folder of classes, a CSV file or "
            "tar files"
        )
    return lists.read_folder(path, classes)


def read_good(
    load: Callable[[int], Loaded],
    index: int,
    name_of: Callable[[int], str],
    count: int,
    rng: np.random.Generator,
    on_broken: OnBroken = "skip",
) -> tuple[int, Loaded, dict[str, str]]:
    """Load a sample to train on; if it is unreadable, another of ``count`` that ``rng`` draws.

    Gives the index of what was loaded, it, and the reason by name of each unreadable one; an
    ``ImageError`` if ``on_broken`` is "error", or many in a row are unreadable.
    """
    broken: dict[str, str] = {}
    for _ in range(_TRIES):
        try:
            return index, load(index), broken
        except (ImageError, ValueError) as err:
            if on_broken == "error":
                raise ImageError(f"{name_of(index)}: {err}") from err
            broken[name_of(index)] = str(err)
            index = int(rng.integers(count))
    name, reason = next(iter(broken.items()))
    raise ImageError(
        f"{_TRIES} images drawn in a row are unreadable, the first is {name!r} ({reason}); most of "
        "the data cannot be read"
    )


def fingerprint(images: LabelledImages) -> str:
    """SHA-256 of the names, labels and classes of a list, in order; images are not read."""
    digest = hashlib.sha256(repr(tuple(images.classes)).encode())
    labels = images.labels
    for index in range(len(images)):
        digest.update(f"{images.name(index)}\0{labels[index]}\n".encode())
    return digest.hexdigest()


def _by_column(listed: ImageList, path: Path) -> DataSet:
    """Part a list as its column ``split`` says."""
    kinds = [text.lower() for text in listed.parts or ()]
    strange = sorted(set(kinds) - {*lists.TRAIN_NAMES, *lists.VAL_NAMES})
    train = np.flatnonzero([kind in lists.TRAIN_NAMES for kind in kinds])
    val = np.flatnonzero([kind in lists.VAL_NAMES for kind in kinds])
    if strange or not len(train) or not len(val):
        came = f"the values {strange}" if strange else f"{len(train)} and {len(val)} images"
        raise ValueError(
            f"the column 'split' of {str(path)!r} has {came}; wanted 'train' and 'val', each at "
            "least once"
        )
    if lacking := set(range(len(listed.classes))) - set(listed.labels[train].tolist()):
        names = ", ".join(repr(listed.classes[number]) for number in sorted(lacking))
        raise ValueError(f"classes of {str(path)!r} with no image in 'train': {names}")
    return _disjoint(listed.part(train), listed.part(val), f"{path}, by its column 'split'")
