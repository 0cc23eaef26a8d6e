from __future__ import annotations

import json

import numpy as np
import pytest

from tiny import make_tiny_vit
from tinyvit.checkpoints import write_state_dict
from tinyvit.folders.encode import write_features
from tinyvit.folders.images import Item
from tinyvit.folders.runner import facts_of_engine, facts_of_image, find_existing
from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Engine

FACTS = {
    **{"made_by": "tinyvit segment", "tinyvit_version": "0.1.0", "strides": [2, 2, 1]},
    **{"weights_sha256": "w", "model_sha256": "m", "image_spec": {"pad": True}},
    **{"precision": "fp32", "picture": "a b.jpg", "picture_bytes": 1},
    **{"picture_mtime_ns": 1_700_000_000_123_456_789, "task": {"mode": "prompts"}},
}
FEATURES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture(params=[".json", ".safetensors"])
def files(request, tmp_path):
    """A main file, the one beside it, and ``write(facts)`` which writes both."""
    path, beside = tmp_path / f"a{request.param}", tmp_path / "a.png"

    def write(facts=FACTS, has_beside=True):
        names = [beside.name] if has_beside else []
        if has_beside:
            beside.write_text("x")
        if path.suffix == ".json":
            info = {**facts, "files": names, "is_complete": True}
            path.write_text(json.dumps({"info": info}))
        else:
            write_features(path, torch_of(FEATURES), {**facts, "drawing": (names or [None])[0]})

    return path, beside, write


def torch_of(array):
    import torch

    return torch.from_numpy(array)


def test_nothing_then_current(files):
    path, beside, write = files
    assert find_existing(path, [beside], FACTS).state == "nothing"
    write()
    found = find_existing(path, [beside], {**FACTS, "tinyvit_version": "9", "checkpoint": "x"})
    assert (found.state, found.own) == ("current", (beside,))
    assert find_existing(path, [], FACTS).state == "current"  # a file more does no harm


@pytest.mark.parametrize(
    ("fact", "reason"),
    [
        ("weights_sha256", "made by another model"),
        ("model_sha256", "made by another model"),
        ("strides", "made with other strides"),
        ("image_spec", "made with another preparation of images"),
        ("precision", "made in another precision"),
        ("picture", "made of another image"),
        ("picture_bytes", "made of an image that has changed since"),
        ("picture_mtime_ns", "made of an image that has changed since"),
        ("task", "made with other prompts or options"),
    ],
)
def test_another_fact_is_outdated(files, fact, reason):
    path, beside, write = files
    write()
    found = find_existing(path, [beside], {**FACTS, fact: "other"})
    assert (found.state, found.reason, found.own) == ("outdated", reason, (beside,))


@pytest.mark.parametrize("has_beside", [True, False])
def test_a_missing_file_makes_them_outdated(files, has_beside):
    path, beside, write = files
    write(has_beside=has_beside)
    beside.unlink(missing_ok=True)
    assert find_existing(path, [beside], FACTS).reason == "not all there any more"
    assert find_existing(path, [beside], FACTS, "without it").reason == "without it"


def test_what_an_interruption_leaves_is_ours(tmp_path):
    path, beside = tmp_path / "a.json", tmp_path / "a.png"
    beside.write_text("half")
    info = {**FACTS, "files": [beside.name], "is_complete": False}
    path.write_text(json.dumps({"info": info}))
    found = find_existing(path, [beside], FACTS)
    assert (found.state, found.reason, found.own) == ("outdated", "left unfinished", (beside,))


def test_a_file_of_others_beside_it(files):
    path, beside, write = files
    beside.write_text("mine")
    for has_main in (False, True):  # a main file that does not name it changes nothing
        if has_main:
            write(has_beside=False)
        found = find_existing(path, [beside], FACTS)
        assert found.state == "foreign"
        assert found.reason == f"{beside} is there already and was not made by this command"
    assert find_existing(path, [], FACTS).state == "current"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"info": 1}', '{"info": {"made_by": "me"}}'])
def test_a_main_file_of_others(files, text):
    path, beside, _ = files
    path.write_text(text)
    found = find_existing(path, [beside], FACTS)
    assert found.state == "foreign"
    assert str(path) in found.reason


def test_a_safetensors_file_of_others(tmp_path):
    path = tmp_path / "a.safetensors"
    for metadata in (None, {"tinyvit_version": "no JSON"}):
        write_state_dict(path, {"features": torch_of(FEATURES)}, metadata=metadata)
        assert find_existing(path, [], FACTS).state == "foreign"
    path.unlink()
    path.mkdir()
    assert find_existing(path, [], FACTS).state == "foreign"


def test_a_document_cannot_name_files_elsewhere(tmp_path):
    facts = {**FACTS, "files": ["../b.png", "/etc/b.png", 3, "c.png"], "is_complete": True}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"info": facts}))
    assert find_existing(path, [], FACTS).own == (tmp_path / "c.png",)


def test_an_image_is_known_by_size_and_time(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"1234")
    facts = facts_of_image(Item(path, "sub/a.jpg", "sub/a"))
    time = path.stat().st_mtime_ns
    assert facts == {"picture": "sub/a.jpg", "picture_bytes": 4, "picture_mtime_ns": time}


def test_facts_of_an_engine_are_plain_data_that_json_gives_back():
    model = make_tiny_vit(head=False)
    model.image_spec = ImageSpec.sam(32)
    facts = facts_of_engine(Engine(model), "a name", strides=model.strides)
    assert facts == json.loads(json.dumps(facts))
    assert (facts["checkpoint"], facts["strides"]) == ("a name", [2, 2, 1])
    assert ImageSpec.from_dict(facts["image_spec"]) == model.image_spec
    assert (facts["precision"], facts["device"]) == ("fp32", "cpu")
