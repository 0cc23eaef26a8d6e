"""TinyViT's native engine behind numpy: ``Net(Config(...), tensors).encode(images)``."""

from ._net import Config, NativeError, Net, abi_version, has_bf16, version

__all__ = ["Config", "NativeError", "Net", "abi_version", "has_bf16", "version"]
