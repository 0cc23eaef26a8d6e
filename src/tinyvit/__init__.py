"""TinyViT, the compact vision transformer: encoder, classifier, segmenter, for any image size.

The public names are found on first use, so that ``import tinyvit`` takes milliseconds and loads no
torch. Everything else is reached by its package: ``tinyvit.modules`` has the ten module classes,
``tinyvit.checkpoints`` reads and converts files of weights, ``tinyvit.images`` decodes and draws.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
