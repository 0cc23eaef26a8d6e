"""Modules under the names of segment-anything and MobileSAM, over the code of this package.

Code written for them runs when ``segment_anything`` becomes ``tinyvit.compat.segment_anything`` and
``mobile_sam`` becomes ``tinyvit.compat.mobile_sam``.
"""

from tinyvit.lazy import need_torch

need_torch(__name__)
