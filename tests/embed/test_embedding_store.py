"""``EmbeddingStore``: what it gives, refuses and survives; rows in each dtype."""

import json
import os
import pickle
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.testing import assert_allclose, assert_array_equal

import tiny
from tinyvit import CheckpointError, EmbeddingStore, Engine, ImageSpec, Segmenter, embed_images
from tinyvit.embed import Match, UnknownImageError
from tinyvit.embed.commits import keep_up, version_facts
from tinyvit.embed.recipe import FORMAT, KEY, Recipe
from tinyvit.embed.rows import DamagedRowError, dequantise, quantise
from tinyvit.sam.embedding import ImageEncoder

NAMES = ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png"]


@pytest.fixture
def store(photos, url, engine):
    (photos / "broken.png").write_bytes(b"")
    embed_images(photos, url, engine)
    return EmbeddingStore.open(url)


def test_it_is_a_mapping_of_what_could_be_embedded(store, engine):
    assert len(store) == 6 and list(store) == NAMES
    assert "a/0.png" in store and "broken.png" not in store and "a/9.png" not in store
    assert 3 not in store
    assert [e.original_size for e in store.get_many(reversed(NAMES))] == [
        (24 + int(name[2]), 40) for name in reversed(NAMES)
    ]
    assert repr(store) == f"EmbeddingStore('{store.url}', 6 images)"
    assert isinstance(store.recipe, Recipe)
    assert store.recipe.weights_sha256 == engine.weights_sha256()
    assert store.dataset.count_rows() == 7
    assert [row.path for row in store.rows()] == ["broken.png", *NAMES]
    assert "is empty" in next(store.rows("failed")).reason
    assert repr(next(store.rows("ok"))) == "StoreRow('a/0.png', 'ok')"


def test_unknown_paths_name_the_nearest(store):
    words = r"has no image 'a/O.png'; the nearest are 'a/(\d).png', 'a/\d.png', 'a/\d.png'$"
    with pytest.raises(UnknownImageError, match=words):
        store["a/O.png"]
    with pytest.raises(KeyError, match=r"'broken.png' is in .*, but failed: .* is empty"):
        store["broken.png"]
    with pytest.raises(KeyError, match=r"has no image '☃'$"):
        store["☃"]
    assert store.get("a/9.png") is None


def test_what_others_add_is_found(store, photos, url, engine):
    tiny.write_image(photos / "c/new.png", 30, 30, seed=9)
    embed_images(photos, url, engine)
    assert store["c/new.png"].original_size == (30, 30)
    assert len(store) == 7


def test_a_store_travels_as_its_address(store):
    other = pickle.loads(pickle.dumps(store))
    assert other.url == store.url and list(other) == NAMES


def test_parts_and_orders_of_iteration(store):
    def names(**options):
        return [path for path, _ in store.iterate(**options)]

    assert names() == NAMES
    assert sorted(names(part=(0, 2)) + names(part=(1, 2))) == NAMES
    assert names(shuffle=1) == names(shuffle=1) != names(shuffle=2)
    assert sorted(names(shuffle=1)) == NAMES
    assert sorted(names(part=(0, 2), shuffle=1) + names(part=(1, 2), shuffle=1)) == NAMES
    for path, row in store.iterate(raw=True):
        assert row.features.dtype == np.float16
        assert_array_equal(row.features.astype(np.float32), store[path].features)
    with pytest.raises(ValueError, match=r"part must be \(i, n\) with 0 <= i < n, came \(2, 2\)"):
        store.iterate((2, 2))


def test_vectors_and_search(store, engine, photos):
    paths, matrix = store.vectors()
    encoded = list(engine.stream([photos / path for path in paths], pooled=True))
    assert_allclose(matrix, [one.pooled for one in encoded], rtol=1e-6)
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    wanted = unit @ unit[0]
    order = np.argsort(-wanted)
    matches = store.similar(paths[0], 3)
    assert [match.path for match in matches] == [paths[i] for i in order[1:4]]
    assert_allclose([match.similarity for match in matches], wanted[order[1:4]], atol=1e-5)
    first, *_ = store.similar(matrix[0], k=2)
    assert isinstance(first, Match) and first.path == paths[0]
    with pytest.raises(ValueError, match=r"the vectors of .* are \[16\]; came \[3\]"):
        store.similar(np.zeros(3))
    with pytest.raises(ValueError, match="k must be at least 1"):
        store.similar(paths[0], 0)
    with pytest.raises(UnknownImageError):
        store.similar("none.png")


