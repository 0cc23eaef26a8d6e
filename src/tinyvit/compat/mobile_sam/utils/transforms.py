"""MobileSAM's ``utils.transforms``."""

from tinyvit.compat.segment_anything.utils.transforms import *  # noqa: F403
