"""Which images are to be embedded, what they are called in the store, and how they are read.

Folders, files, ``@list.txt`` (a name in each line) and addresses of object storage. A name in the
store is the path relative to the folder that was named, with ``/`` between folders, in Unicode's
composed form (NFC), so that the same folder has the same names on every system.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from zlib import crc32

from tinyvit.errors import ImageError
from tinyvit.folders.images import IMAGE_SUFFIXES, list_images

from .store import first_line, is_remote

READINGS = 3  # of a file that changes while it is read


@dataclass(frozen=True)
class Source:
    """One image file: its name in the store, where it is (a path or an address), and its state.

    ``sha256`` is that of its row, where the row has the same size and time and is to be checked.
    """

    path: str
    place: str
    size: int
    mtime_ns: int
    sha256: str = field(default="", compare=False)


def list_sources(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: str,
    part: tuple[int, int] = (0, 1),
) -> tuple[list[Source], list[str]]:
    """The images that are named, each once, in a fixed order, and the folders they are in.

    Args:
        sources: One or many folders, files, ``@list.txt`` or addresses.
        store: Where the store is, which must not lie in a source.
        part: (number of the part from 0, parts in all): only the images of this part.

    Raises:
        ValueError: A source is not there or holds no images, two images have one name, or the store
            lies in a source.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    local: list[Path] = []
    found: list[Source] = []
    roots: list[str] = []
    for source in [os.fspath(one) for one in given]:
        if source.startswith("@"):
            for line in _lines(Path(source[1:])):
                if is_remote(line):
                    found += _list_remote(line)
                elif (folder := Path(source[1:]).parent / line).is_dir():
                    local.append(folder)
                else:
                    found.append(_local(_below(line), folder))
            roots.append(os.path.abspath(Path(source[1:]).parent))
        elif is_remote(source):
            found += _list_remote(source)
            roots.append(source)
        else:
            local.append(Path(source))
            roots.append(os.path.abspath(source))
    if not is_remote(store):
        _check_apart(local, Path(store))
    if local:
        found += [_local(image.name, image.path) for image in list_images(local)]
    _check_names(found)
    number, parts = part
    return [one for one in found if part_of(one.path, parts) == number], roots


def part_of(path: str, parts: int) -> int:
    """Which of so many parts an image is in; it does not depend on the others."""
    return crc32(path.encode()) % parts


def read_source(source: Source) -> tuple[bytes, Source]:
    """A file's bytes, and the source as the file was when it was read.

    Raises:
        ImageError: It cannot be read, or changes all the time.
    """
    try:
        for _ in range(READINGS):
            data = read_bytes(source.place)
            now = _state(source)
            if now == source and len(data) == now.size:
                return data, source
            source = now
    except (OSError, ValueError) as err:
        words = err.strerror if isinstance(err, OSError) and err.strerror else first_line(err)
        raise ImageError(f"{source.place!r} cannot be read: {words}") from err
    raise ImageError(f"{source.place!r} changes while it is read; embed it when it is finished")


def sha256_of(data: bytes) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def find_file(path: str, roots: Iterable[str]) -> str | None:
    """Where an image of a store is, in one of the folders that were embedded; None: not there."""
    for root in roots:
        if is_remote(root):
            return f"{root.rstrip('/')}/{path}"
        for place in (Path(root) / path, Path(root).parent / path, Path(root)):
            if place.is_file() and place.name == PurePosixPath(path).name:
                return str(place)
    return None


# -- names ---------------------------------------------------------------------------------------


