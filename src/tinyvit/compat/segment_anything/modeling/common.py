"""segment-anything's ``modeling.common``."""

from tinyvit.modules import LayerNorm2d as LayerNorm2d
