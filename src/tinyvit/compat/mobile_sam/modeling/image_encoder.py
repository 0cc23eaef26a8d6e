"""MobileSAM's ``modeling.image_encoder``."""

from tinyvit.compat.segment_anything.modeling.image_encoder import *  # noqa: F403
