"""The native engine as a backend: the C++ library of ``tinyvit_native``. Imports no torch.

It runs a model of torch, whose weights it follows, or a ``StoredModel``, for which torch is never
loaded. The library folds norms and scales itself, so it gets the state dict as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.factory import StoredModel

from .backend import check_settings, choose_precision
from .derived import TOLERANCE, Derived, error_of
from .graphs import load_library
from .read_ahead import cores

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tinyvit.modules import TinyViT

    from .torch_backend import TorchBackend

Batch = TypeVar("Batch", "Tensor", NDArray[np.float32])

_ABI = 2
"""Of the package ``tinyvit_native`` that this file is written for."""


class NativeBackend:
    """Runs a TinyViT in the native library, on a CPU.

    The model given is never changed. What runs is made from it at the first call, compared with it
    on a small image, and made again when the model has changed since. Batches may be arrays instead
    of tensors, and then results are. ``precision`` "auto" is bf16 where this processor multiplies
    it natively, ``threads`` None the number in OMP_NUM_THREADS, or else one for each CPU of the
    process. With ``falls_back`` torch runs what the library cannot, instead of an error.

    Raises:
        MissingExtraError: tinyvit_native is not installed, or is of another version.
        CheckpointError: The tensors of a ``StoredModel`` make no network.
        ValueError: Another device, precision or number of threads.
    """

    name = "native"
    device = "cpu"

    def __init__(
        self,
        model: TinyViT | StoredModel,
        device: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        *,
        falls_back: bool = False,
    ) -> None:
        check_settings(self.name, device, threads)
        library = native_library()
        self.precision: Literal["fp32", "bf16"]
        if precision == "auto":
            self.precision = "bf16" if library.has_bf16() else "fp32"
            does = "multiplies" if library.has_bf16() else "does not multiply"
            reason = f"this processor {does} bf16 natively"
        else:
            self.precision, reason = choose_precision(precision, "cpu")
        self.choice = f"native {library.version()} on cpu, {self.precision} ({reason})"
        self.threads = default_threads() if threads is None else threads  # 0: one a CPU
        self.images_at_once = self.threads or cores()  # each thread takes one, and does not wait
        self._model = model
        self._falls_back = falls_back
        modules: list[nn.Module] = [] if isinstance(model, StoredModel) else [model]
        self._derived = Derived(partial(list, modules), self._make)
        if isinstance(model, StoredModel):
            self._derived.get()  # says what is wrong with the file

    @property
    def takes_arrays(self) -> bool:
        """Whether an engine should give arrays, for which torch need not be loaded."""
        return isinstance(self._model, StoredModel)

    def __call__(self, batch: Batch) -> Batch:
        """[N, C, H, W] float32 -> the network's output, float32: an embedding, map or logits."""
        return self._network()(batch)

    def logits(self, batch: Batch) -> Batch:
        """[N, C, H, W] float32 -> logits [N, classes]; ValueError: the model has no head."""
        return self._network().logits(batch)

    def stages(self, batch: Batch) -> list[Batch]:
        """[N, C, H, W] float32 -> the map of each stage, [N, C, h, w]."""
        return self._network().stages(batch)

    def with_stages(self, batch: Batch) -> tuple[Batch, list[Batch]]:
        """What a call and ``stages`` give, from one pass."""
        return self._network().with_stages(batch)

    def with_early(self, batch: Batch) -> tuple[Batch, Batch]:
        """What a call gives, and the map behind the second merge, [N, h, w, D]; not by torch."""
        network = self._network()
        if not isinstance(network, NativeNetwork):
            raise ValueError("torch runs this model, and gives no early map; use with_stages")
        return network.with_early(batch)

    def explain(self) -> str:
        """What runs, and why, in words."""
        return self._derived.get()[1]

    def refresh(self) -> None:
        """Let go of what runs; it is made again at the next call."""
        self._derived.drop()

    close = refresh

    def _network(self) -> NativeNetwork:
        return cast("NativeNetwork", self._derived.get()[0])  # TorchBackend has the same methods

    def _make(self) -> tuple[NativeNetwork | TorchBackend, str]:
        how = self.precision, self.threads
        if isinstance(self._model, StoredModel):
            try:
                network = NativeNetwork(self._model.arguments, self._model.tensors, *how)
            except ValueError as err:
                raise CheckpointError(f"these weights make no TinyViT: {err}") from err
            return network, network.words
        from .fast_encoder import arrays_of
        from .torch_backend import TorchBackend, reason_against

        reason = reason_against(self._model)
        if reason is None:
            try:
                network = NativeNetwork(self._model.arguments(), arrays_of(self._model), *how)
                error = _error_of(network, self._model)
                if error <= TOLERANCE[self.precision]:
                    return network, f"{network.words} (checked: error {error:.0e})"
                reason = f"the native form differs by {error:.1e}"
            except ValueError as err:
                reason = str(err)
        if not self._falls_back:
            raise ValueError(
                f"the native engine cannot run this model: {reason}; use backend='torch'"
            )
        torch = TorchBackend(self._model, "cpu", self.precision)
        return torch, f"torch instead ({reason}): {torch.explain()}"


