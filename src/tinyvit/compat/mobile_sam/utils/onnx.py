"""MobileSAM's ``utils.onnx``."""

from tinyvit.compat.segment_anything.utils.onnx import *  # noqa: F403
