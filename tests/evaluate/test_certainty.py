import math

import numpy as np
import pytest

from tinyvit.evaluate.metrics import bootstrap, calibrate


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
