"""Embeddings of images by the SHA-256 of their bytes, within a bound of memory.

No pixels are kept. What the prompts on one image share (``Decoder.prepare``) is kept beside its
embedding, and is the first to go.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvit.errors import CheckpointError, TinyViTError
from tinyvit.sam.embedding import ImageEmbedding

if TYPE_CHECKING:
    from tinyvit.embed import EmbeddingStore

logger = logging.getLogger("tinyvit.serve")

PREPARED_SHARE = 0.5  # of the bound, for what prompts share: 9 images of 1024 pixels in 512 MB


class Cache:
    """The embeddings that a server has at hand.

    May be used by several threads.

    Args:
        most_bytes: Of embeddings and what their prompts share.
        keep: Folder in which embeddings are kept, too; shared by the workers of one model.
        check: Raises ValueError for an embedding of another model.

    Attributes:
        store: Where images are looked up, too, that are neither in memory nor in the folder; only
            read, and of this model.
    """

    def __init__(
        self, most_bytes: int, keep: Path | None, check: Callable[[ImageEmbedding], None]
    ) -> None:
        self.most_bytes, self.keep, self._check = most_bytes, keep, check
        self.store: EmbeddingStore | None = None
        self.on_event: Callable[[str], None] = lambda event: None
        self._lock = threading.Lock()
        self._embeddings: OrderedDict[str, ImageEmbedding] = OrderedDict()
        self._prepared: OrderedDict[str, Any] = OrderedDict()
        self._bytes = {"embeddings": 0, "prepared": 0}

    def __len__(self) -> int:
        return len(self._embeddings)

    @property
    def has_more(self) -> bool:
        """Whether ``load`` may know images that are not in memory."""
        return self.keep is not None or self.store is not None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(self._bytes.values())

    def get(self, image_id: str) -> ImageEmbedding | None:
        """An image's embedding from memory; None for one that is not there."""
        with self._lock:
            found = self._embeddings.get(image_id)
            if found is not None:
                self._embeddings.move_to_end(image_id)
        if found is not None or not self.has_more:
            self.on_event("miss" if found is None else "hit")
        return found

    def load(self, image_id: str) -> ImageEmbedding | None:
        """An image's embedding from the folder or the store; None where none of it is usable."""
        found = None
        if self.keep is not None and (path := self._path(self.keep, image_id)).is_file():
            try:
                found = ImageEmbedding.load(path)
                self._check(found)
            except (CheckpointError, ValueError, OSError) as err:
                logger.warning("a kept embedding is not used: %s", str(err)[:200])
                found = None
        if found is None and self.store is not None:
            found = _look_up(self.store, image_id)
        self.on_event("miss" if found is None else "hit")
        if found is not None:
            self.put(image_id, found, is_new=False)
        return found

    def put(self, image_id: str, embedding: ImageEmbedding, *, is_new: bool = True) -> None:
        """Keep an embedding; the ones used longest ago go."""
        with self._lock:
            if image_id not in self._embeddings:
                self._embeddings[image_id] = embedding
                self._bytes["embeddings"] += size_of(embedding)
            self._embeddings.move_to_end(image_id)
            self._shrink()
        if is_new and self.keep is not None:
            path = self._path(self.keep, image_id)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                embedding.save(path, dtype="fp16")
            except (CheckpointError, OSError) as err:
                logger.warning("an embedding could not be kept: %s", str(err)[:200])

    def prepared(self, image_id: str, make: Callable[[], Any]) -> Any:
        """What the prompts on an image share; made where it is not kept."""
        with self._lock:
            found = self._prepared.get(image_id)
            if found is not None:
                self._prepared.move_to_end(image_id)
                return found
        made = make()
        with self._lock:
            if image_id in self._embeddings and image_id not in self._prepared:
                self._prepared[image_id] = made
                self._bytes["prepared"] += made.nbytes
                self._shrink()
        return made

    def forget(self, image_id: str) -> None:
        """Drop an image here and in the folder."""
        with self._lock:
            self._drop(image_id)
        if self.keep is not None:
            self._path(self.keep, image_id).unlink(missing_ok=True)

    def _shrink(self) -> None:
        share = PREPARED_SHARE * self.most_bytes
        while len(self._prepared) > 1 and self._bytes["prepared"] > share:
            self._bytes["prepared"] -= self._prepared.popitem(last=False)[1].nbytes
        while len(self._embeddings) > 1 and self.nbytes > self.most_bytes:
            self._drop(next(iter(self._embeddings)))
            self.on_event("evicted")

    def _drop(self, image_id: str) -> None:
        embedding = self._embeddings.pop(image_id, None)
        if embedding is not None:
            self._bytes["embeddings"] -= size_of(embedding)
        prepared = self._prepared.pop(image_id, None)
        if prepared is not None:
            self._bytes["prepared"] -= prepared.nbytes

    @staticmethod
    def _path(folder: Path, image_id: str) -> Path:
        return folder / image_id[:2] / f"{image_id}.safetensors"


def _look_up(store: EmbeddingStore, image_id: str) -> ImageEmbedding | None:
    """An image by its content; what others have stored since the last look is seen."""
    try:
        row = store.find_content(image_id)
        if row is None:
            store.refresh()
            row = store.find_content(image_id)
        return None if row is None else row.to_embedding(store.recipe)
    except (TinyViTError, ValueError, OSError) as err:
        logger.warning("the store is not used for an image: %s", str(err)[:200])
        return None


def size_of(embedding: ImageEmbedding) -> int:
    """Bytes of an embedding's arrays."""
    early = embedding.interm_features
    return int(embedding.features.nbytes) + (0 if early is None else int(early.nbytes))
