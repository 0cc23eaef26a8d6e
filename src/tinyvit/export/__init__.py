"""Export a model for other programs, with a certificate that it gives what the model gives."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
