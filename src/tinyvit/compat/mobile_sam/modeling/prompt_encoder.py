"""MobileSAM's ``modeling.prompt_encoder``."""

from tinyvit.compat.segment_anything.modeling.prompt_encoder import *  # noqa: F403
