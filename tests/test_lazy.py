"""What is said where a package is missing."""

import sys
from pathlib import Path

import pytest

from tinyvit.errors import MissingExtraError
from tinyvit.lazy import EXTRAS, attach, missing, need
from without import run_without

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
RUN = "import sys\nfrom tinyvit.cli.main import main\nmain(sys.argv[1:])"


def test_a_failed_import_becomes_the_line_to_type():
    found = missing(ModuleNotFoundError(name="torch.nn"), "Engine.embed")
    assert isinstance(found, MissingExtraError)
    assert str(found) == (
        "Engine.embed needs torch, which is not installed; pip install 'tinyvit[torch]'"
    )
    foreign = ModuleNotFoundError(name="something")
    assert missing(foreign, "x") is foreign
    need("numpy", "anything")  # is there


def test_the_extras_named_bring_the_packages():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = table["optional-dependencies"]
    for package, extra in EXTRAS.items():
        names = [line.replace("-", "_") for line in extras[extra]]
        assert any(line.startswith(package) for line in names), (package, extra)
    everything = extras["all"][0].partition("[")[2].rstrip("]").split(",")
    assert set(everything) == {*extras} - {"all", "dev", "docs", "native", "ray", "train"}


def test_names_are_found_on_first_use():
    find, names, listed = attach("tinyvit", str(ROOT / "src" / "tinyvit" / "__init__.py"))
    assert find("ImageSpec").__name__ == "ImageSpec"
    assert "Segmenter" in names() and "Segmenter" in listed
    with pytest.raises(AttributeError, match="nothing"):
        find("nothing")


@pytest.mark.parametrize(
    "command, extra",
    [
        ("segment PICTURE --point 9,9 -o OUT", "torch"),
        ("inspect tinyvit_sam_2m", "torch"),
        ("train classify PICTURES -o OUT", "torch"),
        ("export tinyvit_sam_2m -o OUT", "torch"),
        ("serve", "serve"),
    ],
)
def test_a_command_says_it_in_one_line(command, extra, tmp_path):
    pictures = ROOT / "examples" / "pictures"
    words = command.replace("PICTURES", str(pictures)).replace("OUT", str(tmp_path / "out"))
    words = words.replace("PICTURE", str(pictures / "chelsea.png")).split()
    away = ("torch", "tinyvit_native", "scipy", "huggingface_hub", "onnx", "fastapi", "uvicorn")
    said = run_without(away, RUN, *words, fails=True).strip().splitlines()
    assert said[-1].startswith("error: ") and f"'tinyvit[{extra}]'" in said[-1], said
    assert not any(line.startswith("Traceback") for line in said)


def test_the_command_line_needs_no_extra():
    away = (*EXTRAS, "tinyvit_native", "lance", "pillow_heif")
    assert "tinyvit_sam_2m" in run_without(away, RUN, "models")
