"""Promptable segmentation: points, boxes and masks in, masks out; a drop-in for MobileSAM.

Names are found on first use.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
