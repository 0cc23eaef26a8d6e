from __future__ import annotations

import pytest

from tinyvit.bench import Spread


def test_quartiles_lie_within_the_numbers():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)


def test_one_number_has_no_spread():
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of([7.0]).relative == 0


def test_relative_is_a_share_of_the_median():
    assert Spread(4.0, 3.0, 5.0).relative == 0.5
    assert Spread(0.0, 0.0, 0.0).relative == 0


def test_no_numbers_are_an_error():
    with pytest.raises(ValueError, match="at least one number, got none"):
        Spread.of([])
