"""segment-anything's ``build_sam``: its builders, for models with a TinyViT encoder."""

from __future__ import annotations

import os
from functools import partial

from tinyvit.sam.model import Sam
from tinyvit.sam.model import build_sam as build_sam
from tinyvit.sam.model import sam_model_registry as sam_model_registry


def _refuse(name: str, checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Say what is supported: ``UnknownModelError``."""
    return sam_model_registry[name](checkpoint=checkpoint)


build_sam_vit_h = partial(_refuse, "vit_h")
build_sam_vit_l = partial(_refuse, "vit_l")
build_sam_vit_b = partial(_refuse, "vit_b")
