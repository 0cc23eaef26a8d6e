"""MobileSAM's ``modeling.sam``."""

from tinyvit.compat.segment_anything.modeling.sam import *  # noqa: F403
