"""segment-anything's ``modeling.image_encoder``; the image encoder here is always a TinyViT."""

from tinyvit.modules import TinyViT as ImageEncoderViT

__all__ = ["ImageEncoderViT"]
