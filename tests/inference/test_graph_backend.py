"""Graphs of a model, where they are kept, and what keeps them in step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.errors import MissingExtraError
from tinyvit.inference import graph_backend as graphs
from tinyvit.inference import graph_backend as watched_graph
from tinyvit.inference.graph_backend import (
    WatchedGraph,
    cached_graph,
    export_onnx,
    fingerprint,
    frozen_copy,
)
from tinyvit.modules import TinyViT

MakeModel = Callable[..., TinyViT]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_one_graph_for_all_sizes(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit(in_chans=4).double().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    graph = onnx.load_from_string(export_onnx(model))
    onnx.checker.check_model(graph)
    [images], [features] = graph.graph.input, graph.graph.output
    sides = images.type.tensor_type.shape.dim
    assert [side.dim_param or side.dim_value for side in sides] == ["batch", 4, "height", "width"]
    assert (images.name, features.name) == ("images", "features")
    assert graph.opset_import[0].version >= 18
    assert model.training and model.neck[0].weight.dtype == torch.float64
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_model_made_in_inference_mode(make_tiny_vit: MakeModel) -> None:
    with torch.inference_mode():
        assert export_onnx(make_tiny_vit())


def test_a_model_that_cannot_be_traced(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit()
    model.neck = torch.nn.Fold((2, 2), 1)
    with pytest.raises(
        ValueError, match=r"^this model cannot be made into an ONNX graph: .*'torch'"
    ):
        export_onnx(model)


def test_without_onnx(make_tiny_vit: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tinyvit\[export\]'"):
        export_onnx(make_tiny_vit())


def test_a_frozen_copy(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit().half().train()
    twin = frozen_copy(model)
    assert not twin.training and model.training
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in twin.parameters())


def change_a_weight(model: TinyViT) -> None:
    model.neck[0].weight.data.view(-1)[7] += 1


def change_an_eps(model: TinyViT) -> None:
    model.neck[1].eps = 1e-3


def change_a_buffer(model: TinyViT) -> None:
    model.patch_embed.seq[0].bn.running_mean.add_(1)


@pytest.mark.parametrize("change", [change_a_weight, change_an_eps, change_a_buffer])
def test_the_fingerprint_tells_models_apart(
    change: Callable[[TinyViT], None], make_tiny_vit: MakeModel
) -> None:
    model = make_tiny_vit()
    before = fingerprint(model)
    assert before is not None and fingerprint(copy.deepcopy(model)) == before
    change(model)
    assert fingerprint(model) not in (before, None)


def test_the_fingerprint_knows_what_shapes_do_not_tell(
    make_tiny_vit: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {fingerprint(make_tiny_vit(strides=strides)) for strides in ((2, 2, 1), (2, 2, 2))}
    assert len(keys) == 2
    monkeypatch.setattr(graphs, "_FORM", 0)
    assert fingerprint(make_tiny_vit()) not in keys


def test_a_model_with_hooks_has_no_fingerprint(make_tiny_vit: MakeModel, cache: Path) -> None:
    model = make_tiny_vit()
    model.layers[1].register_forward_hook(lambda module, args, out: out * 2)
    assert fingerprint(model) is None
    assert isinstance(cached_graph(model), bytes)
    assert not cache.exists()


def test_a_graph_is_made_once(
    make_tiny_vit: MakeModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_vit()
    path = cached_graph(model)
    assert isinstance(path, Path)
    assert path == cache / "graphs" / f"{fingerprint(model)}.onnx"
    onnx.checker.check_model(onnx.load(path))
    monkeypatch.setattr(graphs, "export_onnx", lambda model: pytest.fail("made again"))
    assert cached_graph(model) == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written(
    make_tiny_vit: MakeModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(graphs, "export_onnx", lambda model: b"graph")
    assert cached_graph(make_tiny_vit()) == b"graph"


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
