"""What all tests share: threads, seeds, hypothesis profiles; models and folders are in tiny.py."""

import importlib
import inspect
import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import tiny

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

hypothesis.settings.register_profile("quick", deadline=None, max_examples=15)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=15, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "quick")


class TorchRandom:
    """torch's generator as hypothesis wants it, so that each example can be replayed."""

    def seed(self, seed):
        torch.manual_seed(seed)

    def getstate(self):
        return torch.get_rng_state()

    def setstate(self, state):
        torch.set_rng_state(state)


torch_random = TorchRandom()
hypothesis.register_random(torch_random)

# No test pulls the plug: what it writes may stay in the page cache. Tests that look for the call
# put their own in this place, and processes that they start have the real one.
os.fsync = lambda handle: None

UNMEASURED = (
    *("embed/test_a_large_folder.py", "export/test_export.py", "golden/test_goldens.py"),
    *("inference/test_backend_goldens.py", "inference/test_engine_as_called.py"),
    *("modules/test_tiny_vit_compilers.py", "sam/test_as_called.py", "sam/test_drop_in.py"),
    *("serve/test_page.py", "test_blocks.py", "test_layers.py"),
)
"""Whole programs, and compilers that trace the modules, without coverage.

It makes Python half as slow again or twice as slow; tests of the parts run the same lines.
"""


def pytest_configure():
    """Hear Ctrl-C also where the shell that started the tests in the background turned it off."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.relative_to(here).as_posix() in UNMEASURED:
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def _describe_arguments(cls):
    """("a, b, ks=1", "extra=None"): what may be passed by position, and what only by name."""
    kinds = {True: [], False: []}
    for name, parameter in inspect.signature(cls).parameters.items():
        default = parameter.default
        if default is not inspect.Parameter.empty:
            shown = default.__name__ if isinstance(default, type) else repr(default)
            name = f"{name}={shown}"
        kinds[parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD].append(name)
    return ", ".join(kinds[True]), ", ".join(kinds[False])


@pytest.fixture(scope="session")
def randomise():
    """``randomise(module, seed=0)`` fills a module with lively values and returns it."""
    return tiny.randomise


@pytest.fixture(scope="session")
def make_tiny_vit():
    """``make_tiny_vit(seed=0, **changes)``: a TinyViT of some 20 000 parameters, in eval mode."""
    return tiny.make_tiny_vit


@pytest.fixture(scope="session")
def make_tiny_sam():
    """``make_tiny_sam(size=64, is_hq=False, seed=0, pad=True)``: its masks cover a part only."""
    return tiny.make_tiny_sam


@pytest.fixture
def load_benchmark(monkeypatch):
    """``load_benchmark("report")`` gives a module of benchmarks/."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="session")
def describe_arguments():
    """``describe_arguments(cls)``: (arguments by position, arguments only by name), as text."""
    return _describe_arguments


@pytest.fixture(scope="session")
def image():
    """``image(batch, height, width, ...)``: normal noise that depends on the shape alone."""

    def make(batch, height, width, channels=3, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1000 * height + width + seed)
        shape = (batch, channels, height, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """``exported(preset="tinyvit", **arguments)``: a folder of ``export_model``, made once each.

    Of the tiny SAM of seed 0 at 64 pixels, or of a classifier of four classes at 32 where ``part``
    is given; without a certificate, whose cases take seconds.
    """
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tinyvit.export import Verified, export_model, writing

    made = {}

    def pets():
        model = tiny.make_tiny_classifier(classes=4, size=32)
        model.classes = ("cat", "dog", "gnu", "emu")
        return model

    def make(preset="tinyvit", **arguments):
        arguments = {name: value for name, value in arguments.items() if value is not None}
        key = (preset, *sorted(arguments.items()))
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp("exported") / preset
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(writing, "certify", lambda *a: Verified("", "onnx", ()))
                model = tiny.make_tiny_sam() if arguments.get("part") is None else pets()
                export_model(model, folder, preset=preset, **arguments)
        return made[key]

    return make