def test_content_is_found_by_its_hash(store, photos):
    import hashlib

    sha256 = hashlib.sha256((photos / "a/2.png").read_bytes()).hexdigest()
    row = store.find_content(sha256)
    assert row.path == "a/2.png" and row.features is not None
    assert store.find_content("0" * 64) is None


def test_there_are_indexes_of_path_and_content(store):
    columns = [index.field_names for index in store.dataset.describe_indices()]
    assert sorted(columns) == [["path"], ["sha256"]]
    plan = store.dataset.scanner(filter="path = 'a/0.png'").explain_plan()
    assert "ScalarIndexQuery" in plan
    plan = store.dataset.scanner(filter="sha256 = 'a'").explain_plan()
    assert "ScalarIndexQuery" in plan


def test_the_encoder_stays_when_old_versions_are_cleaned(store, engine, photos, url):
    for number in range(9):
        tiny.write_image(photos / f"c/{number}.png", 20, 20, seed=20 + number)
        embed_images(photos / "c", url, engine)
    before = {row.path: row.features.tobytes() for _, row in store.iterate(raw=True)}
    keep_up(store, timedelta(0))
    store.dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
    assert len(store.dataset.versions()) == 1
    assert len(store.dataset.get_fragments()) < 9  # compacted
    after = {row.path: row.features.tobytes() for _, row in store.iterate(raw=True)}
    assert {**after, **before} == after and len(after) == 15
    assert store.load_engine().weights_sha256() == engine.weights_sha256()
    assert embed_images(photos / "c", url).kept == 9


def test_a_reader_of_a_version_that_is_gone(photos, store, url, engine):
    old = EmbeddingStore.open(url)
    stream = old.iterate()
    first = next(stream)
    for number in range(8):  # every row is replaced, compacted, and its files deleted
        for name in NAMES:
            tiny.write_image(photos / name, 20, 20 + number, seed=number)
        embed_images(photos, url, engine)
    keep_up(store, timedelta(0))
    assert first[1].original_size[1] == 40
    sizes = {e.original_size for _, e in stream} | {old[NAMES[0]].original_size}
    assert sizes <= {(24 + n, 40) for n in range(6)} | {(20, 27)}  # whole, of either version
    assert old[NAMES[0]].original_size == (20, 27)


def test_each_commit_says_what_made_it(store):
    facts = version_facts(store)
    assert facts["backend"] == "torch" and facts["device"] == "cpu"
    assert {"tinyvit", "pylance"} <= facts.keys()


# -- what is kept, and how -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, kind", [("fp16", np.float16), ("fp32", np.float32)])
def test_floats(photos, url, engine, dtype, kind):
    embed_images(photos, url, engine, dtype=dtype)
    store = EmbeddingStore.open(url)
    (wanted,) = engine.stream(photos / "a/0.png")
    assert_array_equal(store["a/0.png"].features, wanted.features.astype(kind))
    row = next(row for _, row in store.iterate(raw=True))
    assert row.features.dtype == kind and row.scales is None


