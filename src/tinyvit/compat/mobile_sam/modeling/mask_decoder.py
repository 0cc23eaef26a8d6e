"""MobileSAM's ``modeling.mask_decoder``."""

from tinyvit.compat.segment_anything.modeling.mask_decoder import *  # noqa: F403
