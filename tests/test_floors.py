"""The house rules of docs/architecture.md, read from the source by ``ast``: nothing is imported.

A room is a folder or a file directly under ``src/tinyvit``. It imports itself, rooms on lower
floors, and what a door leads to; imports inside functions and under TYPE_CHECKING count too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "tinyvit"
TESTS = ROOT / "tests"

FLOORS = (
    {"modules", "errors", "image_spec", "allocator"},
    {"catalog", "checkpoints", "images", "labels", "factory", "hub"},
    {"inference", "sam"},
    {"embed", "train", "evaluate", "export", "bench"},
    {"cli", "serve", "__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

DOORS = {
    ("checkpoints", "catalog"),
    ("factory", "catalog"),
    ("factory", "checkpoints"),
    ("hub", "catalog"),
    ("hub", "checkpoints"),
    ("hub", "factory"),
    ("sam", "inference"),
    ("train", "evaluate"),
    ("cli", "serve"),
    ("__main__", "cli"),
    ("modules", "image_spec"),  # the type of TinyViT.image_spec; no more than a name
}

DATA = {"py.typed", "weights", "data"}  # no code
BANNED = {"torchvision", "cv2", "ultralytics", "timm"}
IF_INSTALLED = {("evaluate/floors.py", "cv2"), ("train/teachers.py", "timm")}
"""Never needed: OpenCV for a baseline to measure against, timm for a teacher of the caller's."""
FILES_AND_WORLD = {"PIL", "safetensors", "huggingface_hub", "os", "io", "pathlib", "sys", "json"}
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60


def sources():
    return sorted(SRC.rglob("*.py"))


def name_of(path):
    return path.relative_to(SRC).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(name):
    """The room of a path like ``sam/masks.py``; None for the package's own ``__init__.py``."""
    first = name.split("/")[0]
    return None if name == "__init__.py" else first.removesuffix(".py")


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
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value


def is_allowed(room, target):
    """Whether a file of ``room`` may import the dotted name ``target``."""
    parts = target.split(".")
    if parts[0] != "tinyvit" or room is None:
        return True
    if len(parts) == 1 or parts[1] not in FLOOR:  # the package itself, or a public name
        return target == "tinyvit.__version__" or FLOOR[room] == len(FLOORS) - 1
    other = parts[1]
    return room == other or FLOOR[other] < FLOOR[room] or (room, other) in DOORS


def wrong_imports(tree, name):
    room = room_of(name)
    return [
        f"{name} (room {room}, floor {FLOOR[room]}) imports {target}"
        for target in imports_of(tree, name)
        if not is_allowed(room, target)
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
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in functions
    ]


def test_every_file_belongs_to_a_room():
    unknown = [
        path.relative_to(SRC).as_posix()
        for path in sorted(SRC.rglob("*"))
        if path.is_file()
        and "__pycache__" not in path.parts
        and room_of(path.relative_to(SRC).as_posix()) not in {None, *FLOOR, *DATA}
    ]
    assert not unknown, f"these files belong to no room: {unknown}; give the room a floor in FLOORS"


def test_weights_hold_no_code():
    assert [name_of(path) for path in sources() if room_of(name_of(path)) in DATA] == []


def test_stairs_only_lead_down():
    wrong = [
        line
        for path in sources()
        if room_of(name_of(path)) in {None, *FLOOR}
        for line in wrong_imports(parse(path), name_of(path))
    ]
    assert not wrong, "imports that go up or sideways without a door:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_one_file(path):
    name, tree = name_of(path), parse(path)
    room = room_of(name)
    banned = {root for root in BANNED if (name, root) not in IF_INSTALLED}
    faults = [f"imports {root}" for root in sorted(roots_of_imports(tree, name) & banned)]
    if not ast.get_docstring(tree):
        faults.append("has no docstring")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > MOST_LINES:
        faults.append(f"has {lines} lines, more than {MOST_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            faults.append(f"line {node.lineno}: assert; raise an error with words instead")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = length_of(node)
            if length > MOST_LINES_OF_A_FUNCTION:
                faults.append(f"{node.name} has {length} lines, more than the 60 of a function")
    if room != "cli":
        faults += [f"line {line}: print" for line in calls_of(tree, "print")]
    if room == "modules":
        world = sorted(roots_of_imports(tree, name) & FILES_AND_WORLD)
        faults += [f"imports {root}: modules know no files" for root in world]
        opened = calls_of(tree, "open", "torch.load", "torch.save")
        faults += [f"line {line}: opens a file" for line in opened]
    if room == "catalog" and "torch" in roots_of_imports(tree, name):
        faults.append("imports torch: the catalog is a table")
    assert not faults, f"src/tinyvit/{name}:\n" + "\n".join(faults)


def test_every_source_file_has_a_test_of_its_name():
    exempt = ("__init__", "__main__")  # lists of names, and the two lines of ``python -m``
    missing = [
        f"src/tinyvit/{name_of(path)} wants tests/{wanted.relative_to(TESTS).as_posix()}"
        for path in sources()
        if path.stem not in exempt
        and not (wanted := TESTS / Path(name_of(path)).parent / f"test_{path.stem}.py").exists()
    ]
    assert not missing, "source files without a test:\n" + "\n".join(missing)


@pytest.mark.parametrize(
    "name, source, wrong",
    [
        ("modules/mlp.py", "from .drop import DropPath", False),
        ("modules/mlp.py", "from ..errors import TinyViTError", True),
        ("modules/mlp.py", "from tinyvit.catalog import VARIANTS", True),
        ("modules/mlp.py", "from .. import catalog", True),
        ("modules/mlp.py", "def f():\n    import tinyvit.sam.masks", True),
        ("modules/mlp.py", "if TYPE_CHECKING:\n    from tinyvit.sam import Sam", True),
        ("modules/mlp.py", "import importlib\nimportlib.import_module('tinyvit.sam')", True),
        ("modules/mlp.py", "import tinyvit", True),
        ("modules/mlp.py", "from tinyvit import Engine", True),
        ("modules/mlp.py", "import torch.nn.functional as F", False),
        ("checkpoints/files.py", "from tinyvit.catalog import VARIANTS", False),
        ("checkpoints/files.py", "from tinyvit.modules import TinyViT", False),
        ("checkpoints/files.py", "from tinyvit.factory import create_model", True),
        ("images/decode.py", "from tinyvit.catalog import VARIANTS", True),
        ("catalog.py", "from .checkpoints import files", True),
        ("factory.py", "from .checkpoints import files", False),
        ("factory.py", "from .hub import from_pretrained", True),
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
