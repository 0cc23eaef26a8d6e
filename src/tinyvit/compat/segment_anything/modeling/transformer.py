"""segment-anything's ``modeling.transformer``."""

from tinyvit.modules.sam.mask_decoder import Attention as Attention
from tinyvit.modules.sam.mask_decoder import TwoWayAttentionBlock as TwoWayAttentionBlock
from tinyvit.modules.sam.mask_decoder import TwoWayTransformer as TwoWayTransformer
