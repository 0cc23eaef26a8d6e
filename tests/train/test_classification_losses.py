import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.train.tasks.classify import (
    dense_distribution,
    one_hot,
    soft_cross_entropy,
    sparse_cross_entropy,
)


def sparse(seed, batch=3, classes=7, k=3):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * 3
    best = teacher.softmax(1).topk(k, 1)
    return torch.randn(batch, classes, generator=generator, dtype=torch.float64), best


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_alone_are_torchs_cross_entropy(smoothing):
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    wanted = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    made = soft_cross_entropy(logits, one_hot(labels, 4, smoothing))
    torch.testing.assert_close(made, wanted)  # the same sums in another order
    assert made.dtype == torch.float32


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(5, 4).bfloat16()
    labels = torch.tensor([0, 3, 1, 1, 2])
    wanted = F.cross_entropy(logits.float(), labels)
    torch.testing.assert_close(soft_cross_entropy(logits, one_hot(labels, 4)), wanted)


def test_smoothing_has_a_range():
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1"):
        one_hot(torch.tensor([0]), 2, 1.0)


@given(st.integers(0, 1000), st.integers(2, 9), st.data())
def test_the_sparse_loss_is_that_of_the_distribution_it_stands_for(seed, classes, data):
    k = data.draw(st.integers(1, classes))
    logits, best = sparse(seed, classes=classes, k=k)
    dense = dense_distribution(best.indices, best.values, classes)
    torch.testing.assert_close(dense.sum(1), torch.ones(3, dtype=torch.float64))
    made = sparse_cross_entropy(logits, best.indices, best.values)
    torch.testing.assert_close(made, soft_cross_entropy(logits, dense))


def test_what_is_missing_is_spread_evenly():
    dense = dense_distribution(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.2]]), 5)
    torch.testing.assert_close(dense, torch.tensor([[0.2, 0.1, 0.5, 0.1, 0.1]]))


def test_all_classes_kept_is_the_whole_distribution_and_rounding_cannot_make_it_negative():
    logits, best = sparse(1, classes=4, k=4)
    wanted = soft_cross_entropy(logits, dense_distribution(best.indices, best.values, 4))
    torch.testing.assert_close(sparse_cross_entropy(logits, best.indices, best.values), wanted)
    above = torch.tensor([[0.75, 0.2502]])  # two float16 may add up to more than 1
    assert dense_distribution(torch.tensor([[0, 1]]), above, 3).min() == 0


def test_gradients_in_double_precision():
    logits, best = sparse(2)
    logits.requires_grad_(True)
    targets = one_hot(torch.tensor([1, 5, 0]), 7, 0.1).double()
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, targets), logits)
    assert torch.autograd.gradcheck(
        lambda x: sparse_cross_entropy(x, best.indices, best.values), logits
    )


def test_the_minimum_is_the_teachers_distribution():
    _, best = sparse(3)
    dense = dense_distribution(best.indices, best.values, 7)
    logits = dense.log().requires_grad_(True)
    sparse_cross_entropy(logits, best.indices, best.values).backward()
    # the gradient is (softmax - target) / batch, which is 0 up to rounding
    torch.testing.assert_close(logits.grad, torch.zeros_like(dense), rtol=0, atol=1e-14)
