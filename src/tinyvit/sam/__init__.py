"""Promptable segmentation: points, boxes and masks in, masks out; a drop-in for MobileSAM.

Names are found on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .automatic import SamAutomaticMaskGenerator
    from .build import build_sam, sam_model_registry
    from .embedding import ImageEmbedding
    from .hq_mask_decoder import HQMaskDecoder
    from .mask_decoder import MaskDecoder
    from .model import Sam
    from .predictor import SamPredictor
    from .prompt_encoder import PromptEncoder
    from .prompts import Prompt
    from .segmenter import Masks, Segmenter
    from .transformer import TwoWayTransformer

_HOMES = {
    "HQMaskDecoder": "hq_mask_decoder",
    "ImageEmbedding": "embedding",
    "MaskDecoder": "mask_decoder",
    "Masks": "segmenter",
    "Prompt": "prompts",
    "PromptEncoder": "prompt_encoder",
    "Sam": "model",
    "SamAutomaticMaskGenerator": "automatic",
    "SamPredictor": "predictor",
    "Segmenter": "segmenter",
    "TwoWayTransformer": "transformer",
    "build_sam": "build",
    "sam_model_registry": "build",
}

__all__ = [
    "HQMaskDecoder",
    "ImageEmbedding",
    "MaskDecoder",
    "Masks",
    "Prompt",
    "PromptEncoder",
    "Sam",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "Segmenter",
    "TwoWayTransformer",
    "build_sam",
    "sam_model_registry",
]


def __getattr__(name: str) -> object:
    """Find a name in its file, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tinyvit.sam' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
