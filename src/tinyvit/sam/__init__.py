"""Promptable segmentation: points, boxes and masks in, masks out; a drop-in for MobileSAM.

Names are found on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
