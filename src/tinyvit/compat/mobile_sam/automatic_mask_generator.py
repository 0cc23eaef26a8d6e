"""MobileSAM's ``automatic_mask_generator``."""

from tinyvit.compat.segment_anything.automatic_mask_generator import (
    SamAutomaticMaskGenerator as SamAutomaticMaskGenerator,
)
