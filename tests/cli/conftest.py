"""The command line in this process, photographs that are noise, and tiny checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tiny import write_image
from tinyvit.checkpoints import write_state_dict
from tinyvit.cli.main import main

ENVIRONMENT = (
    *("TINYVIT_CACHE", "TINYVIT_OFFLINE", "HF_HUB_OFFLINE", "TINYVIT_MIRROR"),
    *("TINYVIT_REQUIRE_SHA256", "XDG_CACHE_HOME"),
)


@dataclass(frozen=True)
class Result:
    """What a command did: its exit code, and its lines on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def offline_with_an_empty_cache(monkeypatch, tmp_path_factory):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("TINYVIT_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(capsys):
    """``run("models", "--json")`` gives a ``Result``."""

    def call(*words: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Result(int(end.value.code or 0), out, err)

    return call


@pytest.fixture(scope="session")
def photo():
    """``photo(path, height, width, seed)`` writes an image of noise and returns its path."""
    return write_image


@pytest.fixture(scope="session")
def checkpoints(make_tiny_vit, tmp_path_factory):
    """Folder of tiny files: an encoder, two classifiers, and a SAM encoder with a head."""
    folder = tmp_path_factory.mktemp("checkpoints")
    classifier = {"neck_dim": None, "strides": (2, 2, 2)}
    models = {
        "encoder": make_tiny_vit(head=False),
        "other": make_tiny_vit(seed=1, head=False),
        "five": make_tiny_vit(**classifier),
        "thousand": make_tiny_vit(**classifier, num_classes=1000),
        "both": make_tiny_vit(),
    }
    for name, model in models.items():
        strides = ",".join(str(stride) for stride in model.strides)
        metadata = {"tinyvit.strides": strides}
        write_state_dict(folder / f"{name}.safetensors", model.state_dict(), metadata=metadata)
    return folder
