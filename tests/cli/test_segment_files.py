from __future__ import annotations

import json

import numpy as np
import pytest

from tinyvit.errors import CheckpointError
from tinyvit.folders.segment import Names, begin, document, finish, look, write_logits

FACTS = {
    **{"made_by": "tinyvit segment", "model_sha256": "m", "image_spec": {"pad": True}},
    **{"precision": "fp32", "picture": "a.jpg", "picture_bytes": 1, "picture_mtime_ns": 2},
    "task": {"mode": "prompts"},
}


@pytest.fixture
def names(tmp_path):
    return Names.of(tmp_path, "a", objects=2, candidates=1, with_logits=False)


def write(names, facts=FACTS, own=()):
    begin(names, facts, own)
    for path in names.beside():
        path.write_text("x")
    finish(names, document(names, facts, (4, 6), [{"area": 3}]), own)


def test_names(tmp_path):
    def listed(*arguments):
        return [path.name for path in Names.of(tmp_path, "in/a.jpg", *arguments).beside()]

    assert listed(0, 1, False) == ["a.jpg.overlay.png"]
    assert listed(1, 3, True) == [
        "a.jpg.overlay.png",
        *("a.jpg.mask-1-1.png", "a.jpg.mask-1-2.png", "a.jpg.mask-1-3.png"),
        "a.jpg.logits-1.npy",
    ]
    assert listed(2, 1, False)[1:] == ["a.jpg.mask-1.png", "a.jpg.mask-2.png"]
    assert Names.of(tmp_path, "in/a.jpg", 0, 1, False).document == tmp_path / "in/a.jpg.json"


def test_the_document_is_what_coco_has(names):
    found = document(names, FACTS, (4, 6), [{"area": 3}, {"area": 5}])
    assert found["images"] == [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 6}]
    assert found["annotations"] == [{"id": 1, "area": 3}, {"id": 2, "area": 5}]
    assert found["categories"] == [{"id": 1, "name": "object"}]
    files = ["a.mask-1.png", "a.mask-2.png", "a.overlay.png"]
    assert found["info"] == {**FACTS, "files": files, "is_complete": True}


def test_nothing_then_current(names):
    assert look(names, FACTS).state == "nothing"
    write(names)
    found = look(names, FACTS)
    assert found.state == "current"
    assert set(found.own) == set(names.beside())


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        ("model_sha256", "made by another model"),
        ("image_spec", "made with another preparation of images"),
        ("precision", "made in another precision"),
        ("picture", "made of another image"),
        ("picture_bytes", "made of an image that has changed since"),
        ("picture_mtime_ns", "made of an image that has changed since"),
        ("task", "made with other prompts or options"),
    ],
)
def test_another_fact_is_outdated(names, fact, words):
    write(names)
    found = look(names, {**FACTS, fact: "other"})
    assert (found.state, found.reason) == ("outdated", words)


def test_what_an_interruption_leaves_is_ours(names):
    begin(names, FACTS, ())
    names.masks[0].write_text("half")
    found = look(names, FACTS)
    assert (found.state, found.reason) == ("outdated", "left unfinished")
    assert names.masks[0] in found.own


def test_a_missing_file_is_noticed(names):
    write(names)
    names.overlay.unlink()
    assert look(names, FACTS).reason == "not all there any more"


def test_files_of_others(names):
    names.masks[1].write_text("mine")
    found = look(names, FACTS)
    assert found.state == "foreign"
    assert found.reason == f"{names.masks[1]} is there already and was not made by this command"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"info": 1}', '{"info": {"made_by": "me"}}'])
def test_a_document_of_others(names, text):
    names.document.write_text(text)
    found = look(names, FACTS)
    assert found.state == "foreign"
    assert str(names.document) in found.reason


def test_fewer_masks_than_before_leave_none_behind(names, tmp_path):
    write(names)
    fewer = Names.of(tmp_path, "a", objects=1, candidates=1, with_logits=False)
    write(fewer, own=look(fewer, FACTS).own)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.json", "a.mask-1.png", "a.overlay.png")
    ]


def test_more_masks_than_before_do_not_take_a_stranger_s(names, tmp_path):
    write(names)
    (tmp_path / "a.mask-3.png").write_text("mine")
    more = Names.of(tmp_path, "a", objects=3, candidates=1, with_logits=False)
    assert look(more, FACTS).state == "foreign"


def test_a_document_cannot_name_files_elsewhere(names, tmp_path):
    facts = {**FACTS, "files": ["../b.png", "/etc/b.png", 3, "c.png"], "is_complete": True}
    names.document.write_text(json.dumps({"info": facts}))
    assert look(names, FACTS).own == (tmp_path / "c.png",)


def test_logits_are_whole_or_not_there(tmp_path):
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_logits(tmp_path / "a.npy", logits)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), logits)
    with pytest.raises(CheckpointError, match="no folder"):
        write_logits(tmp_path / "none" / "a.npy", logits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
