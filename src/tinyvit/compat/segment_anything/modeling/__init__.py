"""segment-anything's ``modeling``: the networks."""

from .image_encoder import ImageEncoderViT as ImageEncoderViT
from .mask_decoder import MaskDecoder as MaskDecoder
from .prompt_encoder import PromptEncoder as PromptEncoder
from .sam import Sam as Sam
from .transformer import TwoWayTransformer as TwoWayTransformer
