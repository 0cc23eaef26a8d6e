"""A model that answers: images in, features out, on any backend.

Names are found on first use: ``OpenVINOGraph`` loads no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
