"""A server with an embedding store: stored images are not encoded, other models are refused."""

from dataclasses import replace

import numpy as np
import pytest

import tiny
from tinyvit import EmbeddingStore, Segmenter, embed_images
from tinyvit.errors import CheckpointError
from tinyvit.serve import ServeSettings, create_app


@pytest.fixture(scope="module")
def small():
    return Segmenter(tiny.make_tiny_sam(), backend="torch")


@pytest.fixture
def photos(tmp_path):
    for number in range(3):
        tiny.write_image(tmp_path / "photos" / f"{number}.png", 30, 40, seed=number)
    return tmp_path / "photos"


@pytest.fixture
def url(tmp_path, photos, small):
    embed_images(photos, tmp_path / "photos.lance", small.encoder.engine, dtype="fp32")
    return str(tmp_path / "photos.lance")


@pytest.fixture
def encoded(small, monkeypatch):
    """How many images were encoded."""
    count, encode = [], small.encoder.encode_prepared

    def counted(inputs):
        for made in encode(inputs):
            count.append(made)
            yield made

    monkeypatch.setattr(small.encoder, "encode_prepared", counted)
    return count


def send(client, path):
    answer = client("POST", "/v1/images", path.read_bytes(), "image/png")
    return answer.status, answer.json["id"]


def click(client, image_id):
    body = {"prompts": [{"points": [[20, 15]]}], "include": ["counts"]}
    return client("POST", f"/v1/images/{image_id}/segment", body).json["objects"]


def test_stored_images_are_not_encoded(serving, small, photos, url, encoded, tmp_path):
    renamed = (photos / "1.png").rename(tmp_path / "other.png")
    with serving(ServeSettings(port=0), small) as (client, _):
        status, image_id = send(client, renamed)
        wanted = click(client, image_id)
    assert status == 201 and len(encoded) == 1
    with serving(ServeSettings(port=0, store=url), small) as (client, service):
        assert client("GET", f"/v1/images/{image_id}").status == 200  # before it was sent
        assert send(client, renamed) == (200, image_id)
        assert click(client, image_id) == wanted and len(encoded) == 1
        assert client("DELETE", f"/v1/images/{image_id}").status == 204
        assert client("GET", f"/v1/images/{image_id}").status == 200  # nothing is deleted there

        tiny.write_image(photos / "new.png", 33, 44, seed=9)
        assert send(client, photos / "new.png")[0] == 201 and len(encoded) == 2
        service.cache.forget(send(client, photos / "new.png")[1])
        embed_images(photos, url, small.encoder.engine)
        assert send(client, photos / "new.png")[0] == 200 and len(encoded) == 2
    kept = EmbeddingStore.open(url)["1.png"]
    assert np.array_equal(kept.features, next(iter(small.encoder.encode([renamed]))).features)


def test_a_damaged_row_is_encoded(serving, small, photos, url, encoded, monkeypatch):
    from tinyvit.embed.rows import DamagedRowError

    def damaged(self, sha256):
        raise DamagedRowError("the row is damaged")

    monkeypatch.setattr(EmbeddingStore, "find_content", damaged)
    with serving(ServeSettings(port=0, store=url), small) as (client, _):
        assert send(client, photos / "0.png")[0] == 201 and len(encoded) == 1


def refusal(url, segmenter):
    with pytest.raises(CheckpointError) as caught:
        create_app(ServeSettings(port=0, store=str(url)), segmenter).service.load()
    return str(caught.value)


def test_a_store_of_another_model_is_refused(tmp_path, photos, url, small):
    other = Segmenter(tiny.make_tiny_sam(seed=1), backend="torch")
    sums = [one.encoder.weights_sha256()[:12] for one in (small, other)]
    words = refusal(url, other)
    assert f"weights_sha256 is {sums[0]}… in the store and {sums[1]}… here" in words
    assert "precision" not in words.partition(". Serve")[0] and "--checkpoint" in words
    assert "image_spec is ImageSpec" in refusal(
        url, Segmenter(tiny.make_tiny_sam(size=96), backend="torch")
    )
    precise = Segmenter(small.source, backend="torch", precision="bf16")
    assert "precision is fp32 in the store and bf16 here" in refusal(url, precise)
    hq = Segmenter(tiny.make_tiny_sam(is_hq=True), backend="torch")
    assert "early is False in the store and True here" in refusal(url, hq)
    embed_images(photos, tmp_path / "vectors.lance", small.encoder.engine, keep="pooled")
    assert "keep is pooled in the store and all here" in refusal(tmp_path / "vectors.lance", small)
    assert "there is no embedding store at" in refusal(tmp_path / "none.lance", small)


def test_an_export_is_served_with_the_store_of_its_weights(url, exported):
    model = Segmenter(exported())
    create_app(ServeSettings(port=0, store=str(url)), model).service.load()
    backend = model.encoder.engine.backend
    backend.facts = replace(backend.facts, network_side=32)
    assert "encoder.onnx adapts weights for 32 to inputs of 64" in refusal(url, model)
