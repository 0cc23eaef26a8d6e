"""Random weights and images that depend on a name alone, so that all contestants get the same.

Every tensor is random, batch statistics too: nothing is at a neutral start that some code could
take for granted. Needs numpy only.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def values(name: str, shape: Sequence[int]) -> np.ndarray:
    """Normal noise for a name: [*shape] float32, mean 0, deviation 1."""
    seed = zlib.crc32(name.encode())
    return np.random.default_rng(seed).standard_normal(tuple(shape), dtype=np.float32)


def weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """The tensor of a key in tinyvit's spelling: [*shape] float32, of a size that keeps maps so.

    A count of batches is a whole number.
    """
    if name.endswith("num_batches_tracked"):
        return np.array(1 + zlib.crc32(name.encode()) % 1000, dtype=np.int64)
    noise = values(name, shape)
    if name.endswith("running_var"):
        return 0.5 + np.abs(noise)
    if name.endswith(("running_mean", "bias")):
        return 0.2 * noise
    if name.endswith("attention_biases"):
        return noise
    if len(shape) == 1:  # weight of a norm
        return 1 + 0.2 * noise
    return noise * np.float32(np.prod(shape[1:]) ** -0.5)


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """All tensors of a model, from key to shape."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def images(batch: int, size: int) -> np.ndarray:
    """[batch, 3, size, size] float32, prepared images of noise; the first ones are always so."""
    return np.stack([values(f"image {i} of {size}", (3, size, size)) for i in range(batch)])
