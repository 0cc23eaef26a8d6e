from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tinyvit.checkpoints import write_state_dict
from tinyvit.folders.encode import (
    draw_features,
    drawing_of,
    facts_of_image,
    look,
    remove_drawing,
    write,
)
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.draw import GAP

FACTS = {
    "picture": "a b.jpg",
    "picture_bytes": 10,
    "picture_mtime_ns": 1_700_000_000_123_456_789,
    "weights_sha256": "ab",
    "strides": [2, 2, 1],
    "image_spec": {"size": [32, 32]},
    "precision": "fp32",
    "tinyvit_version": "0.1.0",
}
DRAWING = np.zeros((4, 5, 3), np.uint8)
FEATURES = torch.arange(24.0).reshape(2, 3, 4)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "sub" / "a.b.safetensors"


def test_what_is_written_is_read_back(target):
    write(target, FEATURES, FACTS, DRAWING)
    with safe_open(target, framework="pt") as file:
        assert file.keys() == ["features"]
        assert torch.equal(file.get_tensor("features"), FEATURES)
        header = file.metadata()
    assert header.pop("format") == "pt"
    assert {key: json.loads(text) for key, text in header.items()} == {
        **FACTS,
        "drawing": "a.b.png",
    }
    assert np.array_equal(decode(drawing_of(target)), DRAWING)
    assert sorted(path.name for path in target.parent.iterdir()) == ["a.b.png", "a.b.safetensors"]


def test_nothing_is_there_at_first(target):
    assert look(target, FACTS, True).state == "nothing"


@pytest.mark.parametrize("with_drawing", [True, False])
def test_the_same_again_is_current(target, with_drawing):
    write(target, FEATURES, FACTS, DRAWING if with_drawing else None)
    found = look(target, {**FACTS, "tinyvit_version": "9", "checkpoint": "x"}, with_drawing)
    assert found.state == "current"
    assert found.drawing == ("a.b.png" if with_drawing else None)


def test_a_drawing_that_is_not_asked_for_does_no_harm(target):
    write(target, FEATURES, FACTS, DRAWING)
    assert look(target, FACTS, False).state == "current"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights_sha256": "cd"}, "made by another model"),
        ({"strides": [2, 2, 2]}, "made with other strides"),
        ({"image_spec": {"size": [64, 64]}}, "made with another preparation of images"),
        ({"precision": "bf16"}, "made in another precision"),
        ({"picture": "a b.png"}, "made of another image"),
        ({"picture_bytes": 11}, "made of an image that has changed since"),
        ({"picture_mtime_ns": 1}, "made of an image that has changed since"),
    ],
)
def test_whatever_changes_the_features_makes_them_outdated(target, change, reason):
    write(target, FEATURES, FACTS, DRAWING)
    found = look(target, {**FACTS, **change}, True)
    assert (found.state, found.reason, found.drawing) == ("outdated", reason, "a.b.png")


def test_a_missing_drawing_makes_them_outdated(target):
    write(target, FEATURES, FACTS)
    assert look(target, FACTS, True).reason == "without an image of the features"
    write(target, FEATURES, FACTS, DRAWING)
    drawing_of(target).unlink()
    assert look(target, FACTS, True).reason == "without an image of the features"


def test_files_of_others_are_foreign(target):
    target.parent.mkdir()
    target.write_text("mine")
    assert look(target, FACTS, True).state == "foreign"
    write_state_dict(target, {"features": FEATURES}, metadata={"tinyvit_version": "no JSON"})
    assert look(target, FACTS, True).state == "foreign"
    write_state_dict(target, {"features": FEATURES})
    assert look(target, FACTS, False).state == "foreign"
    target.unlink()
    target.mkdir()
    assert look(target, FACTS, False).state == "foreign"


def test_a_png_of_the_user_s_own_is_foreign(target):
    target.parent.mkdir()
    drawing_of(target).write_text("mine")
    found = look(target, FACTS, True)
    assert found.state == "foreign"
    assert found.reason.startswith(f"{drawing_of(target)} is there already")
    assert look(target, FACTS, False).state == "nothing"
    write(target, FEATURES, FACTS)  # as with --no-pictures: the PNG beside it is still not ours
    assert look(target, FACTS, True).state == "foreign"


def test_only_a_drawing_of_ours_is_removed(target):
    write(target, FEATURES, FACTS, DRAWING)
    remove_drawing(target, look(target, FACTS, False))
    assert not drawing_of(target).exists()
    drawing_of(target).write_text("mine")
    write(target, FEATURES, FACTS)
    remove_drawing(target, look(target, FACTS, False))
    assert drawing_of(target).exists()


def test_an_image_is_known_by_size_and_time(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"1234")
    facts = facts_of_image(path, "sub/a.jpg")
    assert facts["picture"] == "sub/a.jpg"
    assert facts["picture_bytes"] == 4
    assert facts["picture_mtime_ns"] == path.stat().st_mtime_ns


@pytest.mark.parametrize("size", [(30, 20), (20, 90), (1, 1)])
@pytest.mark.parametrize("is_new", [True, False])
def test_the_drawing_has_rows_of_three_panels(size, is_new):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(4, side, side, generator=generator) for side in (8, 4, 2, 2)]
    features = torch.randn(5, 2, 2, generator=generator) if is_new else maps[-1].clone()
    image = np.full((*size, 3), 200, np.uint8)
    drawing = draw_features(image, maps, features, ImageSpec.sam(32).place(*size))
    assert drawing.dtype == np.uint8
    pitch = (drawing.shape[1] - GAP) // 3
    half = drawing.shape[0] // 2
    last = drawing[half:, 2 * pitch :]
    assert (drawing[:half, GAP:pitch] != 255).any()  # the photograph
    assert bool((last != 255).any()) == is_new  # the sixth panel: features, or plain paper
    assert (drawing[:GAP] == 255).all()
