from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import tinyvit

MODULES = [
    "tinyvit",
    *sorted(
        found.name
        for found in pkgutil.walk_packages(tinyvit.__path__, "tinyvit.")
        if not found.name.endswith("__main__")
    ),
]


def examples_of(name: str) -> list[doctest.DocTest]:
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYVIT_OFFLINE", "1")
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path))
    runner = doctest.DocTestRunner(verbose=False)
    for test in examples_of(name):
        runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind


def test_there_are_examples_where_people_begin() -> None:
    with_examples = {test.name for name in MODULES for test in examples_of(name)}
    assert {
        "tinyvit.factory.create_model",
        "tinyvit.inference.engine.Engine",
        "tinyvit.catalog.list_models",
        "tinyvit.image_spec.Placement.points_to_model",
        "tinyvit.modules.tiny_vit.TinyViT.param_groups",
    } <= with_examples
