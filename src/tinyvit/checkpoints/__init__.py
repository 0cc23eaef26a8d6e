"""Files of weights: read, recognise, convert, resize and download them.

One loader for TinyViT's whole lineage. The steps are functions of their own, each dict to dict or
file to file, and no step builds a model::

    fetch / path -> read_state_dict -> detect -> to_canonical -> resize_bias_tables -> your model

``inspect`` and ``convert`` put them together for people. Names are found on first use: what needs
no tensors (the cache's paths, say) loads no torch.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
