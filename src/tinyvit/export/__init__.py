"""Export a model for other programs, with a certificate that it gives what the model gives."""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
