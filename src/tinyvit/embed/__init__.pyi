from .run import EmbedEstimate as EmbedEstimate
from .run import EmbedReport as EmbedReport
from .run import embed_images as embed_images
from .run import estimate as estimate
from .store import EmbeddingStore as EmbeddingStore
from .store import Match as Match
from .store import UnknownImageError as UnknownImageError
from .work import EmbedOutcome as EmbedOutcome
