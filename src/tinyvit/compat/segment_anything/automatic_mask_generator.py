"""segment-anything's ``automatic_mask_generator``."""

from tinyvit.sam.automatic import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
