"""``EmbeddingStore``: a Lance dataset of embeddings, read by path, content, part or likeness.

Reading never needs the encoder. A store that others write to, compact and clean stays readable:
what was read from a version that is gone is read again from the newest.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import CheckpointError, MissingExtraError, TinyViTError
from tinyvit.factory import CONFIG, WEIGHTS
from tinyvit.inference.bundle import INDEX
from tinyvit.sam.embedding import ImageEmbedding

from .recipe import ENCODER, Dtype, Keep, Recipe, encoder_files
from .rows import MAPS, PLAIN, Floats, StoreRow, from_values, schema_of

if TYPE_CHECKING:
    import lance
    from typing_extensions import Self

    from tinyvit.inference import Engine

Value = TypeVar("Value")

INDEXED = ("path", "sha256")
"""Columns with a BTREE index."""

CHUNK = 16
"""Rows read together."""

_NAMES_COMPARED = 10_000
_PARTS = ("data", "_versions", "_transactions", "_indices", "_deletions", "_attempts")


class UnknownImageError(TinyViTError, KeyError):
    """A path that a store does not have, or has as failed; the message names the nearest three."""

    def __str__(self) -> str:
        return str(self.args[0])


class Match(NamedTuple):
    """One result of a search: an image and the cosine of its vector with the one searched for."""

    path: str
    similarity: float


class EmbeddingStore(Mapping[str, ImageEmbedding]):
    """Embeddings of many images, by the images' paths: a Lance dataset on a disk or in a bucket.

    Made by ``open`` or ``create``; filled by ``tinyvit.embed_images`` or ``tinyvit embed``. Only
    images that could be embedded are its items. It may be used by several threads, and pickles as
    its address. What others add is seen where a path is looked up that was not there, and after
    ``refresh``.

    Examples:
        >>> store = EmbeddingStore.open("photos.lance")  # doctest: +SKIP
        >>> store["trip/cat.jpg"]  # doctest: +SKIP
        ImageEmbedding([256, 64, 64], image 480x640)
    """

    def __init__(
        self, dataset: lance.LanceDataset, url: str, storage_options: Mapping[str, str] | None
    ) -> None:
        self.url = url
        self.storage_options = None if storage_options is None else dict(storage_options)
        self._dataset = dataset
        self._recipe = Recipe.from_metadata(dataset.schema.metadata, url)

    @classmethod
    def open(
        cls, url: str | os.PathLike[str], storage_options: Mapping[str, str] | None = None
    ) -> Self:
        """Open a store that is there.

        Args:
            url: A path, or an address such as "s3://bucket/photos.lance".
            storage_options: For the object store, as Lance takes them; None reads the environment.

        Raises:
            CheckpointError: There is no store, or it is damaged or of a newer format.
            MissingExtraError: pylance is not installed.
        """
        found = cls.find(url, storage_options)
        if found is None:
            raise CheckpointError(
                f"there is no embedding store at {os.fspath(url)}; make one with: "
                f"tinyvit embed IMAGES -o {os.fspath(url)}"
            )
        return found

    @classmethod
    def find(
        cls, url: str | os.PathLike[str], storage_options: Mapping[str, str] | None = None
    ) -> Self | None:
        """As ``open``; None where there is no store."""
        url = os.fspath(url)
        lance = load_lance()
        options = None if storage_options is None else dict(storage_options)
        try:
            dataset = lance.dataset(url, storage_options=options)
        except (OSError, ValueError) as err:
            if is_missing(err):
                return None
            raise CheckpointError(f"{url} cannot be opened: {first_line(err)}") from err
        return cls(dataset, url, options)

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        engine: Engine,
        *,
        dtype: Dtype = "fp16",
        keep: Keep | None = None,
        early: bool = False,
        storage_options: Mapping[str, str] | None = None,
    ) -> Self:
        """Make an empty store for what an engine gives, with a copy of its encoder.

        Args:
            url: A path that is not there yet, or an address.
            engine: Made of a model or a checkpoint.
            dtype: "fp16"; "int8" with a scale for each channel and image, half the bytes; "fp32".
            keep: "all": features and pooled vectors; "pooled": vectors alone; None: "all", and
                "pooled" of a classifier, which has no other.
            early: Keep Light HQ-SAM's early map, too.
            storage_options: As for ``open``.

        Raises:
            CheckpointError: There is something at ``url``, or it cannot be written.
            MissingExtraError: pylance is not installed.
            ValueError: A value that ``engine`` cannot give.
        """
        url = os.fspath(url)
        lance = load_lance()
        recipe = Recipe.of(engine, dtype, keep, early)
        options = None if storage_options is None else dict(storage_options)
        files = encoder_files(engine)
        is_taken = not is_remote(url) and Path(url).exists() and not _is_unfinished(Path(url))
        if is_taken or cls.find(url, options) is not None:
            raise CheckpointError(f"{url} is there already; open it, or choose another name")
        try:
            write_files(url, options, {f"{ENCODER}/{name}": files[name] for name in files})
            empty = schema_of(recipe).empty_table()
            dataset = lance.write_dataset(empty, url, mode="create", storage_options=options)
            for column in INDEXED:
                unless_conflict(partial(dataset.create_scalar_index, column, "BTREE"))
        except (OSError, ValueError) as err:
            raise CheckpointError(f"{url} cannot be made: {first_line(err)}") from err
        return cls(dataset, url, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.url, self.storage_options)

    def __repr__(self) -> str:
        return f"EmbeddingStore({self.url!r}, {len(self)} images)"

    @property
    def recipe(self) -> Recipe:
        """What all rows have in common."""
        return self._recipe

    @property
    def dataset(self) -> lance.LanceDataset:
        """The Lance dataset itself, at the version that is read."""
        return self._dataset

    def refresh(self) -> None:
        """See what others have written since."""
        self._dataset = load_lance().dataset(self.url, storage_options=self.storage_options)

    # -- by path -------------------------------------------------------------------------------

    def __getitem__(self, path: str) -> ImageEmbedding:
        return next(self.get_many([path]))

    def __contains__(self, path: object) -> bool:
        if not isinstance(path, str):
            return False
        where = f"{one_of('path', [path])} AND state = 'ok'"
        return self._read(lambda dataset: dataset.count_rows(where)) > 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths().to_pylist())

    def __len__(self) -> int:
        return self._read(lambda dataset: dataset.count_rows("state = 'ok'"))

    def get_many(self, paths: Iterable[str]) -> Iterator[ImageEmbedding]:
        """Embeddings in the order of their paths, in bounded memory.

        Raises:
            UnknownImageError: A path is not there, or failed; those before it have been given.
            DamagedRowError: A row's bytes are not those that were written.
            ValueError: The store keeps pooled vectors only.
        """
        self._check_maps()
        for row in self._many(paths):
            yield row.to_embedding(self._recipe)

    def rows(self, state: Literal["ok", "failed"] | None = None) -> Iterator[StoreRow]:
        """All rows, or those of a state, without their features and early maps."""
        where = None if state is None else f"state = '{state}'"
        scanner = self._dataset.scanner(columns=list(PLAIN), filter=where, batch_size=1024)
        for batch in scanner.to_batches():
            for values in batch.to_pylist():
                yield from_values(values, {}, self._recipe, self.url)

    def find_content(self, sha256: str) -> StoreRow | None:
        """The row of an image by the SHA-256 of its file (64 hexadecimal digits), or None."""
        where = f"{one_of('sha256', [sha256])} AND state = 'ok'"
        found = self._read(lambda dataset: self._rows(dataset, where, limit=1))
        return found[0] if found else None

    def read_rows(self, paths: Sequence[str]) -> dict[str, StoreRow]:
        """Rows by path, with everything that is stored; those that are not there are left out."""
        return self._by_path(paths)

    # -- in parts ------------------------------------------------------------------------------

    @overload
    def iterate(
        self,
        part: tuple[int, int] = (0, 1),
        shuffle: int | None = None,
        raw: Literal[False] = False,
    ) -> Iterator[tuple[str, ImageEmbedding]]: ...

    @overload
    def iterate(
        self, part: tuple[int, int] = (0, 1), shuffle: int | None = None, *, raw: Literal[True]
    ) -> Iterator[tuple[str, StoreRow]]: ...

    def iterate(
        self, part: tuple[int, int] = (0, 1), shuffle: int | None = None, raw: bool = False
    ) -> Iterator[tuple[str, ImageEmbedding]] | Iterator[tuple[str, StoreRow]]:
        """All images with their embeddings, or a part of them, as training wants them.

        Args:
            part: (number of the part from 0, parts in all); each image is in one of them.
            shuffle: A seed for another order; None: the order of the store.
            raw: Give ``StoreRow``s, whose arrays are as they are stored.

        Yields:
            (path, embedding) or (path, row).

        Raises:
            ValueError: A part that is not there, or a store that keeps vectors only without
                ``raw``.
        """
        number, parts = part
        if not 0 <= number < parts:
            raise ValueError(f"part must be (i, n) with 0 <= i < n, came {part}")
        if not raw:
            self._check_maps()
        return self._iterate(self._paths(), number, parts, shuffle, raw)

    def _iterate(
        self, paths: Any, number: int, parts: int, shuffle: int | None, raw: bool
    ) -> Iterator[Any]:
        order = np.arange(len(paths))
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(order)
        names = (str(paths[int(i)]) for i in order[number::parts])
        for row in self._many(names):
            yield row.path, row if raw else row.to_embedding(self._recipe)

    # -- by likeness ---------------------------------------------------------------------------

    def similar(self, to: str | NDArray[np.floating[Any]], k: int = 20) -> list[Match]:
        """The images whose vectors are nearest by their angle, nearest first.

        Args:
            to: The path of an image in the store, which is not among the results; or a vector [D],
                as ``Engine.stream(..., pooled=True)`` gives it.
            k: Results, at most.

        Raises:
            UnknownImageError: The path is not there.
            ValueError: A vector of another length, or ``k`` below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, came {k}")
        if isinstance(to, str):
            vector = next(self._many([to], maps=False)).pooled
        else:
            vector = np.asarray(to, np.float32)
        dim = self._recipe.pooled_dim
        if vector is None or vector.shape != (dim,):
            came = None if vector is None else list(vector.shape)
            raise ValueError(f"the vectors of {self.url} are [{dim}]; came {came}")
        extra = 1 if isinstance(to, str) else 0
        near = {"column": "pooled", "q": vector, "k": k + extra, "metric": "cosine"}
        found = self._read(
            lambda dataset: dataset.scanner(
                columns=["path", "_distance"], nearest=near, filter="state = 'ok'", prefilter=True
            ).to_table()
        )
        pairs = zip(found["path"].to_pylist(), found["_distance"].to_pylist(), strict=True)
        own = to if isinstance(to, str) else None
        return [Match(path, 1.0 - distance) for path, distance in pairs if path != own][:k]

    def vectors(self) -> tuple[list[str], Floats]:
        """(paths, their pooled vectors [N, D] float32), for other tools."""
        found = self._read(
            lambda dataset: dataset.to_table(columns=["path", "pooled"], filter="state = 'ok'")
        )
        flat = found["pooled"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        matrix: Floats = flat.astype(np.float32).reshape(-1, self._recipe.pooled_dim)
        return found["path"].to_pylist(), matrix

    # -- its encoder ---------------------------------------------------------------------------

    def load_engine(self, **arguments: Any) -> Engine:
        """An engine of the encoder that lies in the store; arguments as for ``Engine``.

        Raises:
            CheckpointError: The encoder is missing, damaged, or another than the rows were made by.
        """
        with self.fetch_encoder() as folder:
            return self.engine_of(folder, **arguments)

    @contextmanager
    def fetch_encoder(self) -> Iterator[Path]:
        """A folder with a copy of the store's encoder: of ``save_pretrained``, or an exported one.

        Raises:
            CheckpointError: The encoder is missing.
        """
        from lance.file import LanceFileSession

        session = LanceFileSession(self.url, storage_options=self.storage_options)
        try:
            there = [PurePosixPath(path).name for path in session.list(ENCODER)]
        except (OSError, ValueError):  # there is no such folder
            there = []
        with tempfile.TemporaryDirectory() as folder:
            for name in there if INDEX in there else (CONFIG, WEIGHTS):
                try:
                    session.download_file(f"{ENCODER}/{name}", str(Path(folder) / name))
                except (OSError, ValueError) as err:
                    raise CheckpointError(
                        f"{self.url} has no {ENCODER}/{name}: {first_line(err)}; name the "
                        "checkpoint that the store was made with, or put its folder of "
                        "save_pretrained there"
                    ) from err
            yield Path(folder)

    def engine_of(self, folder: Path, **arguments: Any) -> Engine:
        """As ``load_engine``, of what ``fetch_encoder`` has given."""
        from tinyvit.inference.engine import Engine

        arguments = {"precision": self._recipe.precision, **arguments}
        arguments["image_spec"] = self._recipe.image_spec
        if self._recipe.early and arguments.get("backend", "auto") == "auto":
            arguments["backend"] = "torch"  # which alone gives a stage beside the embedding
        engine = Engine(folder, **arguments)
        found = engine.weights_sha256()
        if found != self._recipe.weights_sha256:
            raise CheckpointError(
                f"the encoder in {self.url}/{ENCODER} has weights {found[:12]}…, but the rows were "
                f"made with {self._recipe.weights_sha256[:12]}…; put the right one there, or embed "
                "into another store"
            )
        return engine

    # -- reading -------------------------------------------------------------------------------

    def _read(self, read: Callable[[lance.LanceDataset], Value]) -> Value:
        """Read from the version at hand, and from the newest if that has been cleaned away."""
        for _ in range(3):
            try:
                return read(self._dataset)
            except (OSError, ValueError) as err:
                if not is_missing(err):
                    raise
                self.refresh()
        return read(self._dataset)

    def _rows(
        self,
        dataset: lance.LanceDataset,
        where: str,
        limit: int | None = None,
        maps: bool = True,
    ) -> list[StoreRow]:
        """Rows of a filter, with their maps; all from one version."""
        scanner = dataset.scanner(
            columns=list(PLAIN), filter=where, limit=limit, with_row_address=True
        )
        plain = scanner.to_table().to_pylist()
        blobs: dict[str, list[bytes | None]] = {}
        for name in MAPS if maps else ():
            blobs[name] = [None] * len(plain)
            shape = "shape" if name == "features" else "early_shape"
            wanted = [i for i, values in enumerate(plain) if values[shape] is not None]
            if wanted:
                addresses = [plain[i]["_rowaddr"] for i in wanted]
                read = dataset.read_blobs(name, addresses=addresses, preserve_order=True)
                for i, (_, data) in zip(wanted, read, strict=True):
                    blobs[name][i] = data
        return [
            from_values(values, {name: blobs[name][i] for name in blobs}, self._recipe, self.url)
            for i, values in enumerate(plain)
        ]

    def _by_path(self, paths: Sequence[str], maps: bool = True) -> dict[str, StoreRow]:
        """Rows by path; of two of one path the newer."""
        read = partial(self._rows, where=one_of("path", paths), maps=maps)
        return {row.path: row for row in sorted(self._read(read), key=lambda row: row.made)}

    def _many(self, paths: Iterable[str], maps: bool = True) -> Iterator[StoreRow]:
        """Good rows in the order of their paths."""
        source = iter(paths)
        while chunk := [path for _, path in zip(range(CHUNK), source, strict=False)]:
            found = self._by_path(chunk, maps)
            if missing := [path for path in chunk if path not in found]:
                self.refresh()
                found |= self._by_path(missing, maps)
            for path in chunk:
                row = found.get(path)
                if row is None or row.state != "ok":
                    raise self._unknown(path, row)
                yield row

    def _paths(self) -> Any:
        """The paths of good rows, as a pyarrow array."""
        return self._read(
            lambda dataset: dataset.to_table(columns=["path"], filter="state = 'ok'")
        )["path"]

    def _check_maps(self) -> None:
        if self._recipe.keep == "pooled":
            raise ValueError(
                f"{self.url} keeps pooled vectors and no features; take vectors(), similar(), or "
                "iterate(raw=True)"
            )

    def _unknown(self, path: str, row: StoreRow | None) -> UnknownImageError:
        if row is not None:
            return UnknownImageError(f"{path!r} is in {self.url}, but failed: {row.reason}")
        name, names = PurePosixPath(path).name, self._paths()
        if len(names) > _NAMES_COMPARED:
            import pyarrow.compute as pc

            names = names.filter(pc.match_substring(names, name[: max(3, len(name) // 2)]))
        near = get_close_matches(path, names[:_NAMES_COMPARED].to_pylist(), 3, cutoff=0.3)
        hint = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
        return UnknownImageError(f"{self.url} has no image {path!r}{hint}")


# -- addresses and files ---------------------------------------------------------------------------


def load_lance() -> Any:
    """The package lance.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import lance
    except ImportError as err:
        raise MissingExtraError(
            f"an embedding store needs the package pylance, which cannot be imported ({err}); "
            "pip install 'tinyvit[store]'"
        ) from err
    return lance


def is_remote(url: str) -> bool:
    """Whether an address is not a path."""
    return "://" in url


def is_missing(err: Exception) -> bool:
    """Whether Lance says that a file is not there."""
    return "not found" in str(err).lower()


def first_line(err: Exception) -> str:
    """What Lance says, without the place in its source."""
    return str(err).splitlines()[0].split(", /home/runner")[0] if str(err) else type(err).__name__


def one_of(column: str, values: Sequence[str]) -> str:
    """A filter: the column is one of these texts."""
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"


def write_files(url: str, options: dict[str, str] | None, files: Mapping[str, bytes]) -> None:
    """Write files beside a dataset's own, on any kind of storage."""
    from lance.file import LanceFileSession

    session = LanceFileSession(url, storage_options=options)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            local = Path(folder) / "file"
            local.write_bytes(data)
            session.upload_file(str(local), name)


def unless_conflict(work: Callable[[], Value]) -> Value | None:
    """What it gives; None where another writer came first, or what was read is gone."""
    try:
        return work()
    except (OSError, ValueError, RuntimeError) as err:
        if "conflict" in str(err).lower() or is_missing(err):
            return None
        raise


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder has no files but a store's own: another writer is making it, or was killed.

    Where a store is there already, Lance refuses to make another one.
    """
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {ENCODER, *_PARTS}
