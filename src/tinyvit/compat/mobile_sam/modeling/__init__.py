"""MobileSAM's ``modeling``: the networks."""

from tinyvit.compat.segment_anything.modeling import ImageEncoderViT as ImageEncoderViT
from tinyvit.compat.segment_anything.modeling import MaskDecoder as MaskDecoder
from tinyvit.compat.segment_anything.modeling import PromptEncoder as PromptEncoder
from tinyvit.compat.segment_anything.modeling import Sam as Sam
from tinyvit.compat.segment_anything.modeling import TwoWayTransformer as TwoWayTransformer

from .tiny_vit_sam import TinyViT as TinyViT
