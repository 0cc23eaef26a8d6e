"""segment-anything's ``utils``."""
