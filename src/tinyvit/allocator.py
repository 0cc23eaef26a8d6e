"""The C library's memory allocator: have it keep the memory that large tensors give back.

glibc asks the system afresh for every block above 32 MB and returns it at once, so that each tensor
of that size costs thousands of page faults. ``tune_allocator`` turns that off, for the whole
process and only when called; importing tinyvit never does. Facts: mallopt(3) and glibc's malloc.c.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # names and numbers of <malloc.h>
THRESHOLD = 1 << 30
"""Bytes: smaller blocks come from memory that is kept, and that much is kept free at its end."""

OTHERS = {
    "mallctl": "jemalloc",
    "MallocExtension_GetNumericProperty": "tcmalloc",
    "mi_malloc": "mimalloc",
}
"""A symbol that only this allocator has -> its name."""

logger = logging.getLogger("tinyvit")


def tune_allocator() -> bool:
    """Have glibc keep freed memory, for the whole process: fewer page faults, more memory held.

    Worth it where large tensors come and go: training, the plain model, other libraries. What
    ``Engine`` runs on a CPU keeps its tensors small enough to gain little. The process then holds
    on to the most memory it ever used. Call it once, early; a second call changes nothing.

    Returns:
        Whether it worked. It does not with another C library (musl, macOS, Windows) or when
        another allocator has replaced glibc's; the log ("tinyvit") then says why in one line.

    Examples:
        >>> import tinyvit
        >>> tinyvit.tune_allocator()  # doctest: +SKIP
        True
    """
    reason = _reason_against()
    if reason:
        logger.warning("tune_allocator changed nothing: %s", reason)
        return False
    libc = _loaded_libraries()
    # Older versions refuse thresholds above 32 MB; there, mapping is switched off altogether.
    keeps_large = libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD) or libc.mallopt(M_MMAP_MAX, 0)
    keeps_free = libc.mallopt(M_TRIM_THRESHOLD, THRESHOLD)
    if not (keeps_large and keeps_free):
        logger.warning("tune_allocator did not work: this glibc refuses the settings")
        return False
    logger.info("the allocator keeps freed blocks of up to %d MB", THRESHOLD >> 20)
    return True


def _reason_against() -> str:
    """Why the allocator of this process cannot be told, or ""."""
    if not sys.platform.startswith("linux"):
        return f"it is for Linux with glibc, and this is {sys.platform}"
    libraries = _loaded_libraries()
    if not hasattr(libraries, "gnu_get_libc_version") or not hasattr(libraries, "mallopt"):
        return "the C library here is not glibc"
    for symbol, name in OTHERS.items():
        if hasattr(libraries, symbol):
            return f"{name} stands in for glibc's allocator"
    return ""


def _loaded_libraries() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def peak_memory(device: str = "cpu") -> int | None:
    """Most bytes held so far: on a GPU by torch, else by this process; None if it is not known.

    Linux hands ``ru_maxrss`` on from the process that started this one; its own high-water mark
    does not have that fault.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, ValueError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split("kB")[0]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kilobytes
