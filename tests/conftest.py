"""What all tests share: threads, seeds, hypothesis profiles, tiny models with lively weights."""

import inspect
import os
import signal

import hypothesis
import pytest
import torch

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


def pytest_configure():
    """Hear Ctrl-C also where the shell that started the tests in the background turned it off."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def _randomise(module, seed=0):
    """Values that leave nothing at its neutral start: no zero biases, no batch norm of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif name.endswith(("running_mean", "bias")):
            noise = 0.2 * noise
        elif tensor.ndim == 1:  # weight of a norm
            noise = 1 + 0.2 * noise
        elif not name.endswith("attention_biases"):
            noise = noise * tensor[0].numel() ** -0.5
        tensor.copy_(noise)
    return module


def _make_tiny_vit(seed=0, **changes):
    from tinyvit.modules import TinyViT

    arguments = {
        "img_size": 64,
        "num_classes": 5,
        "embed_dims": (8, 12, 16, 24),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 3),
        "window_sizes": (4, 3, 5, 2),
        "drop_path_rate": 0.0,
        "neck_dim": 16,
    }
    return _randomise(TinyViT(**{**arguments, **changes}), seed).eval()


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
    return _randomise


@pytest.fixture(scope="session")
def make_tiny_vit():
    """``make_tiny_vit(seed=0, **changes)``: a TinyViT of some 20 000 parameters, in eval mode."""
    return _make_tiny_vit


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
