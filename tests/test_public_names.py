from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tinyvit

SOURCE = Path(tinyvit.__file__).parent

NAMES = [
    "CheckpointError",
    "DownloadError",
    "Encoded",
    "Engine",
    "ImageEmbedding",
    "ImageError",
    "ImageSpec",
    "LoadReport",
    "Masks",
    "MissingExtraError",
    "Prompt",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "Segmenter",
    "TinyViT",
    "TinyViTError",
    "__version__",
    "build_sam",
    "convert_checkpoint",
    "create_model",
    "from_pretrained",
    "inspect_checkpoint",
    "list_checkpoints",
    "list_models",
    "load_checkpoint",
    "push_to_hub",
    "sam_model_registry",
    "save_pretrained",
    "tune_allocator",
]


def test_the_list() -> None:
    assert tinyvit.__all__ == NAMES == sorted(NAMES)
    assert dir(tinyvit) == NAMES
    assert {*tinyvit._HOMES, "__version__"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_what_stands_at_its_home(name: str) -> None:
    value = getattr(tinyvit, name)
    assert getattr(tinyvit, name) is value
    if name == "__version__":
        assert isinstance(value, str)
        return
    module, _, attribute = tinyvit._HOMES[name].partition(":")
    home = importlib.import_module(f"tinyvit.{module}")
    assert getattr(home, attribute) is value
    assert attribute in home.__all__
    assert value.__doc__ or name == "sam_model_registry"  # a mapping carries no text of its own


def test_names_are_found_on_first_use() -> None:
    code = (
        "import tinyvit\n"
        "assert not {'ImageSpec', 'Engine', '__version__'} & vars(tinyvit).keys()\n"
        "spec = tinyvit.ImageSpec\n"
        "assert vars(tinyvit)['ImageSpec'] is spec\n"
        "from tinyvit import catalog, list_models\n"
        "assert list_models is catalog.list_models\n"
        "assert 'Engine' not in vars(tinyvit)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_star_gives_all() -> None:
    found: dict[str, object] = {}
    exec("from tinyvit import *", found)
    assert {name: found[name] for name in NAMES} == {n: getattr(tinyvit, n) for n in NAMES}


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError) as caught:
        tinyvit.create_modell  # noqa: B018
    assert str(caught.value) == "module 'tinyvit' has no attribute 'create_modell'"
    assert not hasattr(tinyvit, "_no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'Predictor'"):
        from tinyvit import Predictor  # noqa: F401


def test_no_public_name_is_a_rooms_name() -> None:
    rooms = {
        path.stem
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    assert {"modules", "checkpoints", "catalog", "images", "inference"} <= rooms
    assert not rooms & set(NAMES)
    assert not {room.lower() for room in rooms} & {name.lower() for name in NAMES}


def test_type_checkers_see_the_same_names_at_the_same_homes() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    blocks = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert len(blocks) == 1
    homes = {}
    for node in blocks[0].body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinyvit."):
            room = (node.module or "").removeprefix("tinyvit.")
            for alias in node.names:
                homes[alias.asname or alias.name] = f"{room}:{alias.name}"
        elif isinstance(node, ast.Assign):
            assert [ast.unparse(target) for target in node.targets] == ["__version__"]
    assert homes == tinyvit._HOMES


@pytest.mark.parametrize("room", ["modules", "checkpoints", "inference"])
def test_the_rooms_lists_are_true(room: str) -> None:
    module = importlib.import_module(f"tinyvit.{room}")
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
