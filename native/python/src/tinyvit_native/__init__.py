"""TinyViT's native engine behind numpy: ``Net`` encodes images, ``Decoder`` gives masks."""

from ._decoder import Decoder, Placement, Prepared, Region, enlarge
from ._net import Config, NativeError, Net, abi_version, has_bf16, version

__all__ = [
    "Config",
    "Decoder",
    "NativeError",
    "Net",
    "Placement",
    "Prepared",
    "Region",
    "abi_version",
    "enlarge",
    "has_bf16",
    "version",
]
