import numpy as np
import pytest

from tinyvit.evaluate.metrics import most_interior_point
from tinyvit.train.tasks.prompting import correct, first_click, noisy_box


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
