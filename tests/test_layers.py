"""The rules of docs/architecture.md, read from the source by ``ast``: nothing is imported.

A package is a folder or a file directly under ``src/tinyvit``. It imports itself, packages of lower
layers, and what a door leads to; imports inside functions and under TYPE_CHECKING count too.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "tinyvit"
TESTS = ROOT / "tests"

LAYERS = (
    {"modules", "errors", "image_spec", "allocator", "lazy", "__about__"},
    {"catalog", "checkpoints", "images", "labels", "factory"},
    {"inference", "sam"},
    {"hub", "compat"},
    {"folders"},
    {"embed", "train", "evaluate", "export", "bench"},
    {"cli", "serve", "__main__"},
)
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}

DOORS = {
    ("checkpoints", "catalog"),
    ("lazy", "errors"),
    ("modules", "lazy"),
    ("factory", "catalog"),
    ("factory", "checkpoints"),
    ("compat", "hub"),
    ("sam", "inference"),
    ("train", "evaluate"),
    ("cli", "serve"),
    ("__main__", "cli"),
    ("modules", "image_spec"),  # the type of TinyViT.image_spec; no more than a name
}

DATA = {"py.typed", "weights", "data"}  # no code
BANNED = {"torchvision", "cv2", "ultralytics", "timm"}
IF_INSTALLED = {("evaluate/metrics.py", "cv2"), ("train/tasks/teachers.py", "timm")}
"""Never needed: OpenCV for a baseline to compare with, timm for a teacher of the caller's."""
FILES_AND_WORLD = {"PIL", "safetensors", "huggingface_hub", "os", "io", "pathlib", "sys", "json"}
MOST_LINES = 600
FEW_LINES = 60
SHORT = {"errors.py"}  # the exceptions, which everything else imports
MOST_LINES_OF_A_FUNCTION = 60
STILL_TOO_LONG = {
    "cli/train.py",
    "train/loop.py",
}

WITHOUT_TORCH = (
    "errors",
    "factory",
    "image_spec",
    "catalog",
    "labels",
    "checkpoints.detection",
    "checkpoints.families",
    "checkpoints.files",
    "checkpoints.open",
    "checkpoints.unwrap",
    "embed.actors",
    "embed.attempts",
    "embed.commits",
    "embed.plan",
    "embed.recipe",
    "embed.rows",
    "embed.run",
    "embed.sources",
    "embed.store",
    "embed.work",
    "folders.encode",
    "folders.images",
    "folders.prompt_files",
    "folders.runner",
    "folders.segment",
    "images.decode",
    "images.draw",
    "images.mask_ops",
    "images.preprocess",
    "inference.backend",
    "inference.bundle",
    "inference.derived",
    "inference.engine",
    "inference.fold",
    "inference.graphs",
    "inference.native_backend",
    "inference.read_ahead",
    "sam.automatic",
    "sam.embedding",
    "sam.masks",
    "sam.graph_decoder",
    "sam.predictor",
    "sam.prompts",
    "sam.segmenter",
    "sam.upscale",
    "export.certificate",
    "export.presets",
    "export.verify",
    "cli.main",
)
"""What must be importable where torch cannot be imported."""


def sources():
    return sorted(SRC.rglob("*.py"))


def name_of(path):
    return path.relative_to(SRC).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def package_of(name):
    """The package of a path like ``sam/masks.py``; None for the package's own ``__init__.py``."""
    first = name.split("/")[0]
    return None if name.startswith("__init__.py") else first.removesuffix(".py")


