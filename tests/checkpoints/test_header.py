from __future__ import annotations

import json

import pytest
import torch

from tinyvit.checkpoints.files import (
    CLASSES,
    IMAGE_SPEC,
    classes_in,
    header_for,
    image_spec_in,
    read_header,
    write_state_dict,
)
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec

NAMES = ("ant", "bée", "cat \U0001f408")


def test_what_is_written_is_read(tmp_path):
    spec = ImageSpec.timm(48)
    header = header_for(spec, NAMES)
    path = write_state_dict(
        tmp_path / "a.safetensors", {"x": torch.zeros(2, dtype=torch.bfloat16)}, metadata=header
    )
    found = read_header(path)
    assert header.items() <= found.items()
    assert image_spec_in(found) == spec
    assert classes_in(found) == NAMES


def test_files_of_others_say_nothing(tmp_path):
    plain = write_state_dict(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    torch_file = write_state_dict(tmp_path / "a.pt", {"x": torch.zeros(2)}, "torch")
    for path in (plain, torch_file, tmp_path / "nothing.safetensors", tmp_path):
        header = read_header(path)
        assert CLASSES not in header and IMAGE_SPEC not in header
        assert image_spec_in(header) is None and classes_in(header) is None
    assert header_for() == {}


@pytest.mark.parametrize(
    "header, words",
    [
        ({CLASSES: "{"}, "a.pt: tinyvit.classes in the header is damaged"),
        ({CLASSES: '["a", 1]'}, "must be a JSON list of names"),
        ({CLASSES: '{"a": 1}'}, "must be a JSON list of names"),
    ],
)
def test_damaged_classes(header, words):
    with pytest.raises(CheckpointError, match=words):
        classes_in(header, "a.pt")


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"size": [1, 1]}), "null"])
def test_a_damaged_preparation(text):
    with pytest.raises(CheckpointError, match=r"tinyvit\.image_spec in the header is damaged"):
        image_spec_in({IMAGE_SPEC: text})
