"""segment-anything's ``modeling.mask_decoder``."""

from tinyvit.modules.sam.mask_decoder import MLP as MLP
from tinyvit.modules.sam.mask_decoder import MaskDecoder as MaskDecoder