def name_in_store(name: str) -> str:
    """A file's name as the store has it; bytes that are no UTF-8 are written as escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def _check_names(found: Sequence[Source]) -> None:
    first: dict[str, Source] = {}
    for one in found:
        other = first.setdefault(one.path, one)
        if other is not one:
            raise ValueError(
                f"{other.place!r} and {one.place!r} would both be {one.path!r} in the store; name "
                "the folder above both instead, rename one, or embed them into two stores"
            )


def _check_apart(local: Sequence[Path], store: Path) -> None:
    """Refuse a store within a source, where it would be read, and a source within the store."""
    there = store.resolve()
    for path in local:
        source = path.resolve()
        if source.is_dir() and (source == there or source in there.parents):
            raise ValueError(
                f"the store {str(store)!r} lies in {str(path)!r}, whose images it is made of; "
                f"write it beside the folder, for example -o {str(source.parent / store.name)!r}"
            )
        if there in source.parents:
            raise ValueError(f"{str(path)!r} lies in the store {str(store)!r}; name images")


# -- places ----------------------------------------------------------------------------------------


def _lines(file: Path) -> list[str]:
    """The lines of a list that are not empty."""
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as err:
        raise ValueError(f"the list {str(file)!r} cannot be read: {err.strerror}") from err
    return [line for line in lines if line.strip()]


def _below(line: str) -> str:
    """The name of a file in a list: its path without what leads out of the list's folder."""
    parts = PurePosixPath(Path(os.path.normpath(line)).as_posix()).parts
    return "/".join(part for part in parts if part not in ("..", "/"))


def _local(name: str, path: Path) -> Source:
    try:
        found = path.stat()
        size, changed = found.st_size, found.st_mtime_ns
    except OSError:  # it is named when it is read
        size = changed = 0
    return Source(name_in_store(name), str(path), size, changed)


def _state(source: Source) -> Source:
    if is_remote(source.place):
        filesystem, inner = open_place(source.place)
        info = filesystem.get_file_info(inner)
        return replace(source, size=info.size or 0, mtime_ns=info.mtime_ns or 0)
    found = os.stat(source.place)
    return replace(source, size=found.st_size, mtime_ns=found.st_mtime_ns)


def read_bytes(place: str) -> bytes:
    """The bytes at a path or an address."""
    if is_remote(place):
        filesystem, inner = open_place(place)
        with filesystem.open_input_file(inner) as file:
            return bytes(file.read())
    if not stat.S_ISREG(os.stat(place).st_mode):  # a pipe would be waited for without end
        raise OSError(None, "it is no file")
    return Path(place).read_bytes()


def open_place(address: str) -> tuple[Any, str]:
    """A file system of pyarrow, or of fsspec where pyarrow has none, and the path in it.

    Raises:
        ValueError: Neither knows the address.
    """
    scheme, _, rest = address.partition("://")
    root = f"{scheme}://{rest.split('/')[0]}"
    filesystem, prefix = _open_root(root)
    return filesystem, f"{prefix}{rest.partition('/')[2]}"


@functools.cache
def _open_root(root: str) -> tuple[Any, str]:
    from pyarrow import fs

    try:
        filesystem, inner = fs.FileSystem.from_uri(root)
    except (OSError, ValueError) as err:
        try:
            import fsspec

            found, inner = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as second:
            raise ValueError(
                f"no file system for {root!r}: {first_line(err)}; give a path, an address that "
                "pyarrow knows (s3://, gs://, hdfs://), or pip install fsspec with what it needs"
            ) from second
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(found))
    return filesystem, f"{inner.rstrip('/')}/" if inner.rstrip("/") else inner


def _list_remote(address: str) -> Iterator[Source]:
    """The images below an address, or the one at it."""
    from pyarrow import fs

    filesystem, inner = open_place(address)
    info = filesystem.get_file_info(inner.rstrip("/"))
    if info.type == fs.FileType.NotFound:
        raise ValueError(f"there is nothing at {address!r}; check the address and the rights")
    if info.type == fs.FileType.File:
        name = PurePosixPath(inner).name
        yield Source(name_in_store(name), address, info.size or 0, info.mtime_ns or 0)
        return
    top = inner.rstrip("/")
    files = filesystem.get_file_info(fs.FileSelector(top, recursive=True))
    found = {file.path[len(top) + 1 :]: file for file in files if file.type == fs.FileType.File}
    images = sorted(filter(_is_image, found))
    if not images:
        raise ValueError(f"there are no images at {address!r}; looked for {IMAGE_SUFFIXES}")
    for name in images:
        file = found[name]
        place = f"{address.rstrip('/')}/{name}"
        yield Source(name_in_store(name), place, file.size or 0, file.mtime_ns or 0)


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name)
    is_hidden = any(part.startswith(".") for part in parts.parts)
    return parts.suffix.lower() in IMAGE_SUFFIXES and not is_hidden
