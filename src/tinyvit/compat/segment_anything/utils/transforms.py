"""segment-anything's ``utils.transforms``."""

from tinyvit.images.preprocess import ResizeLongestSide as ResizeLongestSide
