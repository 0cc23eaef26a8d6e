"""The network: nn.Modules only. Tensors in, tensors out; no files, no checkpoint names.

The ten classes of TinyViT keep the names, arguments, child names and state-dict keys under which
they are known from Cream, MobileSAM and their copies.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
