"""Writing to a store: fragments beside it, the commit that makes them part of it, and its upkeep.

Whoever encodes writes fragments, which nobody sees; whoever leads commits them. A commit replaces
the rows that its images had, in one step. Nothing here knows an encoder.
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tinyvit.errors import CheckpointError

from .rows import StoreRow, schema_of, to_batch
from .store import (
    INDEXED,
    EmbeddingStore,
    first_line,
    is_remote,
    load_lance,
    one_of,
    unless_conflict,
)

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

Value = TypeVar("Value")

ATTEMPTS = 50
"""Of a commit that other writers get in the way of."""

KEPT = timedelta(minutes=10)
"""How long a version that has been replaced stays, for those who read it."""

FRAGMENT_BYTES = 4 << 30
SMALL_FRAGMENTS = 8
"""Fragments below ``FRAGMENT_BYTES`` that are worth putting together."""

VECTORS_TO_INDEX = 1_000_000
"""Rows below which an exact search is fast enough."""

BATCH_BYTES = 16 << 20
_OTHER_BYTES = 256  # of a row: its path, hash, numbers
_MOST_ROWS = 1 << 20
_NAMES = 500  # in one filter


class FragmentWriter:
    """Writes rows to new fragments of a store, in a thread, as they come; commits nothing."""

    def __init__(self, store: EmbeddingStore) -> None:
        self._schema = schema_of(store.recipe)
        self._store = store
        self._waiting: queue.Queue[list[StoreRow] | None] = queue.Queue(2)
        self._rows: list[StoreRow] = []
        self._held = 0
        self._fragments: list[lance.FragmentMetadata] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.nbytes = 0

    def add(self, row: StoreRow) -> None:
        """Take a row; it may be written later.

        Raises:
            OSError: A row before it could not be written.
        """
        self._rows.append(row)
        self._held += row.nbytes
        self.nbytes += row.nbytes
        if self._held >= BATCH_BYTES:
            self._send()

    def finish(self) -> list[str]:
        """Write what is left; the new fragments as JSON, none where there were no rows.

        Raises:
            OSError: The rows could not be written.
        """
        if self._rows:
            self._send()
        if self._thread is None:
            return []
        self._put(None)
        self._thread.join()
        self._raise()
        found = [fragment.to_json() for fragment in self._fragments]
        names = [Path(file["path"]) for fragment in found for file in fragment["files"]]
        if not is_remote(self._store.url):
            data = Path(self._store.url) / "data"
            blobs = [blob for name in names for blob in (data / name.stem).glob("*")]
            _sync([*(data / name for name in names), *blobs])
        return [json.dumps(fragment) for fragment in found]

    def abandon(self) -> None:
        """Stop, and let what is written go."""
        self._rows = []
        if self._thread is not None:
            self._put(None)
            self._thread.join()

    def _send(self) -> None:
        rows, self._rows, self._held = self._rows, [], 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="tinyvit-embed-write")
            self._thread.start()
        self._put(rows)
        self._raise()

    def _put(self, rows: list[StoreRow] | None) -> None:
        while self._thread is not None and self._thread.is_alive():
            with suppress(queue.Full):
                self._waiting.put(rows, timeout=1)
                return

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        import pyarrow as pa
        from lance.fragment import write_fragments

        def batches() -> Iterator[pa.RecordBatch]:
            while (rows := self._waiting.get()) is not None:
                yield to_batch(rows, self._schema)

        try:
            reader = pa.RecordBatchReader.from_batches(self._schema, batches())
            self._fragments = write_fragments(
                reader,
                self._store.url,
                schema=self._schema,
                storage_options=self._store.storage_options,
            )
        except BaseException as err:  # raised in the thread that waits for it
            self._error = err


def commit(
    store: EmbeddingStore,
    fragments: Sequence[str],
    paths: Sequence[str],
    facts: Mapping[str, str] | None = None,
) -> None:
    """Make fragments part of a store, instead of the rows that their paths had.

    Readers see all of it or nothing. Other writers may commit meanwhile: where two have rows of one
    path, the newest stays.

    Args:
        store: Seen at its newest version afterwards.
        fragments: From ``FragmentWriter.finish``, here or in another process.
        paths: Of all their rows.
        facts: Backend, device and versions, kept with the commit.

    Raises:
        CheckpointError: Other writers were always faster, or it could not be written.
    """
    lance = load_lance()
    from lance.fragment import FragmentMetadata

    new = [FragmentMetadata.from_json(text) for text in fragments]
    for attempt in range(ATTEMPTS):
        time.sleep(random.uniform(0, min(attempt, 20) / 10))  # let others finish
        start = time.time() - 1  # of clocks and disks that round
        store.refresh()
        read = store.dataset.version
        removed, updated = _without(store.dataset, paths)
        if not new and not removed and not updated:
            return
        operation = lance.LanceOperation.Append(new)
        if removed or updated:
            operation = lance.LanceOperation.Update(removed, updated, new, [])
        transaction = lance.Transaction(read, operation, transaction_properties=dict(facts or {}))
        options = {"storage_options": store.storage_options}
        write = partial(lance.LanceDataset.commit, store.dataset, transaction, **options)
        committed = unless_conflict(write)
        if committed is not None:
            if not is_remote(store.url):
                folders = (Path(store.url) / name for name in ("_deletions", "_versions"))
                files = [file for folder in folders for file in folder.glob("*")]
                _sync([file for file in files if _changed(file) >= start])
            store.refresh()
            if committed.version != read + 1:  # another writer was here; it may have these, too
                remove_twice(store, paths)
            return
    raise CheckpointError(
        f"{store.url}: other writers committed before this one {ATTEMPTS} times; let fewer write "
        "at once, or give them parts of their own (--part)"
    )


def _sync(files: Sequence[Path]) -> None:
    """Have the disk keep files and their names, as a machine that loses power forgets them."""
    if os.name != "posix":  # where folders cannot be opened
        return
    for path in [*files, *{file.parent for file in files}]:
        with suppress(FileNotFoundError):  # another writer has cleaned it away
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def delete(store: EmbeddingStore, paths: Sequence[str]) -> None:
    """Take the rows of these paths out."""
    for start in range(0, len(paths), _NAMES):
        store.dataset.delete(one_of("path", paths[start : start + _NAMES]))
    store.refresh()


def remove_twice(store: EmbeddingStore, paths: Sequence[str]) -> None:
    """Of the rows that two writers made of one path, keep the newest."""
    for start in range(0, len(paths), _NAMES):
        where = one_of("path", paths[start : start + _NAMES])
        table = store.dataset.scanner(
            columns=["path", "made"], filter=where, with_row_address=True
        ).to_table()
        newest: dict[str, tuple[Any, int]] = {}
        surplus: list[str] = []
        for row in table.to_pylist():
            one = (row["made"], row["_rowaddr"])
            first = newest.setdefault(row["path"], one)
            newest[row["path"]] = max(first, one)
            if first is not one:
                surplus.append(str(min(first, one)[1]))
        if surplus:
            store.dataset.delete(f"{where} AND _rowaddr IN ({', '.join(surplus)})")
            store.refresh()


def _without(
    dataset: lance.LanceDataset, paths: Sequence[str]
) -> tuple[list[int], list[lance.FragmentMetadata]]:
    """(fragments that hold nothing but these paths, other fragments without them)."""
    held: dict[int, list[str]] = defaultdict(list)
    for start in range(0, len(paths), _NAMES):
        where = one_of("path", paths[start : start + _NAMES])
        table = dataset.scanner(columns=["path"], filter=where, with_row_address=True).to_table()
        for row in table.to_pylist():
            held[row["_rowaddr"] >> 32].append(row["path"])
    removed, updated = [], []
    for number, names in held.items():
        fragment = dataset.get_fragment(number)
        left = None if fragment is None else fragment.delete(one_of("path", names))
        if left is None:
            removed.append(number)
        else:
            updated.append(left)
    return removed, updated


# -- upkeep ----------------------------------------------------------------------------------------


def keep_up(store: EmbeddingStore, kept: timedelta = KEPT) -> None:
    """Bring the indexes up to date, put small fragments together, delete what is replaced.

    Another writer that does the same is let do it. What was replaced stays ``kept`` for those who
    read it. Nothing outside the dataset's own folders is touched.
    """
    store.refresh()
    unless_conflict(lambda: _index(store.dataset))
    store.refresh()
    unless_conflict(lambda: _compact(store))
    store.refresh()
    unless_conflict(
        lambda: store.dataset.cleanup_old_versions(
            older_than=kept, error_if_tagged_old_versions=False
        )
    )
    store.refresh()


def _index(dataset: lance.LanceDataset) -> None:
    there = {column for index in dataset.describe_indices() for column in index.field_names}
    for column in INDEXED:
        if column not in there:  # it was made by a process that was killed
            dataset.create_scalar_index(column, "BTREE")
    dataset.optimize.optimize_indices()


def _compact(store: EmbeddingStore) -> None:
    dataset, rows, row_bytes = store.dataset, store.dataset.count_rows(), bytes_of_row(store)
    most = max(SMALL_FRAGMENTS, min(_MOST_ROWS, FRAGMENT_BYTES // row_bytes))
    fragments = [fragment.metadata for fragment in dataset.get_fragments()]
    small = sum(one.num_rows < most for one in fragments)
    deleted = sum(one.num_deletions for one in fragments)
    if small >= SMALL_FRAGMENTS or deleted > rows // 10:
        dataset.optimize.compact_files(
            target_rows_per_fragment=most,
            batch_size=max(1, BATCH_BYTES // row_bytes),
            num_threads=1,
        )


def index_vectors(store: EmbeddingStore) -> bool:
    """Index the vectors for a search that is fast and nearly exact; False below a million rows."""
    rows, dim = store.dataset.count_rows(), store.recipe.pooled_dim
    if rows < VECTORS_TO_INDEX:
        return False
    store.dataset.create_index(
        "pooled",
        "IVF_PQ",
        metric="cosine",
        replace=True,
        num_partitions=math.isqrt(rows),
        num_sub_vectors=dim // 8 if dim % 8 == 0 else 1,  # a byte for each
    )
    store.refresh()
    return True


def bytes_of_row(store: EmbeddingStore) -> int:
    """Bytes of a row, from the shapes of a few."""
    columns = ["shape", "early_shape"]
    table = store.dataset.scanner(columns=columns, filter="state = 'ok'", limit=64).to_table()
    shapes = [shape for row in table.to_pylist() for shape in row.values() if shape]
    numbers = sum(math.prod(shape) for shape in shapes) // max(1, len(table))
    width = {"fp32": 4, "fp16": 2, "int8": 1}[store.recipe.dtype]
    return int(numbers * width + 4 * store.recipe.pooled_dim + _OTHER_BYTES)


def version_facts(store: EmbeddingStore) -> dict[str, str]:
    """Backend, device and versions of the newest commit that says them."""
    for version in range(store.dataset.version, 0, -1):
        try:
            found = store.dataset.read_transaction(version)
        except (OSError, ValueError):
            break
        if found is not None and found.transaction_properties:
            return dict(found.transaction_properties)
    return {}


def explain(err: Exception, url: str) -> str:
    """An error of Lance or of the disk while rows are written, in words."""
    text = first_line(err)
    if any(words in text for words in ("No space left", "File too large", "Disk quota")):
        return f"no room is left for {url} ({text}); what was committed stays"
    return f"{url} cannot be written: {text}"
