import pytest

from tinyvit.evaluate.segment import Case, Cost, summarise


def case(*clicks, predicted=0.5):
    return Case("a.png", 0, "", 0.1, clicks, 0.9, 0.4, predicted, 0.6, 0.5, 0.7, {"disc": 0.3}, {})


def report(*cases):
    return summarise(
        "m", "d", 1, [], cases, range(len(cases)), Cost(0.01, 0.002, None),
        clicks=(1, 2), target_iou=0.8, most_clicks=5,
    )  # fmt: skip


def test_means_and_counts_to_the_target():
    found = report(case(0.2, 0.9), case(0.4, 0.5, 0.6, 0.6, 0.7))
    assert found.ious["1 click"].value == pytest.approx(0.3)
    assert found.ious["2 clicks"].value == pytest.approx(0.7)
    assert found.clicks_to_target.value == pytest.approx((2 + 5) / 2)
    assert found.missed_target == 0.5
    assert found.floors["1 click"]["disc"].value == pytest.approx(0.3)
    assert found.calibrations["1 click"].mean_error == pytest.approx(0.2)
    assert found.calibrations["box"].mean_error == pytest.approx(0.1)


def test_the_table_says_what_was_cut_off():
    rows = {row[0]: row for row in report(case(0.2, 0.3)).rows()}
    assert rows["clicks to IoU 0.8 (at most 5)"][1] == "5.00"
    assert rows["never reached it"][1] == "100 %"
    assert rows["encode an image"][1] == "10.0 ms"
    assert "peak memory" not in rows  # the system did not say
