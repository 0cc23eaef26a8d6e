import json

import numpy as np
import pytest

from tinyvit.errors import ImageError
from tinyvit.evaluate.segment import COLUMNS as COLUMNS
from tinyvit.evaluate.segment import Case, Cost, EvaluateSettings, evaluate_segment, summarise

from .segmenting import Discs, Growing


class Broken(Discs):
    def load(self):
        raise ImageError("cut short")


def test_ious_after_each_click_and_with_boxes():
    report = evaluate_segment(Growing(), [Discs()], EvaluateSettings(most_clicks=6))
    left, right = report.cases
    # shares of discs' areas, but for pixels at the rim
    for case, radius in ((left, 15), (right, 10)):
        expected = [min(1, r / radius) ** 2 for r in (5, 10, 15, 20, 25)]  # then it is right
        assert case.click_ious[:5] == pytest.approx(expected, abs=0.04)
        side = 2 * radius - 1  # of the tightest box; the model answers with all of it
        pixels = case.area * 60 * 90
        assert case.box_iou == pytest.approx(pixels / side**2)
    assert report.ious["1 click"].value == pytest.approx((1 / 9 + 1 / 4) / 2, abs=0.03)
    assert report.ious["3 clicks"].value == 1
    assert (report.masks, report.images) == (2, 1)
    assert (left.label, right.label) == ("left", "right")


def test_clicks_to_the_target_are_counted_or_cut_off():
    settings = EvaluateSettings((1,), target_iou=0.85, most_clicks=4)
    report = evaluate_segment(Growing(step=2), [Discs()], settings)
    # radius 5, 7, 9, 11: the right disc of 10 gets there at no click (81 %, 83 %), neither the left
    assert (report.clicks_to_target.value, report.missed_target) == (4, 1)
    report = evaluate_segment(Growing(), [Discs()], settings)
    assert (report.clicks_to_target.value, report.missed_target) == (2.5, 0)
    assert [len(case.click_ious) for case in report.cases] == [3, 2]  # no click beyond


def test_further_clicks_come_with_all_before_and_the_last_answer():
    for feed in (True, False):
        model = Growing()
        settings = EvaluateSettings((2,), most_clicks=2, feed_mask=feed)
        evaluate_segment(model, [Discs()], settings)
        points, labels, box, low_res, is_ambiguous = model.asked[1]
        assert points[0].tolist() == [25.5, 30.5]
        assert (labels.tolist(), box, is_ambiguous) == ([1, 1], None, False)
        assert (low_res is not None) == feed
        if feed:
            assert low_res.shape == (1, 4, 4)
        assert model.asked[0][4] is True
        assert model.asked[2][2].tolist() == [11, 16, 40, 45]


def test_the_mask_counts_that_the_model_thinks_best():
    report = evaluate_segment(Growing(score=0.05), [Discs()])  # the third, empty one
    assert all(case.click_ious[0] == 0 for case in report.cases)
    assert report.ious["1 click, best of three masks"].value > 0.1


def test_broken_images_and_empty_masks_are_named():
    class Empty(Discs):
        def load(self):
            image, masks = super().load()
            return image, masks & np.array([True, False])[:, None, None]

    images = [Broken("broken.png"), Empty("empty.png")]
    report = evaluate_segment(Growing(), images, faults=["x.png: gone"])
    assert report.skipped == (
        "x.png: gone",
        "broken.png: cut short",
        "empty.png, mask 1: the mask is empty",
    )
    assert report.masks == 1
    with pytest.raises(ValueError, match=r"not one good mask to evaluate on: .*cut short"):
        evaluate_segment(Growing(), images[:1])
    with pytest.raises(ValueError, match="not one good mask"):
        evaluate_segment(Growing(), [])


def test_it_stops_after_so_many_masks():
    seen = []
    report = evaluate_segment(
        Growing(),
        [Discs(), Discs()],
        EvaluateSettings(most_masks=3, with_baselines=False),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report.masks == 3
    assert seen == [(1, 2), (2, 2)]
    assert report.baselines["box"] == {}


def test_the_report_as_a_table_and_as_json():
    report = evaluate_segment(Growing(), [Discs()], name="growing", data="discs")
    rows = {row[0]: row[1:] for row in report.rows()}
    assert all(len(row) == len(COLUMNS) for row in report.rows())
    assert rows["mean IoU, 1 click"][2].startswith("disc 0.")
    assert "ellipse 1.000" in rows["mean IoU, box"][2] or "ellipse 0.9" in rows["mean IoU, box"][2]
    found = json.loads(report.to_json())
    assert (found["model"], found["data"], found["masks"]) == ("growing", "discs", 2)
    assert found["calibrations"]["1 click"]["correlation"] is None  # the score is always the same
    assert found["cases"][1]["label"] == "right"


def test_the_embedded_model_beats_nothing_on_plain_discs():
    settings = EvaluateSettings((1,), most_clicks=1)
    report = evaluate_segment("tinyvit_sam_2m", [Discs()], settings)
    assert report.model == "tinyvit_sam_2m"
    assert report.ious["box"].value > 0.5
    assert report.cost.encode_seconds > 0


def test_settings_are_checked():
    for wrong, words in (
        ({"clicks": ()}, "clicks must be numbers of at least 1"),
        ({"most_clicks": 4}, "most_clicks must be at least 5"),
        ({"target_iou": 0.0}, "target_iou must lie in 0 to 1"),
        ({"most_masks": 0}, "most_masks must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            EvaluateSettings(**wrong)


def case(*clicks, predicted=0.5):
    return Case("a.png", 0, "", 0.1, clicks, 0.9, 0.4, predicted, 0.6, 0.5, 0.7, {"disc": 0.3}, {})


def report(*cases):
    return summarise(
        "m", "d", 1, [], cases, range(len(cases)), Cost(0.01, 0.002, None),
        EvaluateSettings((1, 2), target_iou=0.8, most_clicks=5),
    )  # fmt: skip


def test_means_and_counts_to_the_target():
    found = report(case(0.2, 0.9), case(0.4, 0.5, 0.6, 0.6, 0.7))
    assert found.ious["1 click"].value == pytest.approx(0.3)
    assert found.ious["2 clicks"].value == pytest.approx(0.7)
    assert found.clicks_to_target.value == pytest.approx((2 + 5) / 2)
    assert found.missed_target == 0.5
    assert found.baselines["1 click"]["disc"].value == pytest.approx(0.3)
    assert found.calibrations["1 click"].mean_error == pytest.approx(0.2)
    assert found.calibrations["box"].mean_error == pytest.approx(0.1)


def test_the_table_says_what_was_cut_off():
    rows = {row[0]: row for row in report(case(0.2, 0.3)).rows()}
    assert rows["clicks to IoU 0.8 (at most 5)"][1] == "5.00"
    assert rows["never reached it"][1] == "100 %"
    assert rows["encode an image"][1] == "10.0 ms"
    assert "peak memory" not in rows  # the system did not say
