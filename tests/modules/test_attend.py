import pytest
import torch
import torch.nn.functional as F

from tinyvit.modules.layers import attend


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_learning", [False, True])
def test_the_definition(with_bias, is_learning):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    bias = torch.randn(1, 3, 5, 7, dtype=torch.float64) if with_bias else None
    with torch.set_grad_enabled(is_learning):
        found = attend(q, k, v, 0.3, bias)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3 + (0 if bias is None else bias)
    wanted = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_of_all_that_goes_in():
    torch.manual_seed(1)
    shapes = (1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 3, 5)
    q, k, v, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *x: attend(x[0], x[1], x[2], 0.5, x[3]), (q, k, v, bias))


def test_torch_does_it_where_nothing_learns(monkeypatch):
    called = []
    fused = F.scaled_dot_product_attention

    def watch(*args, **kwargs):
        called.append(kwargs["scale"])
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    x = torch.randn(1, 2, 3, 4)
    with torch.no_grad():
        attend(x, x, x, 0.5)
    assert called == [0.5]
    attend(x, x, x, 0.5)
    assert called == [0.5]


def test_bfloat16_stays_what_it_is_under_autocast():
    x = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(x, x, x, 0.5).dtype == torch.bfloat16
