"""One row of an embedding store: its columns, its numbers in fp16, int8 or fp32, its checksum.

No files here: arrays become an Arrow batch and come back. What is stored of a map is its bytes,
whose shape stands beside them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import TinyViTError
from tinyvit.image_spec import Placement
from tinyvit.sam.embedding import ImageEmbedding

from .recipe import Dtype, Recipe

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float32]

_NUMPY: dict[Dtype, type[np.generic]] = {"fp16": np.float16, "int8": np.int8, "fp32": np.float32}
_BLOB = {b"lance-encoding:blob": b"true"}  # Lance keeps these beside the rows

PLAIN = (
    *("path", "state", "sha256", "size", "mtime_ns", "height", "width", "placement", "shape"),
    *("scales", "early_shape", "early_scales", "pooled", "reason", "made", "checksum"),
)
"""Columns without maps."""

MAPS = ("features", "early")
"""Columns with the bytes of a map."""


class DamagedRowError(TinyViTError):
    """A row of a store whose bytes are not those that were written."""


@dataclass(frozen=True, eq=False)
class StoreRow:
    """What a store has of one image, as it is stored.

    Attributes:
        path: Of the image, relative to the source, ``/`` between folders.
        state: "ok" or "failed".
        sha256: Of the file in hexadecimal digits; empty where it could not be read.
        size: Of the file in bytes.
        mtime_ns: When the file was changed, in nanoseconds.
        reason: Why it failed, or empty.
        made: When the row was made, in UTC.
        placement: Where the image lies in the model's input; None for a failed row.
        features: [C, h, w] float16, int8 or float32; None where they are not kept or not read.
        scales: [C] float32: what int8 features are multiplied with; else None.
        early: [h, w, D], Light HQ-SAM's early map, of the same type; None where not kept.
        early_scales: [D] float32 for int8; else None.
        pooled: [D] float32, the vector that images are compared by; None for a failed row.
    """

    path: str
    state: Literal["ok", "failed"]
    sha256: str
    size: int
    mtime_ns: int
    reason: str
    made: datetime
    placement: Placement | None = None
    features: NDArray[Any] | None = None
    scales: Floats | None = None
    early: NDArray[Any] | None = None
    early_scales: Floats | None = None
    pooled: Floats | None = None

    def __repr__(self) -> str:
        return f"StoreRow({self.path!r}, {self.state!r})"

    @property
    def nbytes(self) -> int:
        """Bytes of its maps and its vector."""
        arrays = self.features, self.scales, self.early, self.early_scales, self.pooled
        return sum(array.nbytes for array in arrays if array is not None)

    def checksum(self) -> int:
        """CRC-32 of all that is served of the row."""
        placement = self.placement and _numbers_of(self.placement)
        sum_ = zlib.crc32(f"{self.path}\n{self.state}\n{self.sha256}\n{placement}".encode())
        for array in (self.features, self.scales, self.early, self.early_scales, self.pooled):
            sum_ = zlib.crc32(b"-" if array is None else f"{array.shape}".encode(), sum_)
            if array is not None:
                sum_ = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, sum_)
        return sum_

    def to_embedding(self, recipe: Recipe) -> ImageEmbedding:
        """The embedding in float32.

        Raises:
            ValueError: The row has no features.
        """
        if self.features is None or self.placement is None:
            raise ValueError(f"{self.path!r} has no features; its row is {self.state!r}")
        early = None if self.early is None else dequantise(self.early, self.early_scales, -1)
        return ImageEmbedding(
            dequantise(self.features, self.scales, 0),
            self.placement,
            recipe.image_spec,
            recipe.weights_sha256,
            early,
            recipe.precision,
        )


# -- numbers -----------------------------------------------------------------------------------


def quantise(values: Floats, dtype: Dtype, axis: int) -> tuple[NDArray[Any], Floats | None]:
    """Store a map in ``dtype``; for int8 with a scale for each channel along ``axis``.

    Returns:
        (values, scales [C] float32 or None); an int8 value times its scale is within half a scale
        of what was given.

    Raises:
        ValueError: A value is not finite, or not in ``dtype``.
    """
    if dtype != "int8":
        with np.errstate(over="ignore"):
            stored = values.astype(_NUMPY[dtype])
        if not np.isfinite(stored).all():
            raise ValueError(_not_finite(values, dtype))
        return stored, None
    others = _others(values, axis)
    largest = np.abs(values).max(others)
    if not np.isfinite(largest).all():
        raise ValueError(_not_finite(values, dtype))
    scales = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny).astype(np.float32)
    rounded = np.rint(values / np.expand_dims(scales, others))
    return np.clip(rounded, -127, 127).astype(np.int8), scales


def dequantise(stored: NDArray[Any], scales: Floats | None, axis: int) -> Floats:
    """Float32 of what ``quantise`` gave."""
    values: Floats = stored.astype(np.float32)
    if scales is not None:
        values *= np.expand_dims(scales, _others(values, axis))
    return values


def _others(values: Floats, axis: int) -> tuple[int, ...]:
    """All axes but one."""
    return tuple(i for i in range(values.ndim) if i != axis % values.ndim)


def _not_finite(values: Floats, dtype: str) -> str:
    if np.isfinite(values).all():
        return f"its features are too large for {dtype}; make the store with --dtype fp32 (dtype=)"
    return "its features are not all finite numbers; try --precision fp32 (precision=)"


# -- Arrow -------------------------------------------------------------------------------------


def schema_of(recipe: Recipe) -> pa.Schema:
    """The columns of a store, and the recipe as metadata."""
    import pyarrow as pa

    ints, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    types = {
        **{name: pa.string() for name in ("path", "state", "sha256", "reason")},
        **{name: pa.int64() for name in ("size", "mtime_ns")},
        **{name: pa.int32() for name in ("height", "width")},
        "placement": ints,  # resized (height, width), crop (top, left), model (height, width)
        **{"shape": ints, "scales": floats, "early_shape": ints, "early_scales": floats},
        "pooled": pa.list_(pa.float32(), recipe.pooled_dim),
        "made": pa.timestamp("us", "UTC"),
        "checksum": pa.uint32(),
    }
    blobs = [pa.field(name, pa.large_binary(), metadata=_BLOB) for name in MAPS]
    plain = [pa.field(name, types[name]) for name in PLAIN]
    return pa.schema([*plain, *blobs], metadata=recipe.to_metadata())


def to_batch(rows: Sequence[StoreRow], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as Arrow has them."""
    import pyarrow as pa

    numbers = [row.placement and _numbers_of(row.placement) for row in rows]
    columns: dict[str, list[Any]] = {
        "height": [one and one[0] for one in numbers],
        "width": [one and one[1] for one in numbers],
        "placement": [one and one[2:] for one in numbers],
        "shape": [_shape(row.features) for row in rows],
        "early_shape": [_shape(row.early) for row in rows],
        "checksum": [row.checksum() for row in rows],
        **{name: [_bytes(getattr(row, name)) for row in rows] for name in MAPS},
    }
    for name in (*PLAIN, *MAPS):
        if name not in columns:
            columns[name] = [getattr(row, name) for row in rows]
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def from_values(
    values: Mapping[str, Any], maps: Mapping[str, bytes | None], recipe: Recipe, store: str
) -> StoreRow:
    """A row of its plain columns and the bytes of its maps, checked where all of them are there.

    Raises:
        DamagedRowError: Its bytes are not those that were written.
    """
    path = values["path"]
    try:
        row = _row_of(values, maps, recipe)
    except (TypeError, ValueError, KeyError) as err:
        raise DamagedRowError(_damaged(path, store)) from err
    if set(MAPS) <= maps.keys() and row.checksum() != values["checksum"]:
        raise DamagedRowError(_damaged(path, store))
    return row


