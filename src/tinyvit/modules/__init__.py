"""The network: nn.Modules only. Tensors in, tensors out; no files, no checkpoint names.

The ten classes of TinyViT keep the names, arguments, child names and state-dict keys under which
they are known from Cream, MobileSAM and their copies.
"""

from .attention import Attention
from .block import TinyViTBlock
from .conv import Conv2d_BN, LayerNorm2d, freeze_batch_stats
from .drop import DropPath
from .features import FeatureInfo, FeatureMaps
from .mbconv import MBConv
from .mlp import MLP, Mlp
from .patch import PatchEmbed, PatchMerging
from .stage import BasicLayer, ConvLayer
from .tiny_vit import TinyViT

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
    "TinyViT",
    "TinyViTBlock",
    "freeze_batch_stats",
]
