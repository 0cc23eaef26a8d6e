from __future__ import annotations

import pytest
import torch
from torch import Tensor

from checkpoints.families import FAMILIES, assert_same, small
from tinyvit.checkpoints.families import LAYOUTS
from tinyvit.checkpoints.unwrap import unwrap, wrap
from tinyvit.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in STATE.items()}


# --- out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapped", "words"),
    [
        (STATE, ""),
        ({"model": STATE}, "{'model': …}"),
        ({"state_dict": {"model": STATE}}, "{'state_dict': …}, {'model': …}"),
        ({"model_state": STATE, "epoch": 3}, "{'model_state': …}"),
        ({"model": STATE, "model_ema": STATE}, "{'model': …}"),
        (prefixed("module."), "without the prefix 'module.'"),
        (
            prefixed("module._orig_mod."),
            "without the prefix 'module.', without the prefix '_orig_mod.'",
        ),
        ({"ema": prefixed("sam.")}, "{'ema': …}, without the prefix 'sam.'"),
    ],
)
def test_wrappers_and_prefixes(wrapped: object, words: str) -> None:
    found = unwrap(wrapped, "a.pth")
    assert_same(found.tensors, STATE)
    assert found.wrapping == words


def test_a_prefix_of_some_keys_stays() -> None:
    state = {**prefixed("module."), "head.weight": STATE["b"]}
    found = unwrap(state, "a.pth")
    assert_same(found.tensors, state)
    assert found.wrapping == ""


def test_what_is_no_tensor_is_listed() -> None:
    content = {
        "model": {**STATE, "note": "x", "long": "y" * 100},
        "epoch": 7,
        "optimizer": {"lr": 1, "m": 2},
        "history": [1, 2],
    }
    assert unwrap(content, "a.pth").extras == (
        "epoch = 7",
        "optimizer (dict of 2)",
        "history (list)",
        "note = 'x'",
        f"long = '{'y' * 39}",
    )


def test_a_dict_beside_tensors_is_no_wrapper() -> None:
    found = unwrap({**STATE, "model": {"other": STATE["b"]}}, "a.pth")
    assert_same(found.tensors, STATE)
    assert (found.wrapping, found.extras) == ("", ("model (dict of 1)",))


def test_parts_in_dicts_of_their_own() -> None:
    content = {
        "PromtEncoder": {"p.weight": STATE["b"]},
        "MaskDecoder": {"m.weight": STATE["a.weight"]},
        "image_encoder": {"neck.0.weight": STATE["b"]},
    }
    assert_same(
        unwrap(content, "a.pt").tensors,
        {
            "prompt_encoder.p.weight": STATE["b"],
            "mask_decoder.m.weight": STATE["a.weight"],
            "image_encoder.neck.0.weight": STATE["b"],
        },
    )


def test_a_second_decoder_beside() -> None:
    content = {"model_state": prefixed("sam."), "decoder_state": {"out.weight": STATE["b"]}}
    found = unwrap(content, "vit_t.pt")
    assert_same(found.tensors, {**STATE, "decoder_state.out.weight": STATE["b"]})
    assert found.extras == ()


def test_parameters_become_plain_tensors() -> None:
    tensor = unwrap({"w": torch.nn.Parameter(torch.ones(2))}, "a.pt").tensors["w"]
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad
    assert tensor.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(2), "holds one tensor without a name instead of a state dict"),
        ([1, 2], "holds list instead of a state dict"),
        ({"epoch": 3}, "holds no tensors; it holds epoch = 3; it is no file of weights"),
        ({}, "holds no tensors; it is no file of weights"),
        (
            {"model": {"model": {"model": {"model": {"model": STATE}}}}},
            "holds no tensors; it holds model (dict of 2); it is no file of weights",
        ),
    ],
)
def test_no_named_tensors(content: object, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        unwrap(content, "a.pt")
    assert str(caught.value).startswith(f"a.pt {words}")


# --- in -------------------------------------------------------------------------------------------


def test_wrapping_by_name() -> None:
    assert wrap(STATE, None) == STATE
    assert wrap(STATE, "model") == {"model": STATE}
    beside = {**STATE, "decoder_state.out.weight": STATE["b"]}
    assert wrap(beside, "model_state") == {
        "model_state": STATE,
        "decoder_state": {"out.weight": STATE["b"]},
    }
    parts = {"prompt_encoder.p": STATE["b"], "mask_decoder.m": STATE["a.weight"]}
    assert wrap(parts, "PromtEncoder") == {
        "PromtEncoder": {"p": STATE["b"]},
        "MaskDecoder": {"m": STATE["a.weight"]},
    }


@pytest.mark.parametrize("family", [f for f in FAMILIES if LAYOUTS[f].container == "torch"])
def test_there_and_back(family: str) -> None:
    state = small(family)
    found = unwrap(wrap(state, LAYOUTS[family].wrapper), "a.pt")
    assert_same(found.tensors, state)
    assert found.extras == ()
