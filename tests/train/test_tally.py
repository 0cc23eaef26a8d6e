import json
import math
from dataclasses import asdict

import pytest

from tinyvit.train.loop import Tally


def test_means_since_the_last_line_of_figures_that_not_every_step_has():
    tally = Tally()
    tally.count({"loss": 1.0, "iou": 0.5})
    tally.count({"loss": 3.0})
    assert tally.means() == {"loss": 2.0, "iou": 0.5}
    assert tally.means() == {}


@pytest.mark.parametrize("way, values", [("max", [0.1, 0.3, 0.3, 0.2]), ("min", [9, 7, 7, 8])])
def test_the_best_is_the_first_of_the_best(way, values):
    tally = Tally()
    taken = []
    for step, value in enumerate(values):
        tally.step = step
        taken.append(tally.take({"figure": value, "other": step}, ("figure", way)))
    assert taken == [True, True, False, False]
    assert (tally.best, tally.best_step) == (values[1], 1)
    assert tally.figures == {"figure": values[3], "other": 3}


def test_what_is_no_number_is_never_the_best():
    tally = Tally()
    assert not tally.take({"figure": math.nan}, ("figure", "min"))
    assert tally.take({"figure": 5.0}, ("figure", "min"))
    assert not tally.take({"figure": math.nan}, ("figure", "min"))


def test_nothing_held_out_is_no_mistake_but_a_wrong_name_is():
    tally = Tally()
    assert not tally.take({}, ("figure", "max"))
    with pytest.raises(ValueError, match=r"goal of this task is 'figure'.* gives loss"):
        tally.take({"loss": 1.0}, ("figure", "max"))


def test_it_survives_json_to_the_last_bit():
    tally = Tally(step=3, best=0.1 + 0.2, best_step=2)
    tally.count({"loss": 1 / 3})
    assert Tally(**json.loads(json.dumps(asdict(tally)))) == tally
