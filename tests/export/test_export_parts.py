"""Encoders, classifiers and features alone: one file with a certificate."""

import json

import numpy as np
import pytest
import torch

from tiny import make_tiny_classifier, make_tiny_sam, make_tiny_vit
from tinyvit.export import ParityError, comparing, export_model, graphs, parts, verify
from tinyvit.image_spec import ImageSpec
from tinyvit.modules import FeatureMaps, TinyViT

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def make_sam3_encoder():
    """EfficientSAM3's neck gives a map of one size for images of any size."""
    model = make_tiny_vit(strides=(2, 2, 2), neck_size=6, head=False)
    model.image_spec = ImageSpec.sam3(64)
    return model


def run(path, images):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    model = make_tiny_classifier(classes=4, size=32)
    model.classes = ("cat", "dog", "gnu", "emu")
    folder = tmp_path_factory.mktemp("parts") / "classifier"
    assert export_model(model, folder, name="pets", is_reproducible=True).passed
    return model, folder


def test_a_classifier(classifier, images):
    model, folder = classifier
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx", "tinyvit.json", "README.txt", "certificate.json", "certificate.npz"
    }  # fmt: skip
    (logits,) = run(folder / "model.onnx", images)
    with torch.inference_mode():
        np.testing.assert_allclose(logits, model(images), atol=1e-4)
    facts = {one.key: one.value for one in onnx.load(folder / "model.onnx").metadata_props}
    assert (facts["tinyvit.part"], facts["tinyvit.source"]) == ("classifier", "pets")
    assert json.loads(facts["tinyvit.classes"]) == ["cat", "dog", "gnu", "emu"]
    assert ImageSpec.from_dict(json.loads(facts["tinyvit.image_spec"])) == model.image_spec
    found = verify(folder / "model.onnx")
    assert found.passed
    shapes = {case.id for case in found.cases}
    assert "classifier-1x3x1x1 logits" in shapes and "classifier-2x3x64x96 logits" in shapes


def test_an_encoder_of_efficient_sam3(tmp_path, images):
    model = make_sam3_encoder()
    assert export_model(model, tmp_path / "out").passed
    (embedding,) = run(tmp_path / "out" / "model.onnx", images)
    assert embedding.shape == (2, 16, 6, 6)
    with torch.inference_mode():
        np.testing.assert_allclose(embedding, model(images), atol=1e-4)
    assert comparing.verify_against(tmp_path / "out", model).passed
    assert not comparing.verify_against(tmp_path / "out", make_tiny_vit(seed=9)).passed


def test_the_encoder_of_a_sam(tmp_path):
    sam = make_tiny_sam()
    found = export_model(sam, tmp_path / "out", part="encoder")
    assert found.passed and {case.output for case in found.cases} == {"image_embeddings"}
    assert comparing.verify_against(tmp_path / "out", sam).passed


def test_features_are_the_maps_of_all_stages(tmp_path, images):
    model = make_tiny_vit(strides=(2, 2, 2), neck_dim=None, head=False)
    assert parts.part_of(FeatureMaps(model), None) == parts.part_of(model, None)
    assert export_model(FeatureMaps(model), tmp_path / "out").passed
    came = run(tmp_path / "out" / "model.onnx", images)
    with torch.inference_mode():
        wanted = model.forward_intermediates(images, intermediates_only=True)
    assert [one.shape for one in came] == [tuple(one.shape) for one in wanted]
    for one, other in zip(came, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert len({case.output for case in verify(tmp_path / "out").cases}) == 4


@pytest.mark.parametrize("name", ["web", "tensorrt", "openvino"])
def test_presets_that_take_a_network_alone(classifier, name, tmp_path):
    if name == "openvino":
        pytest.importorskip("openvino")
    assert export_model(classifier[0], tmp_path / "out", preset=name).passed
    assert verify(tmp_path / "out").passed


def test_a_wrong_classifier_is_found(classifier, tmp_path, monkeypatch):
    original = graphs.PartGraph.forward
    monkeypatch.setattr(graphs.PartGraph, "forward", lambda self, x: original(self, x.flip(1)))
    with pytest.raises(ParityError, match="classifier-"):
        export_model(classifier[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    other = make_tiny_classifier(classes=4, size=32, seed=7)
    assert not comparing.verify_against(classifier[1], other).passed


def test_what_a_model_does_not_have(classifier, tmp_path):
    model = classifier[0]
    with pytest.raises(ValueError, match=r"loads a whole SAM; .* are for tinyvit, web, tensorrt"):
        export_model(model, tmp_path / "out", preset="osam")
    with pytest.raises(ValueError, match="has no neck, so it gives no image embedding"):
        export_model(model, tmp_path / "out", part="encoder")
    with pytest.raises(ValueError, match="has no classification head; export its features"):
        export_model(make_sam3_encoder(), tmp_path / "out", part="classifier")
    with pytest.raises(ValueError, match="FeatureMaps give features and no classifier"):
        export_model(FeatureMaps(model), tmp_path / "out", part="classifier")
    with pytest.raises(ValueError, match="single_mask is for mask decoders"):
        export_model(model, tmp_path / "out", single_mask=True)
    with pytest.raises(ValueError, match="wanted a Sam or a TinyViT to export, came Linear"):
        export_model(torch.nn.Linear(2, 2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(model, TinyViT)
