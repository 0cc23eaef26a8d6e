"""Documentation is right: examples of docstrings run; names, options and links of pages exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import tinyvit

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]
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


def blocks_of(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language; "" for those without."""
    fenced = page.read_text(encoding="utf-8").split("\n```")[1::2]  # every other one is code
    return [block.partition("\n")[2] for block in fenced if block.partition("\n")[0] == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_in_the_python_of_a_page_exist(page: Path) -> None:
    for block in blocks_of(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and "tinyvit" in node.module:
                module = importlib.import_module(node.module)
                missing = [one.name for one in node.names if not hasattr(module, one.name)]
                assert not missing, f"{node.module} has no {missing}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tinyvit":
                assert hasattr(tinyvit, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_of_commands_of_a_page_exist(page: Path) -> None:
    flags = json.loads((ROOT / "tests" / "data" / "snapshots" / "flags.json").read_text())
    blocks = [block for language in ("", "bash", "sh") for block in blocks_of(page, language)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        if not line.startswith("tinyvit "):
            continue
        words = shlex.split(line, comments=True)
        verb = next((" ".join(words[1:n]) for n in (3, 2) if " ".join(words[1:n]) in flags), "")
        assert verb, f"there is no verb for {line!r}"
        known = {flag for option in flags[verb] for flag in option.partition(" = ")[0].split()}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word not in known]
        assert not unknown, f"{verb} has no option {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    prose = "".join(page.read_text(encoding="utf-8").split("\n```")[::2])
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`\n]*`", "", prose)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, target
