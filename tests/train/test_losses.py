import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.train.tasks.losses import (
    cosine_per_cell,
    covered_cells,
    dice_loss,
    feature_loss,
    fit_grid,
    focal_loss,
    mask_ious,
    mask_loss,
    one_hot,
    prompt_losses,
    soft_cross_entropy,
    sparse_cross_entropy,
)
from tinyvit.train.tasks.settings import SegmentSettings


def dense_distribution(indices, probabilities, classes):
    """[B, K]: what the k kept probabilities leave is spread evenly over the other classes."""
    others = classes - indices.shape[1]
    rest = (1 - probabilities.sum(dim=1, keepdim=True)).clamp_min(0) / max(others, 1)
    return rest.expand(-1, classes).contiguous().scatter_(1, indices, probabilities)


def test_focal_loss_by_hand():
    # one pixel, chance 1/2: 0.25 * (1/2)^2 * log 2 inside and 0.75 * (1/2)^2 * log 2 outside
    logits = torch.zeros(2, 1, 1)
    targets = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    expected = torch.tensor([0.25, 0.75]) * 0.25 * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(focal_loss(logits, targets), expected)


def test_dice_loss_by_hand():
    logits = torch.tensor([[[50.0, 50.0], [-50.0, -50.0]]])  # certain
    targets = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(dice_loss(logits, targets), torch.tensor([1 - 3 / 4]))


def test_pixels_of_the_padding_do_not_count():
    logits, targets = torch.randn(1, 3, 4), torch.rand(1, 3, 4)
    weights = torch.ones(1, 3, 4)
    weights[:, :, 2:] = 0
    for loss in (focal_loss, dice_loss, mask_ious):
        whole = loss(logits[:, :, :2], targets[:, :, :2])
        torch.testing.assert_close(loss(logits, targets, weights), whole)


def test_iou_of_masks():
    logits = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])
    targets = torch.tensor([[[1.0, 0.2], [0.9, 0.0]]])
    torch.testing.assert_close(mask_ious(logits, targets), torch.tensor([1 / 3]))
    torch.testing.assert_close(mask_ious(-logits.abs(), 0 * targets), torch.tensor([1.0]))


def test_only_the_best_of_three_masks_learns_but_every_predicted_iou():
    targets = torch.zeros(1, 4, 4)
    targets[0, :2] = 1
    sign = 2 * targets - 1
    logits = torch.stack([-3 * sign, 3 * sign, 0 * sign], dim=1).requires_grad_()  # second is best
    ious = torch.tensor([[0.9, 0.2, 0.1]], requires_grad=True)
    found = prompt_losses(SegmentSettings(""), logits, ious, targets)
    found["total"].sum().backward()
    assert [bool(logits.grad[0, k].any()) for k in range(3)] == [False, True, False]
    # true IoUs: 0, 1, and 0 (a logit of 0 is no mask); mean over 3 of squares has slope 2/3 d
    expected = torch.tensor([[2 / 3 * 0.9, 2 / 3 * (0.2 - 1), 2 / 3 * 0.1]])
    torch.testing.assert_close(ious.grad, expected)
    by_hand = 10 * focal_loss(logits[:, 1], targets) + dice_loss(logits[:, 1], targets)
    error = (0.9**2 + 0.8**2 + 0.1**2) / 3
    torch.testing.assert_close(found["total"], by_hand + error)
    assert found["train_iou"].item() == 0.0  # of the mask that the model thinks best: the first


def test_gradients_in_double_precision():
    torch.manual_seed(1)
    targets = torch.rand(2, 3, 3, dtype=torch.float64)
    weights = torch.ones(2, 3, 3, dtype=torch.float64)
    weights[1, 2] = 0
    # far apart, so that the small steps of the check never change which mask is best
    logits = torch.randn(2, 3, 3, 3, dtype=torch.float64) * torch.tensor([0.5, 2, 4]).view(3, 1, 1)
    ious = torch.rand(2, 3, dtype=torch.float64)
    settings = SegmentSettings("", focal=5.0)
    assert torch.autograd.gradcheck(
        lambda x, y: prompt_losses(settings, x, y, targets, weights)["total"],
        (logits.requires_grad_(), ious.requires_grad_()),
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


def test_whitened_counts_each_channel_by_its_variance():
    student, teacher = maps(0, 2, 4, 3, 3), maps(1, 2, 4, 3, 3)
    spread = teacher.var((0, 2, 3), correction=0)
    wanted = ((student - teacher).square().mean((0, 2, 3)) / spread).mean()
    assert torch.isclose(feature_loss(student, teacher, "whitened"), wanted, rtol=1e-4)
    loud = torch.tensor([1.0, 1.0, 50.0, 1.0])[None, :, None, None]  # in both: no difference
    same = feature_loss(student * loud, teacher * loud, "whitened")
    assert torch.isclose(same, wanted, rtol=0.01)
    still = torch.zeros_like(teacher)  # no variance at all, so no division by 0
    assert torch.isfinite(feature_loss(student, still, "whitened"))


@pytest.mark.parametrize("kind", ["mse", "huber", "whitened", "cosine"])
def test_equal_maps_cost_nothing_and_half_precision_is_computed_in_float32(kind):
    a = maps(0, 1, 4, 2, 2).bfloat16()
    loss = feature_loss(a, a.clone(), kind)
    assert loss.dtype == torch.float32
    assert abs(float(loss)) < 1e-6  # the cosine of equal vectors, in float32


def test_wrong_shapes_and_names_are_said():
    with pytest.raises(ValueError, match=r"\[1, 4, 2, 2\] and \[1, 4, 2, 3\]; bring them together"):
        feature_loss(maps(0, 1, 4, 2, 2), maps(0, 1, 4, 2, 3))
    with pytest.raises(ValueError, match="mse, huber, whitened, cosine; got 'l1'"):
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
    cells = covered_cells(torch.tensor([[64, 32], [1, 64], [40, 64]]) / 64, (4, 4))
    assert cells[0].tolist() == [[True, True, False, False]] * 4
    assert cells[1].sum() == 4 and cells[1, 0].all()
    assert cells[2].sum() == 8  # the third row's middle is at 40, outside
    parts = covered_cells(torch.tensor([[1.0, 0.5]]), (4, 4))
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


def test_sparse_gradients_in_double_precision():
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
