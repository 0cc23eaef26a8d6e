"""Embeddings: the value, its file, and what makes it of an image."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tinyvit.checkpoints import write_state_dict
from tinyvit.errors import CheckpointError
from tinyvit.folders.encode import write_features
from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import ResizeLongestSide, to_input
from tinyvit.inference import Engine
from tinyvit.sam.embedding import (
    ImageEmbedding,
    ImageEncoder,
    prepare_image,
    prepare_resized,
    spec_of,
)

FORMATS = Path(__file__).parents[1] / "data" / "formats"
SPEC = ImageSpec.sam(64)
PLACEMENT = SPEC.place(31, 47)
FEATURES = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float32)
EARLY = np.random.default_rng(1).normal(size=(4, 4, 6)).astype(np.float32)


@pytest.fixture
def embedding():
    return ImageEmbedding(FEATURES, PLACEMENT, SPEC, "ab" * 32, EARLY)


def test_what_is_saved_is_loaded_bit_for_bit(embedding, tmp_path):
    path = embedding.save(tmp_path / "cat.safetensors")
    found = ImageEmbedding.load(path)
    np.testing.assert_array_equal(found.features, FEATURES)
    np.testing.assert_array_equal(found.interm_features, EARLY)
    for field in ("placement", "image_spec", "weights_sha256"):
        assert getattr(found, field) == getattr(embedding, field)
    assert found.original_size == (31, 47)
    assert [file.name for file in tmp_path.iterdir()] == ["cat.safetensors"]


def test_the_early_map_and_the_hash_may_be_unknown(tmp_path):
    path = ImageEmbedding(FEATURES, PLACEMENT, SPEC).save(tmp_path / "a.safetensors")
    found = ImageEmbedding.load(path)
    assert found.interm_features is None
    assert found.weights_sha256 is None


def test_bytes_instead_of_a_file(embedding, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(embedding.to_bytes())
    for found in (
        ImageEmbedding.from_bytes(embedding.to_bytes()),
        ImageEmbedding.load(tmp_path / "a.safetensors"),
    ):
        np.testing.assert_array_equal(found.features, FEATURES)
        np.testing.assert_array_equal(found.interm_features, EARLY)
        assert (found.placement, found.image_spec) == (PLACEMENT, SPEC)


def test_the_precision_is_kept(tmp_path):
    embedding = ImageEmbedding(FEATURES, PLACEMENT, SPEC, precision="bf16")
    path = embedding.save(tmp_path / "a.safetensors")
    assert ImageEmbedding.load(path).precision == "bf16"


def test_a_newer_format_is_refused(embedding, tmp_path):
    path = embedding.save(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "1"
    header.update(format="2", tinyvit_version='"9.0"')
    save_file({"features": torch.from_numpy(FEATURES)}, path, metadata=header)
    with pytest.raises(CheckpointError, match=r"tinyvit 9.0, format 2; this reads up to 1"):
        ImageEmbedding.load(path)


@pytest.mark.parametrize("number", [0, 1])
def test_every_format_can_be_read(number):
    found = ImageEmbedding.load(FORMATS / f"embedding_{number}.safetensors")
    assert found.features.shape == (2, 2, 2)
    assert found.features[1, 1, 1] == 7
    assert found.original_size == (20, 30)
    assert found.image_spec == ImageSpec.sam(32)
    assert found.weights_sha256 == "ab" * 32
    assert found.precision == (None, "fp32")[number]


def test_half_precision_takes_half_the_space(embedding, tmp_path):
    path = embedding.save(tmp_path / "a.safetensors", dtype="fp16")
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("features").dtype == torch.float16
    found = ImageEmbedding.load(path).features
    assert found.dtype == np.float32
    # 11 bits of mantissa: rounding by at most 2**-11 of the value
    np.testing.assert_allclose(found, FEATURES, rtol=2**-11, atol=1e-6)


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
    write_features(target, torch.from_numpy(FEATURES), facts)
    found = ImageEmbedding.load(target)
    np.testing.assert_array_equal(found.features, FEATURES)
    assert found.precision == "fp32"
    assert (found.placement, found.image_spec) == (PLACEMENT, SPEC)
    assert found.weights_sha256 == "cd" * 32


@pytest.mark.parametrize(
    "features",
    [
        FEATURES.astype(np.float64),
        torch.from_numpy(FEATURES).double().requires_grad_(),
        torch.from_numpy(FEATURES).bfloat16(),
    ],
)
def test_features_of_any_kind_are_kept_as_float32_in_numpy(features):
    found = ImageEmbedding(features, PLACEMENT, SPEC).features
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, FEATURES, rtol=2**-7)


@pytest.mark.parametrize(
    "features, early, words",
    [
        (FEATURES[None], None, r"features of one image must be \[C, h, w\]"),
        (FEATURES.astype(int), None, "int64"),
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
    broken = dataclasses.replace(embedding, features=FEATURES * np.inf)
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
    save_file({"weight": torch.from_numpy(FEATURES)}, path)
    with pytest.raises(CheckpointError, match=r"no tensor 'features'; .* came one with weight"):
        ImageEmbedding.load(path)
    save_file({"features": torch.from_numpy(FEATURES)}, path)
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
    write_state_dict(path, {"features": torch.from_numpy(FEATURES)}, metadata=header)
    with pytest.raises(CheckpointError, match="or its header is damaged"):
        ImageEmbedding.load(path)


def test_features_that_are_not_numbers_are_refused(embedding, tmp_path):
    path = embedding.save(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    write_state_dict(path, {"features": torch.from_numpy(FEATURES * np.inf)}, metadata=header)
    with pytest.raises(CheckpointError, match="not finite"):
        ImageEmbedding.load(path)


CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # folded norms and other orders of summing


class Mean:
    """A backend without stages and without a model."""

    name, device = "mean", "cpu"

    def __call__(self, batch):
        return torch.nn.functional.adaptive_avg_pool2d(batch.mean(1, keepdim=True), 4)

    def close(self):
        pass


@pytest.mark.parametrize("pad", [True, False])
def test_it_is_what_the_model_makes_of_an_image(make_tiny_sam, photo, pad):
    sam, image = make_tiny_sam(), photo(20, 40)
    encoder = ImageEncoder(sam, pad=pad)
    (found,) = encoder.encode(image)
    pixels, placement = to_input(image, ImageSpec.sam(64, pad=pad))
    x = torch.from_numpy(pixels)
    with torch.no_grad():
        np.testing.assert_allclose(found.features, sam.image_encoder(x[None])[0], **CLOSE)
    assert found.placement == placement
    assert found.features.shape == ((32, 4, 4) if pad else (32, 2, 4))
    assert found.image_spec == encoder.image_spec == ImageSpec.sam(64, pad=pad)
    assert found.weights_sha256 == encoder.engine.weights_sha256()
    assert found.interm_features is None


def test_light_hq_sam_gets_its_early_map(make_tiny_sam, photo):
    sam, image = make_tiny_sam(is_hq=True), photo(64, 50)
    sam.train()  # batch norms must not use, nor count, the image's own numbers
    before = {key: value.clone() for key, value in sam.state_dict().items()}
    (found,) = ImageEncoder(sam).encode(image)
    sam.eval()
    with torch.no_grad():
        pixels = torch.from_numpy(to_input(image, ImageSpec.sam(64))[0])
        features, early = sam.image_encoder.forward_hq(pixels[None])
    np.testing.assert_allclose(found.features, features[0], **CLOSE)
    np.testing.assert_allclose(found.interm_features, early[0], **CLOSE)
    assert all(torch.equal(value, before[key]) for key, value in sam.state_dict().items())


def test_many_images_come_in_order(make_tiny_sam, photo):
    encoder = ImageEncoder(make_tiny_sam(), batch_size=2)
    sizes = [(64, 64), (20, 30), (64, 64), (30, 20)]
    found = list(encoder.encode(photo(*size, seed=i) for i, size in enumerate(sizes)))
    assert [embedding.original_size for embedding in found] == sizes
    (alone,) = encoder.encode(photo(64, 64, seed=2))
    np.testing.assert_allclose(found[2].features, alone.features, **CLOSE)


def test_the_hash_follows_the_weights(make_tiny_sam):
    sam = make_tiny_sam()
    encoder = ImageEncoder(sam)
    first = encoder.weights_sha256()
    assert encoder.weights_sha256() == first
    with torch.no_grad():
        sam.image_encoder.patch_embed.seq[0].c.weight.mul_(1.5)
    assert encoder.weights_sha256() not in (None, first)


def test_an_embedding_of_other_weights_is_refused(make_tiny_sam, photo):
    (embedding,) = ImageEncoder(make_tiny_sam(seed=1)).encode(photo(20, 20))
    ImageEncoder(make_tiny_sam(seed=1)).check(embedding)
    with pytest.raises(ValueError, match="the model's encoder has weights"):
        ImageEncoder(make_tiny_sam(seed=2)).check(embedding)
    with pytest.raises(ValueError, match="no interm_features; encode the image again"):
        ImageEncoder(make_tiny_sam(seed=1, is_hq=True)).check(embedding)


def test_another_encoder_in_the_model_is_noticed(make_tiny_sam, photo):
    sam = make_tiny_sam()
    encoder = ImageEncoder(sam)
    sam.image_encoder = make_tiny_sam(seed=3).image_encoder
    with pytest.raises(RuntimeError, match="another image encoder; make a new"):
        list(encoder.encode(photo(20, 20)))


def test_an_engine_may_be_given(make_tiny_sam, photo):
    sam = make_tiny_sam()
    engine = Engine(sam.image_encoder, batch_size=3)
    encoder = ImageEncoder(sam, engine=engine)
    assert encoder.engine is engine
    with pytest.raises(ValueError, match="either an engine or backend, precision and pad"):
        ImageEncoder(sam, engine=engine, pad=False)


def test_a_backend_of_ones_own_has_no_weights_to_name(make_tiny_sam, photo):
    engine = Engine(None, backend=Mean(), image_spec=ImageSpec.sam(64))
    (found,) = ImageEncoder(make_tiny_sam(), engine=engine).encode(photo(20, 20))
    assert found.weights_sha256 is None
    assert found.features.shape == (1, 4, 4)
    hq = ImageEncoder(make_tiny_sam(is_hq=True), engine=engine)
    with pytest.raises(ValueError, match="gives no stages"):
        list(hq.encode(photo(20, 20)))


def test_images_are_prepared_as_the_sam_says(make_tiny_sam):
    sam = make_tiny_sam()
    assert spec_of(sam) == ImageSpec.sam(64)
    sam.pixel_mean.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
    found = spec_of(sam)
    np.testing.assert_allclose(found.mean, [1, 2, 3])
    np.testing.assert_allclose(found.std, ImageSpec.sam(64).std, rtol=1e-6)  # kept in float32
    sam = make_tiny_sam()
    sam.image_encoder.image_spec = None
    assert spec_of(sam) == ImageSpec.sam(64)


SPECS = [ImageSpec.sam(64), ImageSpec.sam(64, pad=False)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model_format", ["RGB", "BGR"])
def test_the_model_gets_its_own_order(photo, spec, model_format):
    image = photo(30, 41)
    same = prepare_image(image, model_format, model_format, spec)
    wanted = to_input(image, spec)
    assert np.array_equal(same[0], wanted[0])
    assert same[1] == wanted[1]
    other = {"RGB": "BGR", "BGR": "RGB"}[model_format]
    swapped = prepare_image(image[:, :, ::-1], other, model_format, spec)[0]
    assert np.array_equal(swapped, wanted[0])


def test_grey_has_no_order_and_transparency_stays_behind(photo):
    image, spec = photo(30, 41), SPECS[0]
    grey = image[:, :, 0]
    for source in (grey, grey[:, :, None]):
        found = prepare_image(source, "BGR", "RGB", spec)[0]
        assert np.array_equal(found, prepare_image(source, "RGB", "RGB", spec)[0])
    clear = np.full((30, 41), 7, np.uint8)
    bgra = np.dstack([image[:, :, ::-1], clear])
    found = prepare_image(bgra, "BGR", "RGB", spec)[0]
    assert np.array_equal(found, prepare_image(np.dstack([image, clear]), "RGB", "RGB", spec)[0])


@pytest.mark.parametrize("spec", SPECS)
def test_a_resized_image_is_padded_and_normalised_the_same(photo, spec):
    image = photo(30, 41)
    resized = ResizeLongestSide(64).apply_image(image)
    pixels = torch.from_numpy(resized).permute(2, 0, 1)[None]
    found, placement = prepare_resized(pixels, (30, 41), spec)
    wanted, where = to_input(image, spec)
    # one subtraction and one division in float32 of numbers up to 255
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    assert placement == where


def test_what_is_refused(photo):
    with pytest.raises(ValueError, match=r"one of \('RGB', 'BGR'\), came 'GBR'"):
        prepare_image(photo(8, 8), "GBR", "RGB", SPECS[0])
    with pytest.raises(ValueError, match=r"'BGR' is for arrays; .*: leave it out"):
        prepare_image(Image.fromarray(photo(8, 8)), "BGR", "RGB", SPECS[0])
    for shape in ((3, 48, 64), (2, 3, 48, 64), (1, 1, 48, 64), (1, 3, 48, 63), (1, 3, 64, 65)):
        with pytest.raises(ValueError, match=r"with the longer side 64, .* came \["):
            prepare_resized(torch.zeros(shape), (48, 64), SPECS[0])