def imports_of(tree, name):
    """Absolute dotted names of everything imported in the file ``name`` of the package."""
    package = ["tinyvit", *name.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and last_name(node.func) == "import_module":
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value


def last_name(function):
    """``c`` of ``c`` and of ``a.b.c``; None of what is called otherwise."""
    return getattr(function, "attr", getattr(function, "id", None))


def is_allowed(package, target):
    """Whether a file of ``package`` may import the dotted name ``target``."""
    parts = target.split(".")
    if parts[0] != "tinyvit" or package is None:
        return True
    if len(parts) == 1 or parts[1] not in LAYER:  # the package itself, or a public name
        return target == "tinyvit.__version__" or LAYER[package] == len(LAYERS) - 1
    other = parts[1]
    return package == other or LAYER[other] < LAYER[package] or (package, other) in DOORS


def wrong_imports(tree, name):
    package = package_of(name)
    return [
        f"{name} (package {package}, layer {LAYER[package]}) imports {target}"
        for target in imports_of(tree, name)
        if not is_allowed(package, target)
    ]


def roots_of_imports(tree, name):
    return {target.split(".")[0] for target in imports_of(tree, name)}


def length_of(function):
    """Its lines, without those of its docstring."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def calls_of(tree, *functions):
    """Line numbers of calls like ``print(...)`` or ``torch.load(...)``."""
    names = {function.rpartition(".")[2] for function in functions}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and last_name(node.func) in names
        and ast.unparse(node.func) in functions
    ]


def described_files():
    """Path -> sentence of every file in the tree of docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = page.split("## The tree")[1].split("```")[1].strip().splitlines()
    folders, found = [], {}
    for line in lines[1:]:
        name, _, sentence = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            found["".join(folders) + name] = sentence.strip()
    return found


def test_the_tree_in_the_docs_lists_every_file():
    described = described_files()
    here = {name_of(path) for path in sources() if path.name != "__init__.py"}
    missing, gone = sorted(here - described.keys()), sorted(described.keys() - here)
    assert not missing, f"docs/architecture.md lacks a sentence for {missing}"
    assert not gone, f"docs/architecture.md lists {gone}, which are not there"
    assert [name for name, sentence in described.items() if not sentence] == []


def test_every_file_belongs_to_a_package():
    unknown = [
        path.relative_to(SRC).as_posix()
        for path in sorted(SRC.rglob("*"))
        if path.is_file()
        and "__pycache__" not in path.parts
        and package_of(path.relative_to(SRC).as_posix()) not in {None, *LAYER, *DATA}
    ]
    assert not unknown, (
        f"these files belong to no package: {unknown}; give the package a layer in LAYERS"
    )


def test_weights_hold_no_code():
    assert [name_of(path) for path in sources() if package_of(name_of(path)) in DATA] == []


def test_imports_only_go_down():
    wrong = [
        line
        for path in sources()
        if package_of(name_of(path)) in {None, *LAYER}
        for line in wrong_imports(parse(path), name_of(path))
    ]
    assert not wrong, "imports that go up or sideways without a door:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_one_file(path):
    name, tree = name_of(path), parse(path)
    package = package_of(name)
    banned = {root for root in BANNED if (name, root) not in IF_INSTALLED}
    faults = [f"imports {root}" for root in sorted(roots_of_imports(tree, name) & banned)]
    if not ast.get_docstring(tree):
        faults.append("has no docstring")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    is_short = lines < FEW_LINES and not name.endswith("__.py") and package != "compat"
    if is_short and name not in SHORT:
        faults.append(f"has {lines} lines, fewer than {FEW_LINES}: merge it, or say why in SHORT")
    if lines > MOST_LINES and name not in STILL_TOO_LONG:
        faults.append(f"has {lines} lines, more than {MOST_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            faults.append(f"line {node.lineno}: assert; raise an error with words instead")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = length_of(node)
            if length > MOST_LINES_OF_A_FUNCTION:
                faults.append(f"{node.name} has {length} lines, more than the 60 of a function")
    if package != "cli":
        faults += [f"line {line}: print" for line in calls_of(tree, "print")]
    if package == "modules":
        world = sorted(roots_of_imports(tree, name) & FILES_AND_WORLD)
        faults += [f"imports {root}: modules know no files" for root in world]
        opened = calls_of(tree, "open", "torch.load", "torch.save")
        faults += [f"line {line}: opens a file" for line in opened]
    if package == "catalog" and "torch" in roots_of_imports(tree, name):
        faults.append("imports torch: the catalog is a table")
    assert not faults, f"src/tinyvit/{name}:\n" + "\n".join(faults)


def public_names():
    """(package, name) of everything that a package's stub or ``__init__.py`` exports."""
    for path in sorted(SRC.rglob("__init__.py*")):
        package = path.parent.relative_to(SRC).as_posix().replace("/", ".")
        tree = parse(path)
        for node in tree.body:
            if path.suffix == ".pyi" and isinstance(node, ast.ImportFrom):
                yield from ((package, alias.asname or alias.name) for alias in node.names)
            elif isinstance(node, ast.Assign) and "__all__ = [" in ast.unparse(node):
                yield from ((package, name) for name in ast.literal_eval(node.value))


def test_every_public_name_is_used_by_a_test():
    words = {
        node.id if isinstance(node, ast.Name) else node.attr
        for path in TESTS.rglob("*.py")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Name | ast.Attribute)
    }
    missing = [f"tinyvit.{p}: {name}" for p, name in public_names() if name not in words]
    assert not missing, "public names that no test uses:\n" + "\n".join(missing)


def test_the_core_needs_no_torch():
    code = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None  # importing it fails\n"
        f"for name in {WITHOUT_TORCH}:\n"
        "    importlib.import_module(f'tinyvit.{name}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name, source, wrong",
    [
        ("modules/layers.py", "from .functional import attend", False),
        ("modules/layers.py", "from ..errors import TinyViTError", True),
        ("modules/layers.py", "from tinyvit.catalog import VARIANTS", True),
        ("modules/layers.py", "from .. import catalog", True),
        ("modules/layers.py", "def f():\n    import tinyvit.sam.masks", True),
        ("modules/layers.py", "if TYPE_CHECKING:\n    from tinyvit.sam import Sam", True),
        ("modules/layers.py", "import importlib\nimportlib.import_module('tinyvit.sam')", True),
        ("modules/layers.py", "import tinyvit", True),
        ("modules/layers.py", "from tinyvit import Engine", True),
        ("modules/layers.py", "import torch.nn.functional as F", False),
        ("checkpoints/files.py", "from tinyvit.catalog import VARIANTS", False),
        ("checkpoints/files.py", "from tinyvit.modules import TinyViT", False),
        ("checkpoints/files.py", "from tinyvit.factory import create_model", True),
        ("images/decode.py", "from tinyvit.catalog import VARIANTS", True),
        ("catalog.py", "from .checkpoints import files", True),
        ("factory.py", "from .checkpoints import files", False),
        ("factory.py", "from .hub import from_pretrained", True),
        ("folders/runner.py", "from tinyvit.cli.console import Console", True),
        ("train/loop.py", "from tinyvit.folders.images import list_images", False),
        ("hub.py", "from .factory import create_model", False),
        ("inference/engine.py", "from tinyvit.sam import Sam", True),
        ("sam/predictor.py", "from ..inference.engine import Engine", False),
        ("sam/predictor.py", "from . import masks", False),
        ("embed/job.py", "from tinyvit.train import loop", True),
        ("export/card.py", "from tinyvit import __version__", False),
        ("cli/main.py", "from tinyvit.serve.app import App", False),
        ("cli/main.py", "import tinyvit", False),
        ("serve/app.py", "from tinyvit.cli import main", True),
        ("__main__.py", "from tinyvit.cli.main import main", False),
        ("__init__.py", "from .sam.predictor import SamPredictor", False),
    ],
)
def test_the_rule_itself(name, source, wrong):
    assert bool(wrong_imports(ast.parse(source), name)) == wrong