def test_int8_is_within_half_a_scale(photos, url, engine):
    embed_images(photos, url, engine, dtype="int8")
    store = EmbeddingStore.open(url)
    for path, row in store.iterate(raw=True):
        (wanted,) = engine.stream(photos / path)
        error = np.abs(store[path].features - wanted.features)
        assert row.features.dtype == np.int8
        assert (error <= row.scales[:, None, None] * 0.5001).all()
    embed_images(photos, url)  # the store's own dtype


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=3, max_dims=3, max_side=5),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.sampled_from([0, -1]),
)
def test_int8_of_any_map_is_within_half_a_scale(values, axis):
    stored, scales = quantise(values, "int8", axis)
    back = dequantise(stored, scales, axis)
    others = (1, 2) if axis == 0 else (0, 1)
    limit = np.expand_dims(scales.astype(np.float64), others) / 2
    assert scales.shape == (values.shape[axis],)
    error = np.abs(back.astype(np.float64) - values.astype(np.float64))
    assert (error <= limit * (1 + 1e-4) + np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
def test_numbers_that_are_not_finite_are_refused(dtype):
    values = np.ones((2, 2, 2), np.float32)
    values[1, 1, 1] = np.inf
    with pytest.raises(ValueError, match="not all finite"):
        quantise(values, dtype, 0)
    if dtype == "fp16":
        with pytest.raises(
            ValueError, match="too large for fp16; make the store with --dtype fp32"
        ):
            quantise(np.full((1, 1, 1), 1e5, np.float32), dtype, 0)


def test_vectors_alone(photos, url, engine):
    embed_images(photos, url, engine, keep="pooled")
    store = EmbeddingStore.open(url)
    assert store.vectors()[1].shape == (6, 16)
    assert store.similar("a/0.png", 1)
    for read in (lambda: store["a/0.png"], store.iterate):
        with pytest.raises(ValueError, match="keeps pooled vectors and no features; take vectors"):
            read()
    assert all(row.features is None for _, row in store.iterate(raw=True))
    assert store.find_content(next(store.rows()).sha256).pooled.shape == (16,)


def test_a_classifiers_store_has_what_its_head_sees(photos, url):
    import torch

    model = tiny.make_tiny_classifier(size=32)
    engine = Engine(model, backend="torch")
    embed_images(photos, url, engine)
    paths, matrix = EmbeddingStore.open(url).vectors()
    assert EmbeddingStore.open(url).recipe.keep == "pooled"
    for path, vector in zip(paths, matrix, strict=True):
        pixels, _ = engine.prepare(photos / path)
        with torch.no_grad():
            seen = model.forward_head(
                model.forward_backbone(torch.from_numpy(pixels[None])), pre_logits=True
            )
        assert_allclose(vector, seen[0].numpy(), rtol=1e-5, atol=1e-6)
    assert embed_images(photos, url).kept == 6
    with pytest.raises(ValueError, match="a classifier gives one vector"):
        embed_images(photos, photos.parent / "other.lance", engine, keep="all")


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_light_hq_sam_has_its_early_map(photos, url, dtype):
    sam = tiny.make_tiny_sam(is_hq=True)
    encoder = ImageEncoder(sam, backend="torch")
    embed_images(photos, url, encoder.engine, dtype=dtype, early=True)
    store = EmbeddingStore.open(url)
    (wanted,) = encoder.encode(photos / "a/0.png")
    got = store["a/0.png"]
    atol = 0 if dtype == "fp32" else np.abs(wanted.interm_features).max() / 254 * 1.001
    assert_allclose(got.interm_features, wanted.interm_features, rtol=1e-6, atol=max(atol, 1e-7))
    segmenter = Segmenter(sam, backend="torch")
    masks = [
        next(segmenter.segment([one], [[{"points": [[20, 12]]}]])).low_res_logits[0]
        for one in (wanted, got)
    ]
    assert_allclose(*masks, atol=1e-4 if dtype == "fp32" else 1)
    assert embed_images(photos, url, encoder.engine).kept == 6  # its recipe says what is kept


def test_segmenter_and_predictor_take_what_it_gives(photos, url):
    sam = tiny.make_tiny_sam()
    segmenter = Segmenter(sam, backend="torch")
    embed_images(photos, url, segmenter.encoder.engine, dtype="fp32")
    store = EmbeddingStore.open(url)
    prompts = [[{"points": [[20, 12]]}]] * 2
    names = NAMES[:2]
    stored = segmenter.segment([store[name] for name in names], prompts)
    fresh = segmenter.segment([photos / name for name in names], prompts)
    for one, other in zip(stored, fresh, strict=True):
        assert_allclose(one.low_res_logits[0], other.low_res_logits[0], atol=1e-5)
    other = tiny.make_tiny_sam(seed=7)
    with pytest.raises(ValueError, match="made by an encoder with weights"):
        next(Segmenter(other, backend="torch").segment([store["a/0.png"]], prompts[:1]))


# -- what is not served ----------------------------------------------------------------------------


def test_flipped_bytes_are_never_served(photos, url, engine):
    embed_images(photos, url, engine)
    wanted = dict(EmbeddingStore.open(url).iterate())
    (file,) = (url / "data").glob("*.lance")
    data = bytearray(file.read_bytes())
    served = damaged = broken = 0
    for place in range(0, len(data), 61):
        data[place] ^= 4
        file.write_bytes(data)
        for path in NAMES[place % 6 :][:1]:
            try:
                got = EmbeddingStore.open(url)[path]
                assert_array_equal(got.features, wanted[path].features)
                assert got.placement == wanted[path].placement
                served += 1  # the byte was not of this row
            except DamagedRowError as err:
                assert f"the row of {path!r} in {url} is damaged" in str(err)
                damaged += 1
            except (OSError, ValueError, KeyError, RuntimeError):
                broken += 1
        data[place] ^= 4
    assert served and damaged and broken


def change_recipe(url, **changes):
    dataset = EmbeddingStore.open(url).dataset
    recipe = json.loads(dataset.schema.metadata[KEY])
    dataset.update_schema_metadata({KEY.decode(): json.dumps({**recipe, **changes})})


def test_formats_that_cannot_be_read(store, url, tmp_path):
    import lance
    import pyarrow as pa

    with pytest.raises(CheckpointError, match=r"there is no embedding store at .*none.lance; make"):
        EmbeddingStore.open(tmp_path / "none.lance")
    lance.write_dataset(pa.table({"a": [1]}), tmp_path / "other.lance")
    with pytest.raises(CheckpointError, match="is a Lance dataset and no embedding store"):
        EmbeddingStore.open(tmp_path / "other.lance")
    change_recipe(url, format=FORMAT + 1, tinyvit_version="9.9")
    words = rf"was written by tinyvit 9.9, format {FORMAT + 1}; this reads up to {FORMAT}; upgrade"
    with pytest.raises(CheckpointError, match=words):
        EmbeddingStore.open(url)
    lance.dataset(str(url)).update_schema_metadata({KEY.decode(): "{"})
    with pytest.raises(CheckpointError, match="its recipe is damaged"):
        EmbeddingStore.open(url)


def test_an_encoder_that_is_missing_or_another(store, url, photos):
    from tinyvit import save_pretrained

    save_pretrained(tiny.make_tiny_engine(3).model, url / "_encoder")
    with pytest.raises(CheckpointError, match="but the rows were made with"):
        store.load_engine()
    (url / "_encoder" / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no _encoder/config.json: .*; name the checkpoi"
    ):
        embed_images(photos, url)


def test_create_refuses_what_is_there(store, url, engine, tmp_path):
    with pytest.raises(CheckpointError, match="is there already; open it, or choose another name"):
        EmbeddingStore.create(url, engine)
    (tmp_path / "unfinished" / "_encoder").mkdir(parents=True)
    assert len(EmbeddingStore.create(tmp_path / "unfinished", engine)) == 0
    with pytest.raises(ValueError, match="dtype must be one of fp16, int8, fp32; came 'fp8'"):
        EmbeddingStore.create(tmp_path / "new", engine, dtype="fp8")
    assert not os.path.exists(tmp_path / "new")


def test_the_encoder_of_an_engine_without_torch(tmp_path, url):
    from types import SimpleNamespace

    from tinyvit import save_pretrained
    from tinyvit.embed.recipe import write_encoder
    from tinyvit.factory import open_stored

    engine = tiny.make_tiny_engine()
    stored = open_stored(save_pretrained(engine.model, tmp_path / "first"))
    write_encoder(SimpleNamespace(model=stored, image_spec=engine.image_spec), tmp_path / "second")
    again = Engine(tmp_path / "second", backend="torch")
    assert again.weights_sha256() == engine.weights_sha256()
    assert again.image_spec == engine.image_spec
    written = open_stored(tmp_path / "second")
    assert written.arguments == stored.arguments
    shapes = {key: array.shape for key, array in stored.tensors.items()}
    assert {key: array.shape for key, array in written.tensors.items()} == shapes


def test_the_native_engines_store_updates_itself(photos, url):
    pytest.importorskip("tinyvit_native")
    engine = Engine("tinyvit_sam_2m", backend="native", image_spec=ImageSpec.sam(64))
    embed_images(photos / "a", url, engine)
    assert EmbeddingStore.open(url).load_engine(backend="native").backend.name == "native"
    report = embed_images(photos, url)
    assert (report.stored, report.copied) == (3, 3)
