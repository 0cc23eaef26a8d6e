"""MobileSAM's ``modeling.common``."""

from tinyvit.compat.segment_anything.modeling.common import *  # noqa: F403
