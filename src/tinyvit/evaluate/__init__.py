"""Measures: how good a classifier or a segmenter is, with intervals, and what it costs.

Each job is one function in a file of its own; names are found on first use.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
