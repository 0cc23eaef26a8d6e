"""benchmarks/embed.py: its parts at small sizes, and its page."""

import argparse
import json
import re
from pathlib import Path

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


def write_scenes(folder, count):
    """Photographs of one colour each, and objects of another, in a folder beside them."""
    from PIL import Image

    for kind, size, blue in (("scenes", (64, 48), 40), ("things", (20, 30), 200)):
        (folder / kind).mkdir()
        for number in range(count):
            colour = (number * 37 % 256, number * 91 % 256, blue)
            Image.new("RGB", size, colour).save(folder / kind / f"{number}.png")
    rows = "".join(f"things/{number}.png,{min(number, count - 2)}\n" for number in range(count))
    (folder / "things.csv").write_text(f"file,group\n{rows}")


def test_what_search_finds_alike(bench, tmp_path):
    likeness = bench.likeness
    write_scenes(tmp_path, 9)
    assert len(likeness.files_in(tmp_path / "things")) == 8  # two are of one group
    (tmp_path / "work").mkdir()
    found = likeness.measure(
        tmp_path / "things", tmp_path / "scenes", ["tinyvit_sam_2m"], tmp_path / "work"
    )
    assert (found["photographs"], found["quads"]) == (9, 4)
    colours = found["rows"]["colours alone"]
    assert colours["halves"] == 1  # of one colour each
    assert colours["things"]["0.3"] == {"nearer": 0, "nearest_object": 0, "nearest_place": 1}
    shares = found["rows"]["tinyvit_sam_2m"]["things"]["0.5"]
    assert all(0 <= share <= 1 for share in shares.values())
    text = bench.page({"likeness": {**found, "machine": bench.machine_facts("pylance")}})
    assert "| colours alone | 100.0% |" in text
    assert "| colours alone | 0.3 | 0.0% | 0.0% | 100.0% |" in text


def test_vectors_of_things_and_of_places(bench):
    """What would find objects alone, and what would find photographs alone."""
    import numpy as np

    names = [f"000{q}-object{o}-place{p}.jpg" for q in "01" for o in "01" for p in "01"]
    for part, wanted in (("object", (1, 1, 0)), ("place", (0, 0, 1))):
        vectors = {}
        for name in names:
            number = 2 * int(name[3]) + int(name.split(part)[1][0])
            vectors[name] = np.eye(5, dtype=np.float32)[number] + 0.01 * np.eye(5)[4]
        found = bench.likeness.things_found(vectors)
        assert tuple(found.values()) == wanted


def test_the_page_of_actors(bench):
    one = {"rate": [4.0, 4.0], "after_first": [4, 4], "whole": [3, 3], "ready_s": [2, 2]}
    two = {**one, "rate": [7.0, 7.2]}
    facts = {
        **{"cost_s": 0.25, "images_per_actor": 240, "rounds": 2, "actors": {"1": one, "2": two}},
    }
    lines = bench.actors_lines(facts)
    assert any(line.startswith("| 2 | 7.10 | 88.8% | 87.5% | 88.8% |") for line in lines)
    facts = {"images": 4, "size": 64, "engine": "torch", "rounds": 2}
    lines = bench.ray_lines({**facts, "plain": [2.0, 1.0], "ray": [1.9, 0.9]})
    assert lines[-1] == "| 1.400 | 1.500 | 92.5% (90.0% to 95.0%) |"


def test_what_shows_the_promises_is_there(bench):
    page = (bench.HERE.parent / "docs" / "embed.md").read_text()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in tests} == set()