def _row_of(
    values: Mapping[str, Any], maps: Mapping[str, bytes | None], recipe: Recipe
) -> StoreRow:
    numbers, dtype = values["placement"], _NUMPY[recipe.dtype]
    placement = None
    if numbers is not None:
        height, width, top, left, model_height, model_width = numbers
        size, crop = (values["height"], values["width"]), (top, left)
        placement = Placement(size, (height, width), crop, (model_height, model_width))

    def array(name: str, shape: str) -> NDArray[Any] | None:
        data = maps.get(name)
        return None if data is None else np.frombuffer(data, dtype).reshape(values[shape])

    def floats(name: str) -> Floats | None:
        return None if values[name] is None else np.asarray(values[name], np.float32)

    facts = {name: values[name] for name in ("path", "state", "sha256", "size", "mtime_ns", "made")}
    return StoreRow(
        **facts,
        reason=values["reason"] or "",
        placement=placement,
        features=array("features", "shape"),
        early=array("early", "early_shape"),
        scales=floats("scales"),
        early_scales=floats("early_scales"),
        pooled=floats("pooled"),
    )


def _damaged(path: str, store: str) -> str:
    return (
        f"the row of {path!r} in {store} is damaged: its checksum is another; take such rows out "
        f"with 'tinyvit store verify {store} --repair' and embed again"
    )


def _numbers_of(placement: Placement) -> list[int]:
    pairs = placement.original_size, placement.resized_size
    return [int(n) for pair in (*pairs, placement.crop_offset, placement.model_size) for n in pair]


def _shape(array: NDArray[Any] | None) -> list[int] | None:
    return None if array is None else list(array.shape)


def _bytes(array: NDArray[Any] | None) -> bytes | None:
    return None if array is None else array.tobytes()
