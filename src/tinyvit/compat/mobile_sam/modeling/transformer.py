"""MobileSAM's ``modeling.transformer``."""

from tinyvit.compat.segment_anything.modeling.transformer import *  # noqa: F403
