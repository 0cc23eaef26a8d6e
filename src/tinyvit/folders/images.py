"""Which images a command is about, in a fixed order, and what their outputs are called.

Names of files only: no image is opened here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyvit.sam import Prompt

IMAGE_SUFFIXES = (  # the one list of them
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg"),
    *(".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True)
class Item:
    """One image to work on.

    ``name`` is its path relative to the folder that was named, with slashes; ``stem`` is what its
    outputs are called: ``name`` without the suffix, or with it where another has the same stem.
    ``prompts`` are one for each object; none where none are needed.
    """

    path: Path
    name: str
    stem: str
    prompts: tuple[Prompt, ...] = ()


def list_images(paths: Sequence[Path], output: Path | None = None) -> list[Item]:
    """The images that are named, and those in the folders that are named, each once.

    Folders are read with all folders in them, sorted by name, but not ``output``; files count by
    their suffix, hidden ones not at all; links to folders are not followed. An image named as a
    file counts whatever its suffix. Where several folders are named, each keeps its own name in
    front, so that outputs do not meet.

    Raises:
        ValueError: A path is not there, no image was found, the output folder is one of the
            folders, or two images would have the same outputs.
    """
    folders = [path for path in paths if path.is_dir()]
    found: list[Item] = []
    for path in paths:
        if path.is_dir():
            if output is not None and output.resolve() == path.resolve():
                raise ValueError(
                    f"{str(path)!r} is read and written to; outputs beside the images would be "
                    f"taken for images the next time. Give another folder, such as "
                    f"{str(path / 'features')!r}"
                )
            before = f"{path.resolve().name}/" if len(folders) > 1 else ""
            for inner in walk_images(path, output):
                found.append(_named(inner, before + inner.relative_to(path).as_posix()))
        elif path.exists():
            found.append(_named(path, path.name))
        else:
            raise ValueError(f"there is no file or folder {str(path)!r}; check the path")
    if not found:
        names = ", ".join(repr(str(path)) for path in paths)
        raise ValueError(
            f"there are no images in {names}; looked for files with the suffixes "
            f"{' '.join(IMAGE_SUFFIXES)}"
        )
    once: dict[str, Item] = {}
    for image in found:
        once.setdefault(os.path.abspath(image.path), image)
    return _apart(list(once.values()))


def _named(path: Path, name: str) -> Item:
    return Item(path, name, str(PurePosixPath(name).with_suffix("")))


def walk_images(folder: Path, output: Path | None = None) -> Iterator[Path]:
    """The images in a folder and the folders in it but ``output``, in a fixed order."""

    def give_up(err: OSError) -> None:
        raise err

    leave_out = None if output is None else output.resolve()
    for place, folders, files in os.walk(folder, onerror=give_up):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() != leave_out
        )
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield here / name


def _apart(images: list[Item]) -> list[Item]:
    """Give images that share a stem their whole names instead."""

    def clashing() -> set[Item]:
        seen = Counter(image.stem.casefold() for image in images)  # some disks fold case
        return {p for p in images if seen[p.stem.casefold()] > 1 and p.stem != p.name}

    while clash := clashing():
        images = [replace(p, stem=p.name) if p in clash else p for p in images]
    first: dict[str, Item] = {}
    for image in images:
        other = first.setdefault(image.stem, image)
        if other is not image:
            raise ValueError(
                f"{str(other.path)!r} and {str(image.path)!r} would have the same outputs, "
                f"{image.stem}; name the folder above both instead, or take them one by one"
            )
    return images
