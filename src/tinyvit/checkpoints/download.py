"""From a row of the catalog to a checked file: cache, resumed download, hash, one at a time.

Environment variables, read when needed and never kept:

``TINYVIT_CACHE``           folder of downloaded files; else ``$XDG_CACHE_HOME/tinyvit``, else
                            ``~/.cache/tinyvit``
``TINYVIT_OFFLINE``         1: never use the network (``HF_HUB_OFFLINE`` counts too)
``TINYVIT_MIRROR``          base URL; every file is fetched from ``<mirror>/<file>`` only
``TINYVIT_REQUIRE_SHA256``  1: refuse files for which nobody states a hash
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tinyvit.catalog import Checkpoint, get_checkpoint
from tinyvit.errors import DownloadError

from .files import file_sha256, write_text
from .unwrap import looks_like_web_page

if TYPE_CHECKING:
    import http.client

_POLL_SECONDS = 0.1


def cache_folder(chosen: str | os.PathLike[str] | None = None) -> Path:
    """The folder of downloaded files, ``chosen`` or the environment's; it need not exist yet."""
    own = chosen if chosen is not None else os.environ.get("TINYVIT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{base}/tinyvit").expanduser()


def cached_path(checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where a checkpoint's file is or will be: in the cache, or inside the package.

    Args:
        checkpoint: A row of the catalog.
        cache_dir: Folder for downloaded files; None for the default.

    Returns:
        The path; a file to download need not exist.
    """
    if checkpoint.embedded:
        return Path(__file__).resolve().parents[1] / "weights" / checkpoint.file
    return cache_folder(cache_dir) / checkpoint.file


@contextmanager
def locked(path: Path, patience: float) -> Iterator[None]:
    """Hold a lock file, so that two processes do not write the same download.

    The operating system frees the lock when a process dies; the empty file may stay.
    """
    deadline = time.monotonic() + patience
    with path.open("ab") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise DownloadError(
                    f"another process has been downloading {path.stem} for {patience:.0f} s; wait "
                    f"for it, or end it and try again (its lock is {path})"
                )
            time.sleep(_POLL_SECONDS)
        yield  # closing the file frees the lock


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with (bytes there, bytes in all or None if the server does not say)."""

_CHUNK = 1 << 18
_CONTENT_RANGE = re.compile(r"^bytes (\d+)-\d+/(\d+|\*)$")
_WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)
_IN_WORDS = {
    401: "the server wants a login",
    403: "the server refuses it",
    404: "there is no such file",
    410: "the file was withdrawn",
    429: "too many requests",
}


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        attempts: Tries for each URL; a try that brings bytes does not count.
        first_wait: Seconds before the second try; doubled each time.
        timeout: Seconds without a byte before a connection counts as broken.
        lock: Seconds to wait for another process that downloads the same file.
    """

    attempts: int = 4
    first_wait: float = 0.5
    timeout: float = 30.0
    lock: float = 1800.0


class _BrokenError(Exception):
    """A transfer that stopped and is worth another try."""


def transfer(
    url: str, part: Path, progress: Progress | None = None, patience: Patience | None = None
) -> None:
    """Bring an http or https address into a file; what it holds already is continued if it can."""
    patience = patience or Patience()
    if not url.startswith(("https://", "http://")):
        raise DownloadError(f"{url} is no http or https address; mirrors and files need one")
    failures = 0
    while True:
        before = _size(part)
        try:
            _continue(url, part, progress, patience.timeout)
        except _BrokenError as err:
            failures = 0 if _size(part) > before else failures + 1
            if failures >= patience.attempts:
                raise DownloadError(
                    f"{url} could not be fetched: {err}, {patience.attempts} times in a row"
                ) from err
            time.sleep(patience.first_wait * 2 ** max(0, failures - 1))
        else:
            return


def _continue(url: str, part: Path, progress: Progress | None, timeout: float) -> None:
    """One request: fetch what is missing of a file."""
    import http.client  # here: with ssl it takes a tenth of the time that a click takes
    import socket
    import urllib.error
    import urllib.parse
    import urllib.request

    have = _size(part)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "tinyvit", "Accept": "*/*"})
        urllib.parse.urlsplit(url).port  # noqa: B018  (raises for what is no port)
    except ValueError as err:
        raise DownloadError(f"{url} is no usable address: {err}") from err
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            _receive(url, response, part, have, progress)
    except urllib.error.HTTPError as err:
        err.close()
        if err.code == 416:  # the part is longer than the file: it is of another one
            part.unlink(missing_ok=True)
            raise _BrokenError("the file on the server changed") from err
        words = _IN_WORDS.get(err.code, err.reason)
        if err.code in _WORTH_ANOTHER_TRY:
            raise _BrokenError(f"HTTP {err.code}, {words}") from err
        raise DownloadError(f"{url} could not be fetched: HTTP {err.code}, {words}") from err
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as err:
        reason = getattr(err, "reason", None) or err
        if isinstance(reason, socket.gaierror):
            host = urllib.parse.urlsplit(url).hostname
            raise DownloadError(f"{url}: no address for {host} ({reason.strerror})") from err
        raise _BrokenError(f"the connection failed ({reason})") from err


def _receive(
    url: str, response: http.client.HTTPResponse, part: Path, have: int, progress: Progress | None
) -> None:
    """Write a response's body to the file and check its length."""
    start, total = _extent(response, have)
    first = response.read(_CHUNK)
    if start == 0 and looks_like_web_page(first[:64]):
        raise DownloadError(
            f"{url} gave a web page instead of a file (a login or error page?); open it in a "
            "browser to see why"
        )
    done, chunk = start, first
    try:
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            while chunk:
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
                chunk = response.read(_CHUNK)
            file.flush()
            os.fsync(file.fileno())
    except OSError as err:
        if isinstance(err, ConnectionError | TimeoutError):
            raise
        part.unlink(missing_ok=True)
        words = f"{part.parent} cannot be written ({err});"
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            size = f"{total} bytes are" if total else "more space is"
            words = f"no space left in {part.parent}: {size} needed; free some, or"
        raise DownloadError(f"{words} set TINYVIT_CACHE to another folder") from err
    if total is not None and done != total:
        raise _BrokenError(f"the connection broke after {done} of {total} bytes")


