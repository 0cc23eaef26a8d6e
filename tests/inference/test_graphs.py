from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from tinyvit.errors import MissingExtraError
from tinyvit.inference import graph_backend as graphs
from tinyvit.inference.graph_backend import cached_graph, export_onnx, fingerprint, frozen_copy
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
    with pytest.raises(MissingExtraError, match=r"pip install 'tinyvit\[openvino\]' or 'tinyvit\["):
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
