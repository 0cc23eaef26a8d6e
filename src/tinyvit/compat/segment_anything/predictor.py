"""segment-anything's ``predictor``."""

from tinyvit.sam.predictor import SamPredictor as SamPredictor
