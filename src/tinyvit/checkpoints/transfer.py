"""Bring one URL into one file, resuming where a broken transfer stopped.

HTTP by the standard library. Knows no checkpoints, no cache and no hashes: it ends with a file of
the length the server announced, or with a ``DownloadError`` in words.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from tinyvit.checkpoints.sniff import looks_like_web_page
from tinyvit.errors import DownloadError

__all__ = ["Patience", "Progress", "transfer"]

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
    url: str,
    part: Path,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> None:
    """Bring a URL into a file.

    Args:
        url: An http or https address.
        part: The file; what it holds already is continued if the server can, else replaced. After
            a broken transfer it stays, so that the next call continues.
        progress: Told how many bytes are there.
        patience: How long to try; the default is four tries.

    Raises:
        DownloadError: If the file cannot be brought; the text says why.
    """
    patience = patience if patience is not None else Patience()
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
    try:
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            done = _copy(first, response, file, start, total, progress)
            file.flush()
            os.fsync(file.fileno())
    except OSError as err:
        if isinstance(err, ConnectionError | TimeoutError):
            raise
        part.unlink(missing_ok=True)
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            size = f"{total} bytes are" if total else "more space is"
            raise DownloadError(
                f"no space left in {part.parent}: {size} needed; free some, or set TINYVIT_CACHE "
                "to another folder"
            ) from err
        raise DownloadError(
            f"{part.parent} cannot be written ({err}); set TINYVIT_CACHE to another folder"
        ) from err
    if total is not None and done != total:
        raise _BrokenError(f"the connection broke after {done} of {total} bytes")


def _copy(
    first: bytes,
    response: http.client.HTTPResponse,
    file: IO[bytes],
    start: int,
    total: int | None,
    progress: Progress | None,
) -> int:
    """Copy the body; return how many bytes of the whole file are there now."""
    done, chunk = start, first
    while chunk:
        file.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, total)
        chunk = response.read(_CHUNK)
    return done


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
    """Bytes in a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0
