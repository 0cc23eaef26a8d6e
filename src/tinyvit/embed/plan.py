"""What is to be done: the sources against what the store has, by columns, without reading images.

A source with the size and the time that its row has counts as done. All others are read; what their
bytes say decides whether they are encoded: content that the store has is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .sources import Source, part_of

if TYPE_CHECKING:
    from .store import EmbeddingStore

Check = Literal["state", "content"]


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    Attributes:
        todo: Sources to be read, in the order of the sources.
        new: How many of them the store has no row of.
        kept: How many sources are stored already and as they were; those whose content is checked
            come out of the work as kept.
        failed: (path, reason) of sources that failed before and are left alone.
        gone: Paths of rows whose file is not among the sources.
        twice: Paths that have two rows, after a race of two writers that was broken off.
    """

    todo: list[Source]
    new: int
    kept: int
    failed: list[tuple[str, str]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


def make_plan(
    sources: Sequence[Source],
    store: EmbeddingStore,
    *,
    check: Check = "state",
    retry_failed: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Plan:
    """Compare sources with a store.

    Args:
        sources: The images of this part.
        store: What is there.
        check: "state": what has another size or time is read; "content": everything is.
        retry_failed: Read what failed before, too.
        part: Which part of all images the sources are; only its rows can be gone.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = ["path", "state", "size", "mtime_ns", *(["sha256"] if check == "content" else [])]
    have = store.dataset.to_table(columns=columns).combine_chunks()
    names = pa.array([source.path for source in sources], pa.string())
    where = pc.fill_null(pc.index_in(names, have["path"]), -1).to_numpy(zero_copy_only=False)
    is_there = where >= 0
    is_same = is_there.copy()
    for name in ("size", "mtime_ns"):
        stored = have[name].to_numpy()
        now = np.fromiter((getattr(source, name) for source in sources), np.int64, len(sources))
        is_same[is_there] &= stored[where[is_there]] == now[is_there]
    is_failed = np.zeros(len(sources), bool)
    bad = pc.equal(have["state"], "failed").to_numpy()
    is_failed[is_there] = bad[where[is_there]]
    is_done, is_left = is_same & ~is_failed, is_same & is_failed & (not retry_failed)
    if check == "content":  # they are read all the same, and compared with the hash of their row
        numbers = np.flatnonzero(is_done).tolist()
        known = {sources[i].path: have["sha256"][int(where[i])].as_py() for i in numbers}
        sources = [replace(source, sha256=known.get(source.path, "")) for source in sources]
        is_done[:] = False
    todo = [source for source, done in zip(sources, is_done | is_left, strict=True) if not done]
    left = {source.path for source, one in zip(sources, is_left, strict=True) if one}
    reasons = [(row.path, row.reason) for row in store.rows("failed") if row.path in left]
    number, parts = part
    gone = have["path"].filter(pc.invert(pc.is_in(have["path"], names))).to_pylist()
    return Plan(
        todo,
        int((~is_there).sum()),
        int(is_done.sum()),
        reasons,
        [path for path in gone if part_of(path, parts) == number],
        paths_twice(have["path"]),
    )


def paths_twice(column: Any) -> list[str]:
    """Of a column of paths those that are in it more than once."""
    import pyarrow.compute as pc

    counts = column.value_counts()
    many = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    twice: list[str] = many.field("values").to_pylist()
    return twice


class KnownContent:
    """Which contents a store has, 8 bytes for each: a first answer, to be confirmed by the store.

    What is added while a commit is open is recent: it cannot be copied yet.
    """

    def __init__(self, store: EmbeddingStore) -> None:
        table = store.dataset.to_table(columns=["sha256"], filter="state = 'ok'")
        digits = "".join(table["sha256"].to_pylist())
        self._stored: NDArray[Any] = np.sort(
            np.frombuffer(bytes.fromhex(digits), ">u8").reshape(-1, 4)[:, 0]
        )
        self._recent: set[int] = set()
        self._lock = threading.Lock()

    def has(self, sha256: str) -> bool:
        """Whether the store (very probably) has a row with this content."""
        place = int(np.searchsorted(self._stored, _first(sha256)))
        return place < len(self._stored) and int(self._stored[place]) == _first(sha256)

    def is_recent(self, sha256: str) -> bool:
        """Whether a row with this content waits for its commit; it is added where not."""
        with self._lock:
            if _first(sha256) in self._recent:
                return True
            self._recent.add(_first(sha256))
            return False

    def commit(self) -> None:
        """What was recent is in the store now."""
        with self._lock:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._stored = np.union1d(self._stored, recent)
            self._recent = set()


def _first(sha256: str) -> int:
    return int(sha256[:16], 16)
