from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tinyvit.checkpoints import write_state_dict
from tinyvit.errors import CheckpointError
from tinyvit.folders.encode import write_features
from tinyvit.image_spec import ImageSpec
from tinyvit.sam.embedding import ImageEmbedding

SPEC = ImageSpec.sam(64)
PLACEMENT = SPEC.place(31, 47)
FEATURES = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(0))
EARLY = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def embedding():
    return ImageEmbedding(FEATURES, PLACEMENT, SPEC, "ab" * 32, EARLY)


def test_what_is_saved_is_loaded_bit_for_bit(embedding, tmp_path):
    path = embedding.save(tmp_path / "cat.safetensors")
    found = ImageEmbedding.load(path)
    assert torch.equal(found.features, FEATURES)
    assert torch.equal(found.interm_features, EARLY)
    for field in ("placement", "image_spec", "weights_sha256"):
        assert getattr(found, field) == getattr(embedding, field)
    assert found.original_size == (31, 47)
    assert [file.name for file in tmp_path.iterdir()] == ["cat.safetensors"]


def test_the_early_map_and_the_hash_may_be_unknown(tmp_path):
    path = ImageEmbedding(FEATURES, PLACEMENT, SPEC).save(tmp_path / "a.safetensors")
    found = ImageEmbedding.load(path)
    assert found.interm_features is None
    assert found.weights_sha256 is None


def test_half_precision_takes_half_the_room(embedding, tmp_path):
    path = embedding.save(tmp_path / "a.safetensors", dtype="fp16")
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("features").dtype == torch.float16
    found = ImageEmbedding.load(path).features
    assert found.dtype == torch.float32
    # 11 bits of mantissa: rounding by at most 2**-11 of the value
    torch.testing.assert_close(found, FEATURES, rtol=2**-11, atol=1e-6)


def test_the_header_is_json_by_the_conventions_of_encode(embedding, tmp_path):
    with safe_open(embedding.save(tmp_path / "a.safetensors"), framework="pt") as file:
        header = {key: json.loads(v) for key, v in file.metadata().items() if key != "format"}
    assert header["weights_sha256"] == "ab" * 32
    assert header["original_size"] == [31, 47]
    assert ImageSpec.from_dict(header["image_spec"]) == SPEC
    assert "tinyvit_version" in header


def test_files_of_tinyvit_encode_can_be_loaded(tmp_path):
    target = tmp_path / "cat.safetensors"
    facts = {
        "picture": "cat.jpg",
        "weights_sha256": "cd" * 32,
        "strides": [2, 2, 1],
        "image_spec": SPEC.to_dict(),
        "precision": "fp32",
        "tinyvit_version": "0.1.0",
        **dataclasses.asdict(PLACEMENT),
    }
    write_features(target, FEATURES, facts)
    found = ImageEmbedding.load(target)
    assert torch.equal(found.features, FEATURES)
    assert (found.placement, found.image_spec) == (PLACEMENT, SPEC)
    assert found.weights_sha256 == "cd" * 32


def test_features_of_any_kind_are_kept_as_float32_without_gradients():
    features = FEATURES.double().requires_grad_()
    found = ImageEmbedding(features, PLACEMENT, SPEC).features
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize(
    "features, early, words",
    [
        (FEATURES[None], None, r"features of one image must be \[C, h, w\]"),
        (FEATURES.int(), None, "torch.int32"),
        (FEATURES[:, :0], None, r"came \[8, 0, 4\]"),
        (FEATURES, EARLY[0], r"interm_features of one image must be \[h, w, D\]"),
        (FEATURES, EARLY[:3], r"the grid of the features, \[4, 4\]; came \[3, 4, 6\]"),
    ],
)
def test_wrong_features_are_refused(features, early, words):
    with pytest.raises(ValueError, match=words):
        ImageEmbedding(features, PLACEMENT, SPEC, None, early)


def test_a_mismatch_names_both_sides(embedding):
    embedding.check("ab" * 32, SPEC)
    with pytest.raises(ValueError, match=r"weights abababababab…, .* weights cdcdcdcdcdcd…"):
        embedding.check("cd" * 32, SPEC)
    with pytest.raises(ValueError, match=r"prepared as .*\(64, 64\).* wants .*\(96, 96\)"):
        embedding.check("ab" * 32, ImageSpec.sam(96))


def test_padding_and_unknown_weights_do_not_matter(embedding):
    embedding.check("ab" * 32, ImageSpec.sam(64, pad=False))
    embedding.check(None, SPEC)
    ImageEmbedding(FEATURES, PLACEMENT, SPEC).check("cd" * 32, SPEC)


def test_what_cannot_be_kept_is_not_written(embedding, tmp_path):
    target = tmp_path / "a.safetensors"
    large = dataclasses.replace(embedding, features=FEATURES * 1e6)
    with pytest.raises(ValueError, match="not finite in fp16; save with dtype='fp32'"):
        large.save(target, dtype="fp16")
    broken = dataclasses.replace(embedding, features=FEATURES / 0)
    with pytest.raises(ValueError, match="not finite in fp32; encode"):
        broken.save(target)
    with pytest.raises(ValueError, match="dtype must be one of fp32, fp16; came 'int8'"):
        embedding.save(target, dtype="int8")
    with pytest.raises(CheckpointError, match="no folder"):
        embedding.save(tmp_path / "none" / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(embedding, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        ImageEmbedding.load(path)
    save_file({"weight": FEATURES}, path)
    with pytest.raises(CheckpointError, match=r"no tensor 'features'; .* came one with weight"):
        ImageEmbedding.load(path)
    save_file({"features": FEATURES}, path)
    with pytest.raises(CheckpointError, match="missing original_size"):
        ImageEmbedding.load(path)
    path.write_bytes(embedding.save(tmp_path / "b.safetensors").read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        ImageEmbedding.load(path)


@pytest.mark.parametrize(
    "key, text",
    [("original_size", "[31]"), ("image_spec", "{}"), ("model_size", "nonsense")],
)
def test_a_damaged_header_is_an_error(embedding, tmp_path, key, text):
    path = embedding.save(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = {**file.metadata(), key: text}
    write_state_dict(path, {"features": FEATURES}, metadata=header)
    with pytest.raises(CheckpointError, match="or its header is damaged"):
        ImageEmbedding.load(path)


def test_features_that_are_not_numbers_are_refused(embedding, tmp_path):
    path = embedding.save(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    write_state_dict(path, {"features": FEATURES / 0}, metadata=header)
    with pytest.raises(CheckpointError, match="not finite"):
        ImageEmbedding.load(path)