class NativeNetwork:
    """One network in the library. It takes and gives arrays, or tensors."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        tensors: Mapping[str, NDArray[Any]],
        precision: Literal["fp32", "bf16"],
        threads: int,
    ) -> None:
        library = native_library()
        end = None if arguments["neck_dim"] is None else "sam"
        size = arguments.get("neck_size")
        config = library.Config(
            **{
                name: arguments[name]
                for name in ("embed_dims", "depths", "num_heads", "window_sizes", "strides", "stem")
            },
            in_chans=arguments.get("in_chans", 3),
            end=end if size is None else "sam3",
            end_size=size or 72,
            head=arguments["head"],
        )
        self._net = library.Net(config, tensors, precision=precision, threads=threads)
        self._output = "logits" if end is None and arguments["head"] else "embedding"
        self._count, self._has_head = len(config.depths), bool(arguments["head"])
        facts = self._net.describe()
        self.words = f"{facts['isa']} kernels, {facts['threads']} threads"

    def __call__(self, batch: Batch) -> Batch:
        """The embedding [N, C, h, w], or the logits of a classifier."""
        return self._run(batch, **{self._output: True})[self._output]

    def logits(self, batch: Batch) -> Batch:
        """[N, classes]."""
        if not self._has_head:
            raise ValueError("the model was built without a classification head")
        return self._run(batch, logits=True)["logits"]

    def stages(self, batch: Batch) -> list[Batch]:
        """The map of each stage, [N, C, h, w]."""
        found = self._run(batch, stages=range(self._count))
        return [found[f"stage{i}"] for i in range(self._count)]

    def with_stages(self, batch: Batch) -> tuple[Batch, list[Batch]]:
        """A call's and ``stages``' from one pass."""
        found = self._run(batch, stages=range(self._count), **{self._output: True})
        return found[self._output], [found[f"stage{i}"] for i in range(self._count)]

    def with_early(self, batch: Batch) -> tuple[Batch, Batch]:
        """A call's, and the map behind the second merge, [N, h, w, D]."""
        found = self._run(batch, early=True, **{self._output: True})
        return found[self._output], found["early"]

    def features(self, batch: Batch) -> Batch:
        """The neck's output, or the last stage's map."""
        return self._run(batch, embedding=True)["embedding"]

    def _run(self, batch: Batch, **wanted: Any) -> dict[str, Batch]:
        if isinstance(batch, np.ndarray):
            return dict(self._net.run(batch, **wanted))
        import torch

        found = self._net.run(batch.detach().to("cpu", torch.float32).numpy(), **wanted)
        return {name: torch.from_numpy(array) for name, array in found.items()}


def native_library() -> Any:
    """The package ``tinyvit_native``."""
    library = load_library("tinyvit_native", "native")
    if library.abi_version() != _ABI:
        raise MissingExtraError(
            f"the installed tinyvit-native {library.version()} has ABI {library.abi_version()} and "
            f"this tinyvit wants {_ABI}; pip install --upgrade 'tinyvit[native]'"
        )
    return library


def default_threads() -> int:
    """The number in OMP_NUM_THREADS; 0, as many as there are CPUs, without one."""
    number = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(number) if number.isdigit() else 0


def _error_of(network: NativeNetwork, model: TinyViT) -> float:
    """The largest error of all that the network gives against the model, on a small image."""
    from .torch_backend import exact_inference, frozen_copy, small_image

    x = small_image(model)
    with exact_inference("cpu"):
        plain = frozen_copy(model)
        last = plain.forward_backbone(x)
        pairs = [(network.stages(x)[-1], last)]
        if plain.neck is not None:
            pairs.append((network.features(x), plain.neck(last)))
        if plain.head is not None:
            pairs.append((network.logits(x), plain.forward_head(last)))
        return float(np.max([error_of(got.numpy(), wanted.numpy()) for got, wanted in pairs]))
