"""The network: nn.Modules only. Tensors in, tensors out; no files, no checkpoint names.

The ten classes of TinyViT keep the names, arguments, child names and state-dict keys under which
they are known from Cream, MobileSAM and their copies.
"""

from .layers import (
    MLP,
    Attention,
    Conv2d_BN,
    DropPath,
    LayerNorm2d,
    MBConv,
    Mlp,
    PatchEmbed,
    PatchMerging,
    TinyViTBlock,
    freeze_batch_stats,
)
from .stage import BasicLayer, ConvLayer, FeatureInfo, SAM3Neck
from .tiny_vit import FeatureMaps, TinyViT

__all__ = [
    "MLP",
    "Attention",
    "BasicLayer",
    "Conv2d_BN",
    "ConvLayer",
    "DropPath",
    "FeatureInfo",
    "FeatureMaps",
    "LayerNorm2d",
    "MBConv",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SAM3Neck",
    "TinyViT",
    "TinyViTBlock",
    "freeze_batch_stats",
]
