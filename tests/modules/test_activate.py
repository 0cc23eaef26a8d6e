import pytest
import torch
from torch import nn

from tinyvit.modules.layers import activate


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.PReLU(3), nn.Hardswish()])
def test_any_activation_in_either_order(activation, order):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=order).requires_grad_()
    y = activate(activation, x)
    assert y.is_contiguous(memory_format=order)
    wanted = activation(x)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)  # another order of vectors
    weights = torch.randn(2, 3, 4, 5)
    (got,) = torch.autograd.grad((y * weights).sum(), x)
    (gradient,) = torch.autograd.grad((wanted * weights).sum(), x)
    torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-6)


def test_gelu_sees_contiguous_memory():
    seen = []
    gelu = nn.GELU()
    gelu.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    activate(gelu, torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    assert seen == [True]
