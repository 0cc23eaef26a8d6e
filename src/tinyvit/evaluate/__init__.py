"""Measures: how good a classifier or a segmenter is, with intervals, and what it costs.

Each job is one function in a file of its own; names are found on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
