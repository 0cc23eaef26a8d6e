import numpy as np
import pytest
import torch

from tinyvit.evaluate.metrics import most_interior_point
from tinyvit.train.tasks.segment import (
    Objects,
    check_trainable,
    correct,
    first_click,
    logit_stride,
    noisy_box,
    prompt_and_learn,
)
from tinyvit.train.tasks.settings import SegmentSettings


def objects_of(sam, grid, size, count=3):
    torch.manual_seed(0)
    masks = torch.zeros(2, count, *size, dtype=torch.bool)
    masks[:, :, 8:40, 10:50] = True
    points = torch.tensor([20.0, 20.0]).expand(2, count, 2)
    boxes = torch.tensor([9.0, 7.0, 51.0, 41.0]).expand(2, count, 4)
    sizes = torch.tensor([[48, 64], [64, 64]])
    samples = {"masks": masks, "sizes": sizes, "points": points, "boxes": boxes}
    return Objects.of(sam, grid, samples)


def test_targets_are_the_covered_shares_and_padding_has_no_weight(make_tiny_sam):
    sam = make_tiny_sam(64)
    objects = objects_of(sam, (4, 4), (64, 64))
    assert objects.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert objects.targets.shape == (6, 16, 16)
    assert objects.targets[0, 2:10].amax() == 1
    assert objects.targets[0, 5, 2] == 0.5  # columns 8 to 12, of which 10 and 11
    assert objects.weights.sum((1, 2)).tolist() == [12 * 16] * 3 + [16 * 16] * 3


def test_a_frame_that_the_stride_does_not_divide(make_tiny_sam):
    sam = make_tiny_sam(56)  # 4 x 4 cells of 16 pixels
    objects = objects_of(sam, (4, 4), (56, 56))
    assert logit_stride(sam) == 4
    assert objects.targets[0].sum() * 16 == 32 * 40


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("corrective", [0.0, 1.0])
def test_losses_of_all_objects_with_gradient(make_tiny_sam, share, corrective):
    sam = make_tiny_sam(64)
    features = torch.randn(2, 32, 4, 4, requires_grad=True)
    found = prompt_and_learn(
        sam,
        features,
        objects_of(sam, (4, 4), (64, 64)),
        SegmentSettings("", box_share=share, corrective_share=corrective),
        torch.Generator().manual_seed(0),
    )
    assert found["total"].shape == (6,)
    found["total"].sum().backward()
    assert features.grad.abs().amax((1, 2, 3)).min() > 0
    table = sam.prompt_encoder.point_embeddings
    has_corners = table[2].weight.grad is not None and bool(table[2].weight.grad.any())
    assert has_corners == (share == 1.0)
    sam.zero_grad()


def test_a_single_click_teaches_all_masks_and_a_box_the_single_one(make_tiny_sam, monkeypatch):
    sam = make_tiny_sam(64)
    asked = []
    predict = sam.mask_decoder.predict_masks

    def watch(*arguments):
        asked.append((arguments[2].shape[1], torch.is_grad_enabled()))
        return predict(*arguments)

    monkeypatch.setattr(sam.mask_decoder, "predict_masks", watch)
    arguments = sam, torch.randn(2, 32, 4, 4), objects_of(sam, (4, 4), (64, 64))
    for share, corrective, prompts, several in (
        (0.0, 0.0, [(2, True)], True),  # the click and the padding point
        (1.0, 0.0, [(2, True)], False),  # two corners
        (0.0, 1.0, [(2, False), (3, True)], False),
        (1.0, 1.0, [(2, False), (3, True)], False),  # no padding point beside a box
    ):
        asked.clear()
        sam.zero_grad()
        settings = SegmentSettings(
            "", box_share=share, corrective_share=corrective, most_corrections=1
        )
        found = prompt_and_learn(*arguments, settings, torch.Generator().manual_seed(0))
        assert asked == prompts
        found["total"].sum().backward()
        learning = [
            any(bool(p.grad is not None and p.grad.any()) for p in perceptron.parameters())
            for perceptron in sam.mask_decoder.output_hypernetworks_mlps
        ]
        assert learning[0]
        assert any(learning[1:]) == several


def test_gradients_through_prompts_in_double_precision(make_tiny_sam):
    sam = make_tiny_sam(32).double()
    objects = objects_of(sam, (2, 2), (32, 64), 1)
    objects = Objects(
        torch.tensor([0]),
        torch.from_numpy(np.random.default_rng(0).random((1, 8, 8))),
        torch.ones(1, 8, 8, dtype=torch.float64),
        objects.points[:1].double(),
        objects.boxes[:1].double(),
    )

    def total(features):
        generator = torch.Generator().manual_seed(0)
        settings = SegmentSettings("", box_share=1.0, corrective_share=0.0)
        return prompt_and_learn(sam, features, objects, settings, generator)["total"]

    features = torch.randn(1, 32, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (features,))


def test_other_decoders_are_refused(make_tiny_sam):
    sam = make_tiny_sam(64)
    check_trainable(sam)
    sam.mask_decoder = torch.nn.Identity()
    with pytest.raises(ValueError, match="this model has Identity"):
        check_trainable(sam)


def rings():
    mask = np.zeros((40, 60), bool)
    mask[5:25, 10:50] = True
    mask[10:20, 20:40] = False
    return mask


def test_clicks_lie_in_the_object_and_half_at_its_most_interior_point():
    mask, rng = rings(), np.random.default_rng(0)
    points = [first_click(mask, rng) for _ in range(400)]
    assert all(mask[int(y), int(x)] for x, y in points)
    share = np.mean([point == most_interior_point(mask) for point in points])
    assert share == pytest.approx(0.5, abs=0.08)  # three deviations of 400 draws
    assert len(set(points)) > 100


def test_boxes_are_around_the_object_but_not_exactly():
    mask, rng = rings(), np.random.default_rng(0)
    boxes = np.array([noisy_box(mask, rng) for _ in range(200)])
    assert np.abs(boxes - [10, 5, 50, 25]).max() <= 20 / 1024 * 60 + 1e-9
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.std(0).min() > 0.3


def test_a_box_around_one_pixel_keeps_it():
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    for seed in range(20):
        x0, y0, x1, y1 = noisy_box(mask, np.random.default_rng(seed))
        assert x1 - x0 >= 1
        assert y1 - y0 >= 1


def test_corrections_are_in_errors_and_say_of_which_kind():
    target, predicted = rings(), np.zeros((40, 60), bool)
    predicted[15:38, 5:30] = True
    kinds = set()
    for seed in range(60):
        (x, y), label = correct(predicted, target, np.random.default_rng(seed))
        row, column = int(y), int(x)
        assert predicted[row, column] != target[row, column]
        assert label == int(target[row, column])
        kinds.add(label)
    assert kinds == {0, 1}


def test_a_right_mask_wants_no_correction():
    assert correct(rings(), rings(), np.random.default_rng(0)) is None


def test_empty_masks_are_refused():
    for simulate in (first_click, noisy_box):
        with pytest.raises(ValueError, match="an empty mask has no"):
            simulate(np.zeros((4, 4), bool), np.random.default_rng(0))
