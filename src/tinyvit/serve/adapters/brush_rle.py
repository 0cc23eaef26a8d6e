"""Label Studio's brush format: a mask as runs of RGBA values, packed bit by bit.

32 bits number of values (4 a pixel, row by row), 5 bits word size - 1, four times 4 bits size of a
run's length - 1; then the runs: 1 bit (a run), 2 bits which size, length - 1, the value.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SIZES = (3, 4, 8, 16)  # bits of a run's length
_WORD = 8
_LONGEST = 1 << _SIZES[-1]


def encode(mask: NDArray[np.bool_]) -> list[int]:
    """A mask [H, W] bool as the bytes that a ``brushlabels`` result has in ``rle``."""
    flat = mask.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate([[0], edges])
    lengths = 4 * np.diff(np.concatenate([starts, [len(flat)]]))
    values = np.where(flat[starts], 255, 0)
    pieces = -(-lengths // _LONGEST)
    values, last = np.repeat(values, pieces), np.cumsum(pieces) - 1
    runs = np.full(int(pieces.sum()), _LONGEST, np.int64)
    runs[last] = lengths - (pieces - 1) * _LONGEST
    which = np.searchsorted(np.array([1 << bits for bits in _SIZES]), runs)
    bits = np.array(_SIZES)[which]
    codes = (((4 + which) << bits | (runs - 1)) << _WORD) | values
    sizes = 3 + bits + _WORD
    head = [(4 * mask.size, 32), (_WORD - 1, 5), *((size - 1, 4) for size in _SIZES)]
    codes = np.concatenate([[code for code, _ in head], codes])
    sizes = np.concatenate([[size for _, size in head], sizes])
    ends = np.cumsum(sizes)
    place = np.repeat(ends, sizes) - 1 - np.arange(ends[-1])
    packed = np.packbits((np.repeat(codes, sizes) >> place & 1).astype(np.uint8))
    return [int(value) for value in packed]


def decode(values: list[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask [H, W] bool that ``encode`` has written.

    Raises:
        ValueError: The bytes are of another size or cut off.
    """
    bits = "".join(f"{value:08b}" for value in values)
    at = 0

    def read(count: int) -> int:
        nonlocal at
        if at + count > len(bits):
            raise ValueError("the brush ends too early")
        at += count
        return int(bits[at - count : at], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    if total != 4 * size[0] * size[1]:
        raise ValueError(f"the brush has {total} values, wanted {4 * size[0] * size[1]}")
    out, done = np.empty(total, np.uint8), 0
    while done < total:
        is_run, length = read(1), 0
        length = read(sizes[read(2)]) + 1
        if is_run:
            out[done : done + length] = read(word)
        else:
            for place in range(done, done + length):
                out[place] = read(word)
        done += length
    return out.reshape(*size, 4)[..., 3] > 127