def _extent(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Where the body starts in the file, and the file's length if the server says it."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    if response.status != 206:
        return 0, total
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != have:
        raise _BrokenError("the server continued at the wrong place")
    return have, int(match[2]) if match[2] != "*" else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
        CheckpointError: There is no checkpoint of that name.
        DownloadError: The file cannot be fetched (offline, no address, network, space) or does
            not have the hash it must have.
        ValueError: ``sha256`` is not 64 hexadecimal digits.
    """
    row = get_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    wanted = _checked_digits(sha256) if sha256 is not None else row.sha256
    if row.embedded:
        return _embedded(row, wanted)
    if wanted is None and _is_on("TINYVIT_REQUIRE_SHA256"):
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
    words = f"is not in this installation although {row.name!r} ships with the package"
    if path.is_file():
        came = file_sha256(path)
        if wanted in (None, came):
            return path
        words = f"was changed: its sha256 is {came}, wanted {wanted}"
    raise DownloadError(f"{path} {words}; install tinyvit again")


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
    base = os.environ.get("TINYVIT_MIRROR", "").rstrip("/")
    urls = (f"{base}/{row.file}",) if base else row.urls
    if _is_on("TINYVIT_OFFLINE") or _is_on("HF_HUB_OFFLINE"):
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
    lines = "".join(f"\n  {reason}" for reason in reasons)
    raise DownloadError(
        f"{row.name!r} could not be downloaded:{lines}\nTry again, fetch it by hand to {target}, "
        "or set TINYVIT_MIRROR"
    )


def _recorded(target: Path) -> str | None:
    """The hash written beside the file at its first download."""
    side = _beside(target, ".sha256")
    return side.read_text().split()[0].lower() if side.is_file() and side.stat().st_size else None


def _record(target: Path, digest: str) -> None:
    """Write the hash beside the file, in the form ``sha256sum -c`` reads."""
    write_text(_beside(target, ".sha256"), f"{digest}  {target.name}\n")


def _trust(target: Path, digest: str) -> None:
    """Trust a file on first use: record its hash and say so."""
    _record(target, digest)
    warnings.warn(
        f"nobody states a sha256 for {target.name}; this copy has {digest}. It was recorded beside "
        "the file and must stay so; give it as sha256=… to pin it",
        stacklevel=4,
    )


def _checked_digits(sha256: str) -> str:
    digits = sha256.strip().lower()
    if len(digits) != 64 or any(digit not in "0123456789abcdef" for digit in digits):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
    return digits


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)
