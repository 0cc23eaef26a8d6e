"""Read files out of packages, without installing anything and without root.

Four containers: ``.deb`` (an ``ar`` file whose member ``data.tar.*`` holds the files), ``.tgz``,
``.whl`` (a zip) and, inside packages of Qt programs, ``.rcc`` (a tree of resources). Members come
one after the other as bytes; nothing is unpacked to the disk, so no name can lead out of a folder.
Links are passed over. Not read: ``data.tar.zst``, for which Python has no reader before 3.14 and
which none of the pinned packages uses.

Layouts: ar(5), deb(5); the resource format as Qt's tool ``rcc`` writes it, versions 1 to 3.
"""

from __future__ import annotations

import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_RCC_COMPRESSED, _RCC_FOLDER, _RCC_ZSTD = 1, 2, 4


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Read files of a package in the order in which they lie there."""
    readers = {".deb": _read_deb, ".tgz": _read_tgz, ".gz": _read_tgz}
    readers |= {".whl": _read_zip, ".zip": _read_zip}
    if path.suffix not in readers:
        raise ValueError(f"{path} has the suffix {path.suffix!r}, wanted one of {list(readers)}")
    try:
        yield from readers[path.suffix](path, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError) as err:
        raise ValueError(f"{path} is damaged: {err}; remove it and fetch it again") from err


def read_named(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Read the files of a package that have these names."""
    missing = set(names)
    for name, data in read_members(path, missing.__contains__):
        missing.discard(name)
        yield name, data
    if missing:
        first = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{path} lacks {len(missing)} of {len(names)} files wanted: {first}")


class _Section(io.RawIOBase):
    """The next bytes of a file as a file of their own."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        super().__init__()
        self._file = file
        self._left = length

    def readable(self) -> bool:
        """It can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read on, at most to the section's end."""
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def _read_deb(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The files of the ``data.tar.*`` in a Debian package."""
    with path.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise ValueError(f"{path} is no .deb file: it does not start as an ar archive")
        while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
            name = header[:16].decode("ascii", "replace").rstrip(" ").rstrip("/")
            size = header[48:58].strip()
            if header[58:] != b"`\n" or not size.isdigit():
                raise ValueError(f"{path} is damaged: no ar header before byte {file.tell()}")
            if name.startswith("data.tar"):
                if name.removeprefix("data.tar") not in ("", ".gz", ".bz2", ".xz"):
                    raise ValueError(
                        f"{path} holds {name}; only .gz, .bz2, .xz and plain tar files are read "
                        "here. Repack it with dpkg-deb"
                    )
                yield from _read_tar(_Section(file, int(size)), wanted)
                return
            file.seek(int(size) + int(size) % 2, io.SEEK_CUR)  # members start at even bytes
    raise ValueError(f"{path} holds no data.tar; it is cut off or no .deb file")


def _read_tgz(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The files of a compressed tar file."""
    with path.open("rb") as file:
        yield from _read_tar(file, wanted)


def _read_tar(
    stream: BinaryIO | _Section, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    """The files of a tar stream, whatever its compression."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isreg() and wanted(name) and (file := tar.extractfile(member)) is not None:
                yield name, file.read()


def _read_zip(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The files of a zip file."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and wanted(member.filename):
                yield member.filename, archive.read(member)


def read_resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Read the files of a Qt resource file."""
    try:
        yield from _walk_resources(data)
    except (struct.error, zlib.error) as err:
        raise ValueError(f"a Qt resource file is damaged: {err}; fetch its package again") from err


def _walk_resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The files of a Qt resource file, folder by folder."""
    if data[:4] != b"qres":
        raise ValueError("no Qt resource file: it does not start with 'qres'")
    version, tree, contents, names = struct.unpack_from(">4i", data, 4)
    if version not in (1, 2, 3):
        raise ValueError(f"a Qt resource file of version {version}; wanted 1, 2 or 3")
    node_size = 14 if version == 1 else 22  # later versions add the time of the last change
    pending = [(0, "")]
    while pending:
        node, folder = pending.pop()
        start = tree + node * node_size
        name_at, flags = struct.unpack_from(">iH", data, start)
        path = folder + _resource_name(data, names + name_at) if node else ""
        if flags & _RCC_FOLDER:
            count, first = struct.unpack_from(">ii", data, start + 6)
            pending += [
                (child, f"{path}/" if path else "") for child in range(first, first + count)
            ]
            continue
        (content_at,) = struct.unpack_from(">i", data, start + 10)
        (length,) = struct.unpack_from(">i", data, contents + content_at)
        first_byte = contents + content_at + 4
        content = data[first_byte : first_byte + length]
        if flags & _RCC_ZSTD:
            raise ValueError(f"{path} is packed with zstd, which is not read here")
        yield path, zlib.decompress(content[4:]) if flags & _RCC_COMPRESSED else content


def _resource_name(data: bytes, start: int) -> str:
    """A name: its length, a hash, its letters."""
    (length,) = struct.unpack_from(">H", data, start)
    return data[start + 6 : start + 6 + 2 * length].decode("utf-16-be")
