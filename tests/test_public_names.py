from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tinyvit
from tinyvit import bench, checkpoints, evaluate, inference

SOURCE = Path(tinyvit.__file__).parent

NAMES = [
    "CheckpointError",
    "DownloadError",
    "EmbeddingStore",
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
    "embed_images",
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


HOMES = {
    alias.name: node.module
    for node in ast.parse((SOURCE / "__init__.pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


def test_the_list() -> None:
    assert tinyvit.__all__ == NAMES == sorted(NAMES)
    assert dir(tinyvit) == NAMES
    assert {*HOMES, "__version__"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_what_stands_at_its_home(name: str) -> None:
    value = getattr(tinyvit, name)
    assert getattr(tinyvit, name) is value
    if name == "__version__":
        assert isinstance(value, str)
        return
    assert getattr(importlib.import_module(f"tinyvit.{HOMES[name]}"), name) is value
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
    assert str(caught.value) == "No tinyvit attribute create_modell"
    assert not hasattr(tinyvit, "_no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'Predictor'"):
        from tinyvit import Predictor  # noqa: F401


def test_no_public_name_is_a_packages_name() -> None:
    packages = {
        path.stem
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    assert {"modules", "checkpoints", "catalog", "images", "inference"} <= packages
    assert not packages & set(NAMES)
    assert not {package.lower() for package in packages} & {name.lower() for name in NAMES}


@pytest.mark.parametrize(
    "package", ["modules", "checkpoints", "inference", "sam", "train", "evaluate"]
)
def test_the_package_lists_are_true(package: str) -> None:
    module = importlib.import_module(f"tinyvit.{package}")
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_results_are_of_public_types() -> None:
    path = SOURCE / "weights" / "sam_2m.safetensors"
    found = tinyvit.inspect_checkpoint(path)
    assert isinstance(found, checkpoints.Inspection)
    assert isinstance(found.detection, checkpoints.Detection)
    assert isinstance(checkpoints.read_state_dict(path), checkpoints.StateFile)
    assert tinyvit.convert_checkpoint is checkpoints.convert
    assert checkpoints.ConversionReport.__doc__
    assert evaluate.ClassifyReport.__doc__
    assert inference.Picture is not None
    assert bench.serve.__doc__
