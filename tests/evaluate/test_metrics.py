import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.evaluate.metrics import (
    bootstrap,
    boundary_f,
    calibrate,
    disc,
    iou,
    most_interior_point,
    next_click,
)


def square(size, top, left, side):
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_iou_of_a_half_overlap():
    assert iou(square(8, 0, 0, 4), square(8, 0, 2, 4)) == pytest.approx(8 / 24)


def test_iou_of_two_empty_masks_is_1():
    assert iou(square(4, 0, 0, 0), square(4, 0, 0, 0)) == 1.0


def test_masks_of_different_images_are_refused():
    with pytest.raises(ValueError, match=r"wanted two masks .* came \[4, 4\] and \[5, 5\]"):
        iou(square(4, 0, 0, 2), square(5, 0, 0, 2))


def test_boundary_f_is_1_within_the_tolerance_and_0_beyond():
    # 0.75 % of the diagonal of 400 x 400 is 4.2 pixels
    target = square(400, 100, 100, 200)
    assert boundary_f(square(400, 103, 100, 200), target) == 1.0
    assert boundary_f(square(400, 150, 150, 100), target) == 0.0


def test_boundary_f_is_the_harmonic_mean_of_precision_and_recall():
    target = square(400, 100, 100, 50)
    both = target | square(400, 300, 300, 50)  # half of the outline is too much, none is missing
    assert boundary_f(both, target) == pytest.approx(2 * 0.5 / 1.5)


def test_the_edge_of_the_image_is_no_boundary():
    whole = np.ones((50, 50), bool)
    assert boundary_f(whole, whole) == 1.0
    assert boundary_f(whole, square(50, 10, 10, 20)) == 0.0


def test_the_most_interior_point_is_the_middle():
    assert most_interior_point(square(20, 4, 6, 5)) == (8.5, 6.5)


def test_the_image_s_edge_is_outside():
    assert most_interior_point(np.ones((5, 5), bool)) == (2.5, 2.5)


def test_an_empty_mask_has_no_interior():
    with pytest.raises(ValueError, match="an empty mask has no interior"):
        most_interior_point(np.zeros((3, 3), bool))


@given(st.integers(0, 2**16 - 1))
def test_the_most_interior_point_lies_in_the_mask(bits):
    mask = np.array([(bits >> place) & 1 for place in range(16)], bool).reshape(4, 4)
    if mask.any():
        x, y = most_interior_point(mask)
        assert mask[int(y), int(x)]


def test_the_larger_error_is_corrected_by_its_kind():
    target = square(40, 5, 5, 10)
    extra = target | square(40, 20, 20, 15)
    point, label = next_click(extra, target)
    assert (point, label) == ((27.5, 27.5), 0)
    assert next_click(square(40, 0, 0, 0), target) == ((9.5, 9.5), 1)


def test_two_touching_errors_of_different_kinds_are_two():
    predicted, target = square(20, 0, 0, 6), square(20, 0, 6, 7)
    assert next_click(predicted, target)[1] == 1  # 49 missed pixels, 36 too many


def test_nothing_is_left_to_correct():
    assert next_click(disc((30, 30), (15, 15)), disc((30, 30), (15, 15))) is None


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(5, 2, 400)
    figure = bootstrap(values.tolist(), range(400))
    # the mean of 400 draws of deviation 2 has a 95 % interval of 1.96 * 2 / 20 on each side
    assert figure.value == pytest.approx(values.mean())
    assert (figure.high - figure.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_masks_of_one_image_count_as_one_draw():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(0, 1, 50), 10)
    alone = bootstrap(values.tolist(), range(500))
    together = bootstrap(values.tolist(), np.repeat(np.arange(50), 10).tolist())
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.15)


def test_the_same_numbers_give_the_same_interval():
    assert bootstrap([0.1, 0.5, 0.9], [0, 1, 1]) == bootstrap([0.1, 0.5, 0.9], [0, 1, 1])


def test_no_number_has_no_mean():
    figure = bootstrap([], [])
    assert math.isnan(figure.value)
    assert figure.count == 0


def test_one_group_for_each_number():
    with pytest.raises(ValueError, match="a group for each of 2 values; came 1"):
        bootstrap([1.0, 2.0], [0])


def test_an_estimate_that_is_always_too_good():
    true = [0.1, 0.3, 0.5]
    found = calibrate([value + 0.2 for value in true], true)
    assert found.correlation == pytest.approx(1)
    assert found.mean_error == pytest.approx(0.2)
    assert [row.count for row in found.bins] == [0, 0, 0, 1, 0, 1, 0, 1, 0, 0]
    assert found.bins[3].true == pytest.approx(0.1)


def test_estimates_beyond_0_and_1_are_in_the_outer_bins():
    found = calibrate([-0.5, 1.5], [0.0, 1.0])
    assert (found.bins[0].count, found.bins[9].count) == (1, 1)


def test_a_constant_estimate_has_no_correlation():
    assert math.isnan(calibrate([0.5, 0.5], [0.1, 0.9]).correlation)
