"""Bring a checkpoint of the catalog into the cache, checked, whole or not at all.

Every file is checked against a SHA-256. Where the catalog has one, or the caller gives one, that
one counts. For some published files nobody states a hash: these are trusted on first use. Their
hash is taken after the first complete download, written beside the file (``<file>.sha256``) and
announced by a warning; from then on the file must keep it. That is safe against changes and broken
copies, and against running code (files are read without unpickling), but not against a publisher
who was replaced before the first download; ``sha256=`` or ``TINYVIT_REQUIRE_SHA256=1`` closes that.

Prints nothing: progress goes to a function.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from tinyvit.catalog import Checkpoint, get_checkpoint
from tinyvit.checkpoints.cache import cached_path, is_offline, is_strict, locked, mirror
from tinyvit.checkpoints.files import file_sha256, replacing
from tinyvit.checkpoints.transfer import Patience, Progress, transfer
from tinyvit.errors import DownloadError

__all__ = ["fetch"]


def fetch(
    checkpoint: Checkpoint | str,
    cache_dir: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> Path:
    """Return the path of a checkpoint's file, downloading it if it is not there yet.

    A broken download is continued where it stopped. Two processes may ask for the same file: one
    fetches, the other waits.

    Args:
        checkpoint: A row of the catalog or its name.
        cache_dir: Folder for the file; None for ``TINYVIT_CACHE`` or the user's cache.
        sha256: The hash the file must have; counts before the catalog's.
        progress: Called with (bytes there, bytes in all or None) while downloading.
        patience: How long to try.

    Returns:
        The file, whose hash has been checked.

    Raises:
        CheckpointError: If there is no checkpoint of that name.
        DownloadError: If the file cannot be fetched (offline, no address, network, space) or does
            not have the hash it must have.
        ValueError: If ``sha256`` is not 64 hexadecimal digits.
    """
    row = get_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    wanted = _checked_digits(sha256) if sha256 is not None else row.sha256
    if row.embedded:
        return _embedded(row, wanted)
    if wanted is None and is_strict():
        raise DownloadError(
            f"nobody states a sha256 for {row.name!r} and TINYVIT_REQUIRE_SHA256 is set; give it "
            "as sha256=…"
        )
    target = cached_path(row, cache_dir)
    if _is_good(target, wanted):
        return target
    urls = _urls(row, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(_beside(target, ".lock"), (patience or Patience()).lock):
            if not _is_good(target, wanted):  # another process may have brought it meanwhile
                _download(row, target, urls, wanted, progress, patience)
    except OSError as err:
        raise DownloadError(
            f"{target.parent} cannot be used as a cache ({err}); "
            "set TINYVIT_CACHE to another folder"
        ) from err
    return target


def _embedded(row: Checkpoint, wanted: str | None) -> Path:
    """The file inside the package, checked."""
    path = cached_path(row)
    if not path.is_file():
        raise DownloadError(
            f"{path} is not in this installation although {row.name!r} ships with the package; "
            "install tinyvit again"
        )
    came = file_sha256(path)
    if wanted is not None and came != wanted:
        raise DownloadError(
            f"{path} was changed: its sha256 is {came}, wanted {wanted}; install tinyvit again"
        )
    return path


def _is_good(target: Path, wanted: str | None) -> bool:
    """Whether the file is there and has its hash; a file without any known hash gets one now."""
    if not target.is_file():
        return False
    came = file_sha256(target)
    must = wanted if wanted is not None else _recorded(target)
    if must is None:
        _trust(target, came)
        return True
    return came == must


def _urls(row: Checkpoint, target: Path) -> tuple[str, ...]:
    """Where to fetch the file, or the reason why it will not be fetched."""
    base = mirror()
    urls = (f"{base}/{row.file}",) if base else row.urls
    if is_offline():
        state = "has another hash than it must have" if target.is_file() else "is not there"
        raise DownloadError(
            f"{target} {state} and TINYVIT_OFFLINE or HF_HUB_OFFLINE forbids the network; put "
            f"the file there by hand{f' from {urls[0]}' if urls else ''}, or go online"
        )
    if not urls:
        raise DownloadError(
            f"{row.name!r} has no address to download from. {row.note} See {row.source}; then "
            f"give the file's path instead of the name, or put it at {target}"
        )
    return urls


def _download(
    row: Checkpoint,
    target: Path,
    urls: tuple[str, ...],
    wanted: str | None,
    progress: Progress | None,
    patience: Patience | None,
) -> None:
    """Try each address until one gives the right file. The lock is held."""
    must = wanted if wanted is not None else _recorded(target)
    origin = "" if wanted else f" (recorded in {target.name}.sha256; remove that to accept another)"
    part = _beside(target, ".part")
    reasons: list[str] = []
    for url in urls:
        if must is None:
            part.unlink(missing_ok=True)  # nothing would tell whether it is of the same file
        try:
            transfer(url, part, progress, patience)
        except DownloadError as err:
            reasons.append(str(err))
            continue
        came = file_sha256(part)
        if must is None or came == must:
            os.replace(part, target)
            _trust(target, came) if must is None else _record(target, came)
            return
        part.unlink()
        reasons.append(
            f"{url} gave a file with sha256 {came}, wanted {must}{origin}; it was removed"
        )
    raise DownloadError(
        f"{row.name!r} could not be downloaded: {'; '.join(reasons)}. Try again, fetch it by hand "
        f"to {target}, or set TINYVIT_MIRROR"
    )


def _recorded(target: Path) -> str | None:
    """The hash written beside the file at its first download."""
    side = _beside(target, ".sha256")
    return side.read_text().split()[0].lower() if side.is_file() and side.stat().st_size else None


def _record(target: Path, digest: str) -> None:
    """Write the hash beside the file, in the form ``sha256sum -c`` reads."""
    text = f"{digest}  {target.name}\n"
    replacing(_beside(target, ".sha256"), lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    """Write a text file."""
    path.write_text(text)


def _trust(target: Path, digest: str) -> None:
    """Trust a file on first use: record its hash and say so."""
    _record(target, digest)
    warnings.warn(
        f"nobody states a sha256 for {target.name}; this copy has {digest}. It was recorded beside "
        "the file and must stay so; give it as sha256=… to pin it",
        stacklevel=4,
    )


def _checked_digits(sha256: str) -> str:
    """A caller's hash in lower case."""
    digits = sha256.strip().lower()
    if len(digits) != 64 or any(digit not in "0123456789abcdef" for digit in digits):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
    return digits


def _beside(target: Path, suffix: str) -> Path:
    """A companion of the file in the same folder."""
    return target.with_name(target.name + suffix)
