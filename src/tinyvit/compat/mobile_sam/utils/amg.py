"""MobileSAM's ``utils.amg``."""

from tinyvit.compat.segment_anything.utils.amg import *  # noqa: F403
