"""A store's rows as files for other programs: safetensors, numpy, Parquet."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tinyvit.checkpoints.files import write_text

from .store import CHUNK, EmbeddingStore

To = Literal["files", "npy", "parquet"]


def export_store(
    store: EmbeddingStore,
    to: To,
    output: str | os.PathLike[str],
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Write what a store holds in another form.

    Args:
        store: The store.
        to: "files": for each image NAME.safetensors, as ``ImageEmbedding.save`` writes it, in
            float16 where the store has that; "npy": ``pooled.npy`` [N, D] float32 and
            ``paths.txt``, an escaped path in each line; "parquet": all columns but the maps, as
            ``rows.parquet``.
        output: A folder that is made, or is empty.
        progress: Is given (images done, images in all).

    Returns:
        Images written.

    Raises:
        ValueError: ``to`` is unknown, the folder is not empty, or the store has no features.
        CheckpointError: A file cannot be written.
    """
    if to not in get_args(To):
        raise ValueError(f"to must be one of {', '.join(get_args(To))}; came {to!r}")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty; choose another folder")
    if to == "files":
        return _write_files(store, folder, progress)
    folder.mkdir(parents=True, exist_ok=True)
    if to == "npy":
        paths, matrix = store.vectors()
        np.save(folder / "pooled.npy", matrix, allow_pickle=False)
        lines = [path.encode("unicode_escape").decode("ascii") for path in paths]
        write_text(folder / "paths.txt", "".join(f"{line}\n" for line in lines))
        return len(paths)
    return _write_parquet(store, folder / "rows.parquet")


def _write_files(
    store: EmbeddingStore, folder: Path, progress: Callable[[int, int], object] | None
) -> int:
    stream = store.iterate()  # refuses a store without features before a folder is made
    dtype: Literal["fp16", "fp32"] = "fp16" if store.recipe.dtype == "fp16" else "fp32"
    total, done = len(store), 0
    for path, embedding in stream:
        target = folder / f"{path}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        embedding.save(target, dtype=dtype)
        done += 1
        if progress is not None:
            progress(done, total)
    return done


def _write_parquet(store: EmbeddingStore, target: Path) -> int:
    from pyarrow import parquet

    from .rows import PLAIN

    scanner = store.dataset.scanner(columns=list(PLAIN), batch_size=64 * CHUNK)
    count = 0
    with parquet.ParquetWriter(target, scanner.projected_schema) as writer:
        for batch in scanner.to_batches():
            writer.write_batch(batch)
            count += batch.num_rows
    return count
