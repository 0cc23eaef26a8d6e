"""Where downloaded files live, what the environment asks for, and one process at a time.

Environment variables, read when needed and never kept:

``TINYVIT_CACHE``           folder of downloaded files; else ``$XDG_CACHE_HOME/tinyvit``, else
                            ``~/.cache/tinyvit``
``TINYVIT_OFFLINE``         1: never use the network (``HF_HUB_OFFLINE`` counts too)
``TINYVIT_MIRROR``          base URL; every file is fetched from ``<mirror>/<file>`` only
``TINYVIT_REQUIRE_SHA256``  1: refuse files for which nobody states a hash
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyvit.catalog import Checkpoint
from tinyvit.errors import DownloadError

__all__ = ["cache_folder", "cached_path", "is_offline", "is_strict", "locked", "mirror"]

_POLL_SECONDS = 0.1


def cache_folder(chosen: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of downloaded files; it need not exist yet.

    Args:
        chosen: A folder the caller wants, or None for the environment's.

    Returns:
        The folder.
    """
    if chosen is not None:
        return Path(chosen).expanduser()
    own = os.environ.get("TINYVIT_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tinyvit"


def cached_path(checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return where a checkpoint's file is or will be: in the cache, or inside the package.

    Args:
        checkpoint: A row of the catalog.
        cache_dir: Folder for downloaded files; None for the default.

    Returns:
        The path; a file to download need not exist.
    """
    if checkpoint.embedded:
        return Path(__file__).resolve().parents[1] / "weights" / checkpoint.file
    return cache_folder(cache_dir) / checkpoint.file


def is_offline() -> bool:
    """Tell whether the environment forbids the network.

    Returns:
        True if ``TINYVIT_OFFLINE`` or ``HF_HUB_OFFLINE`` is switched on.
    """
    return _is_on("TINYVIT_OFFLINE") or _is_on("HF_HUB_OFFLINE")


def is_strict() -> bool:
    """Tell whether files without a stated hash are refused.

    Returns:
        True if ``TINYVIT_REQUIRE_SHA256`` is switched on.
    """
    return _is_on("TINYVIT_REQUIRE_SHA256")


def mirror() -> str | None:
    """Return the base URL to fetch every file from.

    Returns:
        The URL without a slash at its end, or None to use the publishers' own.
    """
    return os.environ.get("TINYVIT_MIRROR", "").rstrip("/") or None


@contextmanager
def locked(path: Path, patience: float) -> Iterator[None]:
    """Hold a lock file, so that two processes do not write the same download.

    The operating system frees the lock when a process dies; the empty file may stay.

    Args:
        path: The lock file.
        patience: Seconds to wait for another process.

    Yields:
        Nothing; the lock is held inside the block.

    Raises:
        DownloadError: If another process holds the lock for longer.
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
    """Whether a switch in the environment is on."""
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        """Take the lock if it is free."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        """Take the lock if it is free."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
