"""MobileSAM's ``predictor``."""

from tinyvit.compat.segment_anything.predictor import SamPredictor as SamPredictor
