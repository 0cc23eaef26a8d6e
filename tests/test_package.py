from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import tinyvit
from tinyvit.catalog import get_checkpoint
from tinyvit.checkpoints import file_sha256

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tinyvit"
HEAVY = ("torch", "numpy", "PIL", "safetensors", "huggingface_hub", "torchvision", "timm")


def python(code: str) -> str:
    """Run code in a fresh process in which warnings are errors; give what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- light to open --------------------------------------------------------------------------------

SHOW_HEAVY = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import tinyvit; tinyvit.__version__, dir(tinyvit); import tinyvit.errors; "
        "tinyvit.list_models(), tinyvit.list_checkpoints(), tinyvit.ImageSpec.sam(); "
    )
    assert python(code + SHOW_HEAVY) == "[]\n"


@pytest.mark.skipif(
    not (SOURCE / "cli" / "main.py").is_file(), reason="the command line is not in this tree yet"
)
def test_help_loads_nothing_heavy() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['tinyvit', '--help']\n"
        "try:\n"
        "    runpy.run_module('tinyvit', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as done:\n"
        "    assert not done.code, done.code\n"
    )
    *text, heavy = python(code + SHOW_HEAVY).splitlines()
    assert any("Usage" in line for line in text)
    assert heavy == "[]"


# --- importing changes nothing --------------------------------------------------------------------

LOOK = """
import json, locale, logging, os, random, signal, sys, threading, warnings
import numpy, PIL.Image, PIL.ImageFile, huggingface_hub, safetensors.torch, torch
import torch.utils.checkpoint
from PIL import (
    AvifImagePlugin, BmpImagePlugin, GifImagePlugin, Jpeg2KImagePlugin, JpegImagePlugin,
    PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin,
)

def look():
    loggers = [logging.getLogger(), logging.getLogger("tinyvit"), logging.getLogger("PIL")]
    return {
        "pillow": [PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS,
                   PIL.ImageFile.MAXBLOCK, sorted(PIL.Image.OPEN), sorted(PIL.Image.EXTENSION)],
        "torch": [str(torch.get_default_dtype()), str(torch.get_default_device()),
                  torch.get_num_threads(), torch.get_num_interop_threads(),
                  torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                  torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
                  torch.backends.cudnn.allow_tf32],
        "random": [hash(torch.get_rng_state().numpy().tobytes()), hash(random.getstate()),
                   hash(numpy.random.get_state()[1].tobytes())],
        "numpy": [sorted(map(repr, numpy.get_printoptions().items())), repr(numpy.geterr())],
        "warnings": [repr(entry) for entry in warnings.filters],
        "logging": [[log.level, repr(log.handlers), log.propagate] for log in loggers],
        "process": [dict(os.environ), os.getcwd(), locale.getlocale(), os.umask(0o22),
                    threading.active_count(), sys.getrecursionlimit(), repr(sys.excepthook),
                    repr(signal.getsignal(signal.SIGINT)), repr(sys.path), sys.getswitchinterval()],
    }

def walk():
    import importlib, pkgutil, tinyvit
    for found in pkgutil.walk_packages(tinyvit.__path__, "tinyvit."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    return [getattr(tinyvit, name) for name in tinyvit.__all__]

before = json.dumps(look())
walk()
after = json.dumps(look())
was, now = json.loads(before), json.loads(after)
print(json.dumps({key: [was[key], now[key]] for key in was if was[key] != now[key]}))
print("timm" in sys.modules or "torchvision" in sys.modules)
"""


def test_importing_every_room_changes_nothing() -> None:
    changed, foreign = python(LOOK).splitlines()
    assert json.loads(changed) == {}
    assert foreign == "False"


def imported_by(path: Path) -> set[str]:
    """The packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE))
)
def test_no_file_asks_for_another_network_library(path: Path) -> None:
    assert not imported_by(path) & {"timm", "torchvision", "ultralytics", "transformers", "cv2"}


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree, built where nothing of the tree is written to."""
    wheels = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    builder = wheels.WheelBuilder(str(ROOT))
    return Path(next(builder.build(directory=str(folder), versions=["standard"])))


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        starter = archive.read("tinyvit/weights/sam_2m.safetensors")
    info = f"tinyvit-{tinyvit.__version__}.dist-info"
    assert wheel.name == f"tinyvit-{tinyvit.__version__}-py3-none-any.whl"
    assert {name.partition("/")[0] for name in names} == {"tinyvit", info}
    assert {
        "tinyvit/__init__.py",
        "tinyvit/py.typed",
        "tinyvit/weights/sam_2m.safetensors",
        "tinyvit/weights/MODEL_CARD.md",
        f"{info}/licenses/LICENSE",
        f"{info}/licenses/NOTICE",
        f"{info}/entry_points.txt",
    } <= names
    parts = {part for name in names for part in name.split("/")}
    assert not [part for part in parts if part.startswith(("test", "conftest"))]
    assert not [name for name in names if name.endswith((".pyc", ".orig", ".tmp"))]
    sources = {f"tinyvit/{path.relative_to(SOURCE)}" for path in SOURCE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert starter == (SOURCE / "weights" / "sam_2m.safetensors").read_bytes()


def test_what_the_wheel_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"tinyvit-{tinyvit.__version__}.dist-info"
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        points = archive.read(f"{info}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("tinyvit", tinyvit.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    base = {"lazy-loader", "numpy", "pillow", "rich", "safetensors", "tomli", "typer"}
    assert {re.split("[<>=; ]", line)[0].replace("_", "-") for line in needed} == base
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "all", "dev", "docs", "export", "heif", "native", "onnx", "openvino", "ray", "serve",
        "store", "torch", "train",
    }  # fmt: skip
    assert "tinyvit = tinyvit.cli.main:main" in points


def test_the_embedded_weights_are_those_of_the_catalog() -> None:
    row = get_checkpoint("tinyvit_sam_2m")
    assert file_sha256(SOURCE / "weights" / row.file) == row.sha256


@pytest.mark.slow
def test_the_wheel_works_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
            "--disable-pip-version-check", "--target", str(target), str(wheel),
        ],
        check=True,
        timeout=300,
    )  # fmt: skip
    code = (
        "import sys\n"
        f"others = [path for path in sys.path if path != {str(SOURCE.parent)!r}]\n"
        f"sys.path = [{str(target)!r}, *others]\n"
        "import numpy, tinyvit\n"
        f"assert tinyvit.__file__.startswith({str(target)!r}), tinyvit.__file__\n"
        "engine = tinyvit.Engine(tinyvit.create_model('tinyvit_sam_2m'), device='cpu')\n"
        "image = numpy.arange(60 * 80 * 3, dtype=numpy.uint8).reshape(60, 80, 3)\n"
        "out = engine.embed(image)\n"
        "assert bool(out.isfinite().all()) and float(out.std()) > 0\n"
        "print(tinyvit.__version__, list(out.shape))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == f"{tinyvit.__version__} [1, 256, 16, 16]\n"


@pytest.mark.parametrize(
    "file",
    [
        *("native/pyproject.toml", "native/CMakeLists.txt", "native/include/tinyvit.h"),
        *("CITATION.cff", "CHANGELOG.md"),
    ],
)
def test_every_file_names_the_version_of_pyproject(file: str) -> None:
    said = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert said and re.search(
        rf"(?<![\d.]){re.escape(said[1])}(?![\d.])", (ROOT / file).read_text(encoding="utf-8")
    )
