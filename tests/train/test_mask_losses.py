import pytest
import torch

from tinyvit.train.tasks.losses import MaskLosses, dice_loss, focal_loss, mask_ious, shrink_masks


def test_shrunk_masks_hold_the_covered_share():
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[0, :2, :3] = True
    expected = torch.tensor([[[1.0, 0.5, 0, 0], [0, 0, 0, 0]]])
    torch.testing.assert_close(shrink_masks(mask, (2, 4)), expected)


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
    found = MaskLosses()(logits, ious, targets)
    found.total.sum().backward()
    assert [bool(logits.grad[0, k].any()) for k in range(3)] == [False, True, False]
    # true IoUs: 0, 1, and 0 (a logit of 0 is no mask); mean over 3 of squares has slope 2/3 d
    expected = torch.tensor([[2 / 3 * 0.9, 2 / 3 * (0.2 - 1), 2 / 3 * 0.1]])
    torch.testing.assert_close(ious.grad, expected)
    by_hand = 10 * focal_loss(logits[:, 1], targets) + dice_loss(logits[:, 1], targets)
    error = (0.9**2 + 0.8**2 + 0.1**2) / 3
    torch.testing.assert_close(found.total, by_hand + error)
    assert found.iou.item() == 0.0  # of the mask that the model thinks best: the first


def test_gradients_in_double_precision():
    torch.manual_seed(1)
    targets = torch.rand(2, 3, 3, dtype=torch.float64)
    weights = torch.ones(2, 3, 3, dtype=torch.float64)
    weights[1, 2] = 0
    # far apart, so that the small steps of the check never change which mask is best
    logits = torch.randn(2, 3, 3, 3, dtype=torch.float64) * torch.tensor([0.5, 2, 4]).view(3, 1, 1)
    ious = torch.rand(2, 3, dtype=torch.float64)
    losses = MaskLosses(5.0, 1.0, 1.0)
    assert torch.autograd.gradcheck(
        lambda x, y: losses(x, y, targets, weights).total,
        (logits.requires_grad_(), ious.requires_grad_()),
    )


def test_weights_are_checked():
    with pytest.raises(ValueError, match="focal or dice above it; came focal=0"):
        MaskLosses(0, 0, 1)
