"""Where the package keeps what tests from outside use: imports and names, no logic."""

from types import SimpleNamespace

from tinyvit.images import mask_ops
from tinyvit.images.decode import decode
from tinyvit.train import open_data_set, open_mask_set

rle = SimpleNamespace(encode=mask_ops.encode, decode=mask_ops.decode, to_box=mask_ops.to_box)

__all__ = ["decode", "open_data_set", "open_mask_set", "rle"]
