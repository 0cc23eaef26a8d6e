"""segment-anything's ``modeling.prompt_encoder``."""

from tinyvit.modules.sam.prompt_encoder import (
    PositionEmbeddingRandom as PositionEmbeddingRandom,
)
from tinyvit.modules.sam.prompt_encoder import PromptEncoder as PromptEncoder
