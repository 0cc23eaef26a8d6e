"""MobileSAM's ``modeling.tiny_vit_sam``."""

from tinyvit.modules import TinyViT as TinyViT
