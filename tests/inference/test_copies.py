from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tinyvit.inference.torch_backend import folded_copy, frozen_copy
from tinyvit.modules import Attention, Conv2d_BN, TinyViT

MakeModel = Callable[..., TinyViT]
MakeImage = Callable[..., Tensor]


def test_a_frozen_copy_shares_nothing(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit(drop_path_rate=0.5).double().train()
    twin = frozen_copy(model)
    assert not twin.training
    assert model.training
    for key, tensor in twin.state_dict().items():
        assert tensor.data_ptr() != model.state_dict()[key].data_ptr()
        assert tensor.dtype in (torch.float32, torch.int64)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 48, 64), (1, 75, 58)])
def test_a_folded_copy_gives_what_the_model_gives(
    shape: tuple[int, int, int], make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    model, x = make_tiny_vit(), image(*shape)
    folded = folded_copy(model)
    close = {"rtol": 1e-4, "atol": 1e-4}  # some ulps for each layer
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), model(x), **close)
        torch.testing.assert_close(folded.classify(x), model.classify(x), **close)
        maps, wanted = (it.forward_intermediates(x)[1] for it in (folded, model))
        torch.testing.assert_close(maps, wanted, **close)


def test_what_can_be_folded_is(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit(stem="pointwise", local_conv_size=5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = folded_copy(model)
    assert any(isinstance(module, Attention) for module in model.modules())
    kinds = (Conv2d_BN, Attention, nn.BatchNorm2d)
    assert not any(isinstance(module, kinds) for module in folded.modules())
    for module in folded.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_in_another_precision_all_of_it_is(make_tiny_vit: MakeModel, image: MakeImage) -> None:
    model, x = make_tiny_vit(), image(1, 48, 64)
    with torch.inference_mode():
        out = folded_copy(model).to(torch.bfloat16)(x.bfloat16())
        assert out.dtype == torch.bfloat16
        # bf16 keeps 8 bits, see test_torch_backend.py
        torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.15)
