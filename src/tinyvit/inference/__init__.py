"""A model that answers: images in, features out, on any backend.

Names are found on first use: ``OpenVINOGraph`` loads no torch.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
