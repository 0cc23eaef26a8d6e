"""TinyViT, the compact vision transformer: encoder, classifier, segmenter, for any picture size.

The public names are found on first use, so that ``import tinyvit`` takes milliseconds and loads no
torch. Everything else is reached by its room: ``tinyvit.modules`` has the ten module classes,
``tinyvit.checkpoints`` reads and converts files of weights, ``tinyvit.images`` decodes and draws.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import version

    from tinyvit.allocator import tune_allocator
    from tinyvit.catalog import list_checkpoints, list_models
    from tinyvit.checkpoints.conversion import convert as convert_checkpoint
    from tinyvit.checkpoints.inspection import inspect as inspect_checkpoint
    from tinyvit.errors import (
        CheckpointError,
        DownloadError,
        ImageError,
        MissingExtraError,
        TinyViTError,
    )
    from tinyvit.factory import LoadReport, create_model, load_checkpoint
    from tinyvit.hub import from_pretrained, push_to_hub, save_pretrained
    from tinyvit.image_spec import ImageSpec
    from tinyvit.inference.engine import Encoded, Engine
    from tinyvit.modules import TinyViT
    from tinyvit.sam.automatic import SamAutomaticMaskGenerator
    from tinyvit.sam.build import build_sam, sam_model_registry
    from tinyvit.sam.embedding import ImageEmbedding
    from tinyvit.sam.masks import Masks
    from tinyvit.sam.predictor import SamPredictor
    from tinyvit.sam.prompts import Prompt
    from tinyvit.sam.segmenter import Segmenter

    __version__ = version("tinyvit")

_HOMES = {
    "CheckpointError": "errors:CheckpointError",
    "DownloadError": "errors:DownloadError",
    "Encoded": "inference.engine:Encoded",
    "Engine": "inference.engine:Engine",
    "ImageEmbedding": "sam.embedding:ImageEmbedding",
    "ImageError": "errors:ImageError",
    "ImageSpec": "image_spec:ImageSpec",
    "LoadReport": "factory:LoadReport",
    "Masks": "sam.masks:Masks",
    "MissingExtraError": "errors:MissingExtraError",
    "Prompt": "sam.prompts:Prompt",
    "SamAutomaticMaskGenerator": "sam.automatic:SamAutomaticMaskGenerator",
    "SamPredictor": "sam.predictor:SamPredictor",
    "Segmenter": "sam.segmenter:Segmenter",
    "TinyViT": "modules:TinyViT",
    "TinyViTError": "errors:TinyViTError",
    "build_sam": "sam.build:build_sam",
    "convert_checkpoint": "checkpoints.conversion:convert",
    "create_model": "factory:create_model",
    "from_pretrained": "hub:from_pretrained",
    "inspect_checkpoint": "checkpoints.inspection:inspect",
    "list_checkpoints": "catalog:list_checkpoints",
    "list_models": "catalog:list_models",
    "load_checkpoint": "factory:load_checkpoint",
    "push_to_hub": "hub:push_to_hub",
    "sam_model_registry": "sam.build:sam_model_registry",
    "save_pretrained": "hub:save_pretrained",
    "tune_allocator": "allocator:tune_allocator",
}

__all__ = [
    "CheckpointError",
    "DownloadError",
    "Encoded",
    "Engine",
    "ImageEmbedding",
    "ImageError",
    "ImageSpec",
    "LoadReport",
    "Masks",
    "MissingExtraError",
    "Prompt",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "Segmenter",
    "TinyViT",
    "TinyViTError",
    "__version__",
    "build_sam",
    "convert_checkpoint",
    "create_model",
    "from_pretrained",
    "inspect_checkpoint",
    "list_checkpoints",
    "list_models",
    "load_checkpoint",
    "push_to_hub",
    "sam_model_registry",
    "save_pretrained",
    "tune_allocator",
]


def __getattr__(name: str) -> object:
    """Find a public name where it lives, and keep it."""
    if name == "__version__":
        value: object = importlib.import_module("importlib.metadata").version("tinyvit")
    elif name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        value = getattr(importlib.import_module(f"tinyvit.{module}"), attribute)
    else:
        raise AttributeError(f"module 'tinyvit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
