"""Stores made and updated by exported folders: the rows of the weights, without torch."""

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

import tiny
from tinyvit import CheckpointError, EmbeddingStore, Engine, Segmenter, embed_images
from tinyvit.embed.actors import EmbedActor, versions
from tinyvit.embed.recipe import Recipe
from tinyvit.embed.sources import list_sources
from without import run_without

pytest.importorskip("onnx")

EMBED = """
import sys
from tinyvit import EmbeddingStore, embed_images

sources, url, *checkpoint = sys.argv[1:]
report = embed_images(sources, url, *checkpoint)
print(report.stored, report.kept, EmbeddingStore.open(url).load_engine().backend.name)
"""


@pytest.fixture(scope="module")
def weights():
    """What was exported, run by torch."""
    return Engine(tiny.make_tiny_sam().image_encoder, backend="torch", image_spec=spec())


def spec():
    from tinyvit.sam.embedding import spec_of

    return spec_of(tiny.make_tiny_sam())


def test_without_torch(photos, url, exported, weights):
    missing = ("torch", "tinyvit_native")
    assert run_without(missing, EMBED, photos, url, exported()) == "6 0 onnx\n"
    tiny.write_image(photos / "new.png", 30, 30, seed=9)
    assert run_without(missing, EMBED, photos, url) == "1 6 onnx\n"  # by the store alone
    store = EmbeddingStore.open(url)
    wanted = weights.stream([photos / path for path in store], pooled=True)
    for (path, row), one in zip(store.iterate(raw=True), wanted, strict=True):
        assert_allclose(row.features.astype(np.float32), one.features, atol=2e-3, err_msg=path)
        assert_allclose(row.pooled, one.pooled, atol=1e-4)
    names = sorted(path.name for path in (url / "_encoder").iterdir())
    assert names == ["encoder.onnx", "tinyvit.json"]
    assert json.loads((url / "_encoder" / "tinyvit.json").read_text())["encoder"] == names[0]


@pytest.mark.parametrize("first", ["weights", "export"])
def test_weights_and_their_export_update_one_store(first, photos, url, exported, weights):
    """The backend makes nothing invalid."""
    engines = [weights, Engine(exported())]
    assert Recipe.of(engines[0]) == Recipe.of(engines[1])
    for number, engine in enumerate(engines if first == "weights" else reversed(engines)):
        tiny.write_image(photos / "new.png", 30, 30 + number, seed=9)
        report = embed_images(photos, url, engine)
        assert (report.stored, report.kept) == ((1, 6) if number else (7, 0))
    assert embed_images(photos, url).kept == 7
    segmenter = Segmenter(exported())
    (masks,) = segmenter.segment([EmbeddingStore.open(url)["new.png"]], [[{"points": [[9, 9]]}]])
    assert masks.mask(0).shape == (30, 31)
    other = Engine(tiny.make_tiny_sam(seed=1).image_encoder, backend="torch", image_spec=spec())
    with pytest.raises(CheckpointError, match=r"weights_sha256 is .* in the store and .* here"):
        embed_images(photos, url, other)


def test_openvinos_own_files(photos, url, exported):
    pytest.importorskip("openvino")
    embed_images(photos, url, exported("openvino"))
    names = sorted(path.name for path in (url / "_encoder").iterdir())
    assert names == ["encoder.bin", "encoder.xml", "tinyvit.json"]
    engine = EmbeddingStore.open(url).load_engine()
    assert engine.backend.name == "openvino"
    assert embed_images(photos, url, engine).kept == 6


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"storage": "fp16"}, "holds its weights in fp16, .*export again with --storage fp32"),
        ({"network_side": 32}, "adapts weights for 32 to inputs of 64, .* with --input-size 64"),
        ({"strides": None}, "does not say which weights it has, or with which strides"),
        ({"weights_sha256": None}, "does not say which weights it has"),
    ],
)
def test_what_does_not_give_what_its_weights_give(changes, words, photos, url, exported):
    engine = Engine(exported())
    engine.backend.facts = replace(engine.backend.facts, **changes)
    with pytest.raises(CheckpointError, match=words):
        embed_images(photos, url, engine)
    assert not url.exists()


def test_an_early_map_and_another_part_are_not_there(photos, url, exported):
    with pytest.raises(ValueError, match=r"early map of Light HQ-SAM .* torch makes it"):
        embed_images(photos, url, exported(), early=True)
    with pytest.raises(CheckpointError, match="embeddings of a store come from an encoder"):
        embed_images(photos, url, exported(part="features"))


@pytest.mark.parametrize("is_exported", [True, False])
def test_an_actor_runs_what_the_store_has(is_exported, photos, url, exported):
    """Whatever its driver runs."""
    store = EmbeddingStore.create(url, Engine(exported()))
    backend = "onnx" if is_exported else "native"
    task = {
        **{"url": str(url), "storage_options": None, "recipe": store.recipe, "cpus": 1.0},
        **{"versions": versions(), "places": [str(photos)], "max_pixels": None},
        **{"is_exported": is_exported, "engine": {"backend": backend, "batch_size": 8}},
    }
    actor = EmbedActor(task)
    assert actor.begin() == {"backend": "onnx", "device": "cpu"}
    sources, _ = list_sources(str(photos), str(url))
    _, outcomes, _, _ = actor.work(sources)
    assert [one.state for one in outcomes] == ["stored"] * 6
