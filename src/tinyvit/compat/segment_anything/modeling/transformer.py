"""segment-anything's ``modeling.transformer``."""

from tinyvit.modules.sam.transformer import Attention as Attention
from tinyvit.modules.sam.transformer import TwoWayAttentionBlock as TwoWayAttentionBlock
from tinyvit.modules.sam.transformer import TwoWayTransformer as TwoWayTransformer
