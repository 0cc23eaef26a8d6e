"""MobileSAM's ``build_sam``."""

from tinyvit.compat.segment_anything.build_sam import build_sam as build_sam
from tinyvit.compat.segment_anything.build_sam import build_sam_vit_b as build_sam_vit_b
from tinyvit.compat.segment_anything.build_sam import build_sam_vit_h as build_sam_vit_h
from tinyvit.compat.segment_anything.build_sam import build_sam_vit_l as build_sam_vit_l
from tinyvit.compat.segment_anything.build_sam import sam_model_registry as sam_model_registry

build_sam_vit_t = sam_model_registry["vit_t"]
