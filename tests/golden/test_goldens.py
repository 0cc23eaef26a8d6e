"""The stored vectors, the behaviour checks, and further cases against ``plain.py``."""

import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyvit.modules
from tinyvit.modules import TinyViT

HERE = Path(__file__).parent


def _load(name):
    """One of the files beside this one, whatever the import mode of pytest."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


recipe, verify, behaviours, plain = map(_load, ("recipe", "verify", "behaviours", "plain"))
adapter = _load("adapter")

MANIFEST = json.loads((HERE / "manifest.json").read_text())
READS_FILES = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # verify.py does
NOT_YET = {name for name in MANIFEST if MANIFEST[name]["kind"] == "efficientsam3"}
STORED = [name for name in MANIFEST if name not in NOT_YET]
SMALL = [
    name
    for name in STORED
    if MANIFEST[name]["kind"] in ("module", "neck", "train_grad", "eval_grad", "bias_resize")
    or name in ("mobilesam_16", "mobilesam_64", "small_96_neck", "small_96_logits")
]


def check_one(name, folder, dtype, slack):
    """``verify.check`` on exactly one case, and on all of it."""
    case = MANIFEST[name]
    (folder / "manifest.json").write_text(json.dumps({name: case}))
    shutil.copy(HERE / f"{name}.npz", folder)
    [(_, result, share, message)] = verify.check(
        adapter.Adapter(), str(folder), dtype=dtype, slack=slack, optional=True
    )
    assert result == "ok", f"{result}: {share:.3g} of the tolerance, {message}"


def test_every_case_is_stored():
    assert {path.stem for path in HERE.glob("*.npz")} == set(MANIFEST)


def test_a_classifier_by_default_arguments_has_cream_s_strides():
    assert adapter.Adapter().classifier({}).strides == (2, 2, 2)


@READS_FILES
@pytest.mark.parametrize("name", STORED)
def test_float32(name, tmp_path):
    check_one(name, tmp_path, "float32", 1.0)


@READS_FILES
@pytest.mark.parametrize("name", SMALL)
def test_float64(name, tmp_path):
    # the stored values are float32 of a float64 result: 6e-8 relative, a 50th of the tolerance
    check_one(name, tmp_path, "float64", 0.05)


@pytest.mark.parametrize("check", behaviours.CH, ids=lambda check: check.__name__)
def test_behaviour(check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as behaviours.run does: export and trace deprecations
        assert check(tinyvit.modules)


def filled(model, seed):
    """Weights by the goldens' recipe."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    arrays = {key: np.asarray(recipe.fill(key, shape, seed)) for key, shape in shapes.items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()})
    return model.double().eval()


def compare(seed, size, batch, pointwise=False, **arguments):
    model = TinyViT(neck_dim=8, stem="pointwise" if pointwise else "conv", **arguments)
    filled(model, seed)
    shape = (batch, model.in_chans, *size)
    x = torch.from_numpy(recipe.z("input:plain", shape, seed)).double()
    numbers = {
        "num_heads": model.num_heads,
        "window_sizes": model.window_sizes,
        "strides": model.strides,
        "pointwise": pointwise,
    }
    state = model.state_dict()
    # both are float64: only the order of additions differs
    close = {"rtol": 1e-9, "atol": 1e-9}
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain.tiny_vit(state, x, **numbers), **close)
        logits = plain.tiny_vit(state, x, **numbers, output="logits")
        torch.testing.assert_close(model.classify(x), logits, **close)
        maps = plain.tiny_vit(state, x, **numbers, output="maps")
        torch.testing.assert_close(model.forward_intermediates(x)[1], maps, **close)


CONFIGURATION = {"embed_dims": (8, 12, 16, 20), "depths": (1, 1, 2, 1), "num_heads": (1, 3, 2, 5)}


@pytest.mark.parametrize("strides", [(2, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize("seed, size", [(1, (64, 64)), (2, (50, 77)), (1, (1, 1)), (2, (33, 160))])
def test_other_seeds_and_sizes_against_the_plain_form(seed, size, strides):
    compare(seed, size, 2, strides=strides, window_sizes=(7, 7, 14, 7), **CONFIGURATION)


def test_pointwise_stem_against_the_plain_form():
    compare(3, (21, 30), 1, pointwise=True, window_sizes=(4, 4, 6, 4), **CONFIGURATION)


@st.composite
def configurations(draw):
    stages = draw(st.integers(1, 4))
    heads = [draw(st.integers(1, 3)) for _ in range(stages)]
    return {
        "in_chans": draw(st.integers(1, 4)),
        "num_classes": draw(st.integers(1, 4)),
        "num_heads": heads,
        "embed_dims": [2 * head * draw(st.integers(1, 4)) for head in heads],
        "depths": [draw(st.integers(1, 2)) for _ in range(stages)],
        "window_sizes": [draw(st.integers(1, 7)) for _ in range(stages)],
        "strides": [draw(st.sampled_from([1, 2])) for _ in range(stages - 1)],
        "mlp_ratio": draw(st.sampled_from([1.0, 2.5, 4.0])),
        "mbconv_expand_ratio": draw(st.sampled_from([1.0, 1.5, 4.0])),
        "local_conv_size": draw(st.sampled_from([1, 3, 5])),
    }


@settings(max_examples=25)
@given(
    arguments=configurations(),
    pointwise=st.booleans(),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(0, 2),
    seed=st.integers(4, 9),
)
def test_random_configurations_against_the_plain_form(arguments, pointwise, size, batch, seed):
    if pointwise:
        size = (-(-size[0] // 3), -(-size[1] // 3))  # its maps keep the image's size
    compare(seed, size, batch, pointwise, **arguments)
