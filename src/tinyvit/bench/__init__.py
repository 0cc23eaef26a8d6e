"""Honest timing: contestants in processes of their own, taken in turn, and what they cost."""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
