"""benchmarks/embed.py: its parts at small sizes, and its page."""

import argparse
import json

import pytest


@pytest.fixture
def bench(load_benchmark):
    return load_benchmark("embed")


def options(**values):
    sizes = {"rows": 16, "reads": 4, "many_rows": 40, "photos": None, "checkpoint": None}
    return argparse.Namespace(**{**sizes, **values})


def test_parts_and_their_page(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    small_engine = bench.small_engine
    monkeypatch.setattr(bench, "small_engine", lambda size=64: small_engine(64))
    found = {
        name: {**bench.PARTS[name](options()), "machine": bench.machine_facts("pylance")}
        for name in ("lookup", "opening")
    }
    assert found["lookup"]["int8"]["rows"] == 16
    assert found["opening"]["rows"] == 40
    text = bench.page(json.loads(json.dumps(found)))
    assert "## Lookup" in text and "## Opening" in text
    assert "| int8 | 16 | 1.05 | " in text


def test_the_page_is_that_of_the_numbers(bench):
    text = (bench.HERE / "embed.md").read_text()
    assert text == bench.page(json.loads((bench.HERE / "embed.json").read_text()))


def test_vectors_are_indexed_where_there_are_many(bench, tmp_path, monkeypatch):
    import numpy as np

    from tinyvit.embed import EmbeddingStore, commits

    store = EmbeddingStore.create(tmp_path / "x.lance", bench.small_engine(), keep="pooled")
    bench.fill(store, 600, 1, 2)
    assert not commits.index_vectors(store)
    exact = [match.path for match in store.similar("folder-0000/image 7.jpg", 5)]
    monkeypatch.setattr(commits, "VECTORS_TO_INDEX", 600)
    assert commits.index_vectors(store)
    found = [match.path for match in store.similar("folder-0000/image 7.jpg", 200)]
    assert len(set(exact) & set(found)) >= 3  # nearly exact
    assert ["pooled"] in [one.field_names for one in store.dataset.describe_indices()]
    assert np.isfinite([match.similarity for match in store.similar(np.ones(256), 5)]).all()
