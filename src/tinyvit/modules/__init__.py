"""The network: nn.Modules only. Tensors in, tensors out; no files, no checkpoint names.

The ten classes of TinyViT keep the names, arguments, child names and state-dict keys under which
they are known from Cream, MobileSAM and their copies.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
