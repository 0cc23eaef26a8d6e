"""segment-anything's ``modeling.sam``."""

from tinyvit.sam.model import Sam as Sam
