from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import to_input
from tinyvit.inference import Engine
from tinyvit.sam.embedding import ImageEncoder, spec_of

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
        torch.testing.assert_close(found.features, sam.image_encoder(x[None])[0], **CLOSE)
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
    torch.testing.assert_close(found.features, features[0], **CLOSE)
    torch.testing.assert_close(found.interm_features, early[0], **CLOSE)
    assert all(torch.equal(value, before[key]) for key, value in sam.state_dict().items())


def test_many_images_come_in_order(make_tiny_sam, photo):
    encoder = ImageEncoder(make_tiny_sam(), batch_size=2)
    sizes = [(64, 64), (20, 30), (64, 64), (30, 20)]
    found = list(encoder.encode(photo(*size, seed=i) for i, size in enumerate(sizes)))
    assert [embedding.original_size for embedding in found] == sizes
    (alone,) = encoder.encode(photo(64, 64, seed=2))
    torch.testing.assert_close(found[2].features, alone.features, **CLOSE)


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
