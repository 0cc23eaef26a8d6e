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


MODEL = {
    "image_encoder.patch_embed.seq.0.c.weight": STATE["a.weight"],
    "image_encoder.layers.1.blocks.0.attn.attention_biases": STATE["b"],
    "image_encoder.neck.0.weight": STATE["a.weight"] + 1,
    "mask_decoder.iou_token.weight": STATE["b"] + 1,
}
OTHER = {key: tensor + 5 for key, tensor in MODEL.items()}


def before(prefix: str, model: dict[str, Tensor] = MODEL) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in model.items()}


def inside(new: str, old: str = "image_encoder.") -> dict[str, Tensor]:
    return {key.replace(old, new, 1): tensor for key, tensor in MODEL.items()}


# Forms of which a public report says that they do not load, or that a trainer is known to write.
FORMS = [
    (MODEL, "", ()),
    ({"net": MODEL}, "{'net': …}", ()),
    ({"state_dict": {"model": MODEL}}, "{'state_dict': …}, {'model': …}", ()),
    ({"model": MODEL, "best_loss": STATE["b"]}, "{'model': …}", ("best_loss (tensor)",)),
    ({"model": MODEL, "model_ema": OTHER}, "{'model': …}", ("model_ema (dict of 4)",)),
    ({"ema": OTHER, "model": MODEL}, "{'model': …}", ("ema (dict of 4)",)),
    ({"teacher": OTHER, "student": MODEL}, "{'student': …}", ("teacher (dict of 4)",)),
    (
        {"n_averaged": STATE["b"], **before("module.")},
        "without the prefix 'module.'",
        ("n_averaged (tensor)",),
    ),
    (
        {**before("ema.module.", OTHER), **before("model."), "criterion.weight": STATE["b"]},
        "without the prefix 'model.'",
        *[(*(f"ema.module.{key} (tensor)" for key in MODEL), "criterion.weight (tensor)")],
    ),
    (before("module._orig_mod."), "without the prefix 'module._orig_mod.'", ()),
    (before("model.backbone."), "without the prefix 'model.backbone.'", ()),
    ({"ema": before("sam.")}, "{'ema': …}, without the prefix 'sam.'", ()),
    (inside("image_encoder._orig_mod."), "without '_orig_mod.' inside", ()),
    (
        inside("layers._checkpoint_wrapped_module.", "layers."),
        "without '_checkpoint_wrapped_module.' inside",
        (),
    ),
    (inside("vit."), "'vit.' read as 'image_encoder.'", ()),
    (
        inside("image_encoder.backbone."),
        "'image_encoder.backbone.' read as 'image_encoder.'",
        (),
    ),
]


@pytest.mark.parametrize(("content", "words", "extras"), FORMS)
def test_wrappers_and_prefixes(content: object, words: str, extras: tuple[str, ...]) -> None:
    found = unwrap(content, "a.pth")
    assert_same(found.tensors, MODEL)
    assert found.wrapping == words
    assert found.extras == extras


def test_an_average_alone_is_taken() -> None:
    assert_same(unwrap({"model": None, "ema": OTHER}, "a.pth").tensors, OTHER)


def test_another_network_loses_what_wraps_all_of_it() -> None:
    found = unwrap({"model": prefixed("module._orig_mod."), "loss": STATE["b"]}, "a.pth")
    assert_same(found.tensors, STATE)


def test_a_student_within_the_whole_of_sam_3() -> None:
    student = {
        "backbone.model.patch_embed.seq.0.c.weight": STATE["a.weight"],
        "backbone.model.layers.0.blocks.0.conv1.c.weight": STATE["b"],
        "head.0.weight": STATE["b"] + 1,
    }
    rest = {f"tracker.{i}.weight": STATE["b"] for i in range(9)}
    for outer in ("detector.backbone.vision_backbone.trunk.model.", "backbone.trunk.", "module."):
        content = {"model": {**before(outer, student), **rest, "detector.head.weight": STATE["b"]}}
        found = unwrap(content, "a.pt")
        assert_same(found.tensors, student)
        assert found.extras == ("tracker.… (9 tensors)", "detector.… (1 tensors)")


def test_what_is_no_tensor_is_listed() -> None:
    content = {
        "model": {**STATE, "note": "x", "long": "y" * 100},
        "epoch": 7,
        "optimizer": {"lr": 1, "m": 2},
        "history": [1, 2],
    }
    assert set(unwrap(content, "a.pth").extras) == {
        "epoch = 7",
        "optimizer (dict of 2)",
        "history (list)",
        "note = 'x'",
        f"long = '{'y' * 39}",
    }


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
    content = {"model_state": before("sam."), "decoder_state": {"out.weight": STATE["b"]}}
    found = unwrap(content, "vit_t.pt")
    assert_same(found.tensors, {**MODEL, "decoder_state.out.weight": STATE["b"]})
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
