import pytest
import torch
import torch.nn.functional as F

from tinyvit.train.tasks.losses import (
    cosine_per_cell,
    covered_cells,
    feature_loss,
    fit_grid,
    mask_loss,
)


def maps(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_losses_are_what_they_say():
    a, b = maps(0, 2, 5, 3, 4), maps(1, 2, 5, 3, 4)
    # float32 means in another order
    assert torch.isclose(feature_loss(a, b, "mse"), (a - b).square().mean(), atol=1e-6)
    far = (a - b).abs()
    huber = torch.where(far < 1, 0.5 * far**2, far - 0.5).mean()
    assert torch.isclose(feature_loss(a, b, "huber"), huber, atol=1e-6)
    dots = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert torch.isclose(feature_loss(a, b, "cosine"), 1 - dots.mean(), atol=1e-6)
    assert torch.allclose(cosine_per_cell(a, b), dots, atol=1e-6)


@pytest.mark.parametrize("kind", ["mse", "huber", "cosine"])
def test_equal_maps_cost_nothing_and_half_precision_is_computed_in_float32(kind):
    a = maps(0, 1, 4, 2, 2).bfloat16()
    loss = feature_loss(a, a.clone(), kind)
    assert loss.dtype == torch.float32
    assert abs(float(loss)) < 1e-6  # the cosine of equal vectors, in float32


def test_wrong_shapes_and_names_are_said():
    with pytest.raises(ValueError, match=r"\[1, 4, 2, 2\] and \[1, 4, 2, 3\]; bring them together"):
        feature_loss(maps(0, 1, 4, 2, 2), maps(0, 1, 4, 2, 3))
    with pytest.raises(ValueError, match="mse, cosine, huber; got 'l1'"):
        feature_loss(maps(0, 1, 4, 2, 2), maps(0, 1, 4, 2, 2), "l1")


def test_a_finer_grid_is_averaged_and_the_same_one_is_left_alone():
    fine = maps(0, 1, 2, 8, 8)
    assert fit_grid(fine, (8, 8)) is fine
    flat = torch.ones(1, 2, 8, 8)
    assert torch.allclose(fit_grid(flat, (3, 5)), torch.ones(1, 2, 3, 5))
    noise = maps(1, 1, 1, 64, 64)
    # taking every eighth value would keep a deviation of 1; the filter averages over 8 x 8 or more
    assert float(fit_grid(noise, (8, 8)).std()) < 0.2


def test_covered_cells_leave_padding_out():
    cells = covered_cells(torch.tensor([[64, 32], [1, 64], [40, 64]]), (64, 64), (4, 4))
    assert cells[0].tolist() == [[True, True, False, False]] * 4
    assert cells[1].sum() == 4 and cells[1, 0].all()
    assert cells[2].sum() == 8  # the third row's middle is at 40, outside
    parts = covered_cells(torch.tensor([[1.0, 0.5]]), (1, 1), (4, 4))
    assert torch.equal(parts[0], cells[0])


def test_masks_that_agree_cost_less():
    teacher = torch.where(torch.arange(64).view(1, 8, 8) % 8 < 4, 12.0, -12.0)
    same, other = mask_loss(teacher, teacher), mask_loss(-teacher, teacher)
    assert float(same) < 1e-3  # sigmoid(12) is 6e-6 away from 1
    assert float(other) > 10
    soft = maps(0, 3, 4, 4)
    entropy = F.binary_cross_entropy_with_logits(soft, soft.sigmoid())
    assert torch.isclose(mask_loss(soft, soft), entropy, atol=1e-6)  # dice of equal masks is 0


def test_the_mask_loss_leads_to_the_teacher_s_mask():
    teacher = maps(0, 2, 6, 6) * 4
    student = torch.zeros(2, 6, 6, requires_grad=True)
    for _ in range(60):
        (gradient,) = torch.autograd.grad(mask_loss(student, teacher), student)
        student = (student - 20 * gradient).detach().requires_grad_()
    assert torch.equal(student > 0, teacher > 0)
