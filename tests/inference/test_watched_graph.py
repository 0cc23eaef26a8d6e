from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.inference import graph_backend as watched_graph
from tinyvit.inference.graph_backend import WatchedGraph
from tinyvit.modules import TinyViT

MakeModel = Callable[..., TinyViT]
MakeImage = Callable[..., Tensor]
Array = NDArray[np.float32]


class Twin:
    """A runner in ten lines: a copy of the model."""

    def __init__(self, model: TinyViT, change: Callable[[Array], Array]) -> None:
        self.model, self.change, self.is_closed = copy.deepcopy(model).eval(), change, False

    def __call__(self, images: Array) -> Array:
        with torch.inference_mode():
            return self.change(self.model(torch.from_numpy(images)).numpy())

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where each graph came from."""
    origins: list[str] = []

    def note(origin: str) -> bytes:
        origins.append(origin)
        return origin.encode()

    monkeypatch.setattr(watched_graph, "cached_graph", lambda model: note("cache"))
    monkeypatch.setattr(watched_graph, "export_onnx", lambda model: note("memory"))
    return origins


def watch(
    model: TinyViT, change: Callable[[Array], Array] = np.copy, precision: str = "fp32"
) -> WatchedGraph:
    return WatchedGraph(model, lambda graph: Twin(model, change), "Twin", precision)


def test_it_gives_what_the_model_gives(
    make_tiny_vit: MakeModel, image: MakeImage, made: list[str]
) -> None:
    model = make_tiny_vit()
    graph = watch(model)
    x = image(2, 33, 17, dtype=torch.float64).requires_grad_()
    out = graph(x)
    with torch.inference_mode():
        assert torch.equal(out, model(x.float()))
    assert (out.dtype, out.requires_grad, graph.error) == (torch.float32, False, 0.0)
    graph(x)
    assert made == ["cache"]


def test_it_follows_the_model(make_tiny_vit: MakeModel, image: MakeImage, made: list[str]) -> None:
    model = make_tiny_vit()
    graph, x = watch(model), image(1, 32, 32)
    before = graph(x)
    with torch.no_grad():
        model.neck[3].bias.add_(1)
    after = graph(x)
    assert not torch.allclose(after, before)
    graph.refresh()
    assert torch.equal(graph(x), after)
    assert made == ["cache", "memory", "memory"]  # what changes is not kept


def test_close(make_tiny_vit: MakeModel, image: MakeImage, made: list[str]) -> None:
    graph = watch(make_tiny_vit())
    graph.close()
    graph(image(1, 16, 16))
    runner, _ = graph._derived.get()
    assert isinstance(runner, Twin)
    graph.close()
    graph.close()
    assert runner.is_closed


@pytest.mark.parametrize(
    ("change", "precision", "words"),
    [
        (lambda out: -out, "fp32", r"Twin differs from the model by 2\.0e\+00 of its largest "),
        (lambda out: out * 1.001, "fp32", r"by 1\.0e-03 of its largest output, more than 1e-04"),
        (lambda out: out * 1.2, "bf16", r"more than 1e-01; use backend='torch'"),
        (lambda out: out * np.float32(np.nan), "bf16", "differs from the model by nan"),
        (
            lambda out: out[..., :-1],
            "fp32",
            r"gives \[1, 16, 5, 3\] where .* gives \[1, 16, 5, 4\]",
        ),
    ],
)
def test_a_graph_that_is_wrong_is_refused(
    change: Callable[[Array], Array],
    precision: str,
    words: str,
    make_tiny_vit: MakeModel,
    made: list[str],
) -> None:
    with pytest.raises(ValueError, match=words):
        assert watch(make_tiny_vit(), change, precision).graph_file


def test_rounding_passes(make_tiny_vit: MakeModel, made: list[str]) -> None:
    graph = watch(make_tiny_vit(), lambda out: out * np.float32(1.02), "bf16")
    assert graph.graph_file is None
    assert graph.error == pytest.approx(0.02, rel=0.01)


def test_a_damaged_file_is_replaced(
    make_tiny_vit: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = make_tiny_vit(), tmp_path / "graph.onnx"
    path.write_bytes(b"damaged")

    def cached(model: TinyViT) -> Path:
        if not path.exists():
            path.write_bytes(b"whole")
        return path

    def load(graph: Any) -> Twin:
        if graph.read_bytes() == b"damaged":
            raise ValueError("no graph")
        return Twin(model, np.copy)

    monkeypatch.setattr(watched_graph, "cached_graph", cached)
    graph = WatchedGraph(model, load, "Twin", "fp32")
    assert graph.graph_file == path
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 4, 16, 16), (0, 3, 16, 16), (1, 3, 0, 16)])
def test_batches_of_another_form(shape: tuple[int, ...], make_tiny_vit: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"wants images \[batch, 3, height, width\] of at least"):
        watch(make_tiny_vit())(torch.zeros(shape))


def test_logits(make_tiny_vit: MakeModel, image: MakeImage, made: list[str]) -> None:
    x = image(2, 32, 32)
    classifier = make_tiny_vit(neck_dim=None)
    with torch.inference_mode():
        assert torch.equal(watch(classifier).logits(x), classifier(x))
    for model in (make_tiny_vit(), make_tiny_vit(neck_dim=None, head=False)):
        with pytest.raises(ValueError, match="gives features and no logits; use backend='torch'"):
            watch(model).logits(x)
