"""What of benchmarks/everything.py needs no peers: options, agreement of masks, tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def spots(*corners, size=(20, 30), side=6):
    masks = []
    for top, left in corners:
        mask = np.zeros(size, bool)
        mask[top : top + side, left : left + side] = True
        masks.append(mask)
    return masks


def records(masks, scores):
    return [
        {"segmentation": mask, "predicted_iou": score, "stability_score": score / 2}
        for mask, score in zip(masks, scores, strict=True)
    ]


def test_the_default_cases(load_benchmark):
    everything = load_benchmark("everything")
    cases = list(everything.cases_of(everything.parse([])))
    assert [(case["weights"], case["picture"]) for case in cases] == [
        (weights, image)
        for weights in ("starter", "5m")
        for image in ("coffee.png", "chelsea.png", "rocket.jpg")
    ]
    assert {case["arguments"]["points_per_side"] for case in cases} == {32}
    assert all(Path(case["path"]).is_file() for case in cases)
    from tinyvit.catalog import get_variant

    for case in cases:
        assert get_variant(case["variant"]).img_size == case["size"]


def test_all_contestants_get_the_same_arguments(load_benchmark):
    everything = load_benchmark("everything")
    words = ["--weights", "5m", "--pred-iou-thresh", "0.5", "--stability-score-offset", "0.2"]
    (case, *_) = everything.cases_of(everything.parse(words))
    assert case["arguments"] == {
        "points_per_side": 32,
        "points_per_batch": 64,
        "pred_iou_thresh": 0.5,
        "stability_score_thresh": 0.8,
        "stability_score_offset": 0.2,
        "crop_n_layers": 0,
    }


def test_iou_of_packed_masks(load_benchmark):
    agreement = load_benchmark("mask_agreement")
    a = np.asarray(agreement.MaskSet.of_masks(spots((0, 0), (5, 5)), [0.5, 0.6]))
    b = np.asarray(agreement.MaskSet.of_masks([*spots((0, 3)), np.zeros((20, 30), bool)], [1, 2]))
    table = agreement.ious(a["mask"], b["mask"])
    np.testing.assert_allclose(table, [[18 / 54, 0], [4 / 68, 0]])
    assert agreement.ious(b["mask"][1:], b["mask"][1:]).tolist() == [[1.0]]  # both empty


def test_pixels_are_compared_in_parts(load_benchmark, monkeypatch):
    agreement = load_benchmark("mask_agreement")
    rows = np.asarray(agreement.MaskSet.of_masks(spots((0, 0), (5, 5), (14, 24)), [1, 2, 3]))
    whole = agreement.ious(rows["mask"], rows["mask"])
    monkeypatch.setattr(agreement, "PIXELS_AT_ONCE", 64)
    assert np.array_equal(agreement.ious(rows["mask"], rows["mask"]), whole)


def test_masks_for_the_same_prompts(load_benchmark):
    agreement = load_benchmark("mask_agreement")
    theirs = np.asarray(agreement.MaskSet.of_masks(spots((0, 0), (5, 5)), [0.5, 0.6]))
    ours = np.asarray(agreement.MaskSet.of_masks(spots((0, 0), (5, 6)), [0.5, 0.7]))
    found = agreement.same_prompts(theirs, ours)
    assert found["masks"] == 2
    assert found["least_iou"] == pytest.approx(30 / 42)
    assert found["most_score_difference"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="2 masks against 1 for the same prompts"):
        agreement.same_prompts(theirs, ours[:1])


def test_everything_is_compared_whatever_its_order(load_benchmark):
    agreement = load_benchmark("mask_agreement")
    made = spots((0, 0), (5, 5), (14, 24), (0, 20))
    theirs = np.asarray(agreement.MaskSet.of_records(records(made[:3], [0.5, 0.6, 0.7])))
    ours = np.asarray(agreement.MaskSet.of_records(records(made[:0:-1], [0.1, 0.75, 0.6])))
    found = agreement.same_things(theirs, ours)
    assert (found["theirs"], found["ours"]) == (3, 3)
    assert (found["theirs_alone"], found["ours_alone"]) == (1, 1)
    assert found["least_iou"] == 0
    assert found["most_score_difference"] == pytest.approx(0.05)
    assert found["most_stability_difference"] == pytest.approx(0.025)
    none = agreement.same_things(theirs, np.asarray(agreement.MaskSet.of_records([])))
    assert (none["theirs_alone"], none["ours_alone"], none["least_iou"]) == (3, 0, None)


def test_prompts_lie_in_the_image(load_benchmark):
    prompts = list(load_benchmark("segmenters").prompts_of(100, 300))
    for prompt in prompts:
        points = prompt.get("point_coords", np.zeros((0, 2)))
        assert (points < [300, 100]).all()
        if "box" in prompt:
            x0, y0, x1, y1 = prompt["box"]
            assert 0 <= x0 < x1 < 300
            assert 0 <= y0 < y1 < 100
    assert len(prompts) == 9 + 3 + 6


def a_case(things=None):
    row = {
        "name": "tinyvit", "seconds": {"median": 2.0, "lower": 1.5, "upper": 2.5},
        "rounds": [2.0], "peak_memory": 500_000_000,
        "times_as_fast": {"mobile_sam": {"median": 11.0, "lower": 1.0, "upper": 1.0}},
        "prompts": {"masks": 30, "least_iou": 0.9995, "most_score_difference": 2e-5},
        "everything": things or {
            "theirs": 40, "ours": 41, "least_iou": 0.99, "theirs_alone": 0, "ours_alone": 1,
            "most_score_difference": 3e-6, "most_stability_difference": 1e-4,
        },
    }  # fmt: skip
    return {
        "weights": "starter", "variant": "tiny_vit_2m_sam", "size": 256, "picture": "coffee.png",
        "image_size": [400, 600], "arguments": {"points_per_side": 32}, "rounds": 3, "threads": 2,
        "machine": {"cpu": "A", "cores": 2, "os": "Linux", "torch": "2.13.0", "date": "today"},
        "command": "python benchmarks/everything.py", "compared_with": "mobile_sam",
        "baselines": ["mobile_sam"], "contestants": [row],
        "left_out": [{"name": "other", "reason": "not here"}],
    }  # fmt: skip


def test_a_case_becomes_a_table(load_benchmark):
    text = load_benchmark("everything_report").markdown(a_case())
    for words in (
        "## starter (tiny_vit_2m_sam, 256 px), coffee.png 600x400",
        "- points_per_side=32\n",
        "- A, 2, Linux; threads: 2; 3 rounds; today",
        "| tinyvit | 2 | 1.5-2.5 | 11.0 | 500 | 41 | 0.9900 | 0 + 1 | 3.0e-06 | 0.9995 | 2.0e-05 |",
        "Left out other: not here",
    ):
        assert words in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


def test_a_case_without_masks(load_benchmark):
    none = {"theirs": 0, "ours": 0, "least_iou": None, "theirs_alone": 0, "ours_alone": 0}
    assert "| 0 | - | 0 + 0 |" in load_benchmark("everything_report").markdown(a_case(none))


def test_cases_stay_until_measured_again(load_benchmark, tmp_path):
    report = load_benchmark("everything_report")
    assert report.read(tmp_path) == []
    report.write(tmp_path, [a_case()])
    other = {**a_case(), "arguments": {"points_per_side": 16}}
    cases = report.merge(report.read(tmp_path), [other, {**a_case(), "rounds": 9}])
    assert [case["rounds"] for case in cases] == [9, 3]
    report.write(tmp_path, cases)
    assert json.loads((tmp_path / "everything.json").read_text())["cases"] == cases
    assert (tmp_path / "everything.md").read_text().count("\n## ") == 2


def test_weights_of_a_whole_sam(load_benchmark, tmp_path):
    from tinyvit.checkpoints import read_state_dict

    weights = load_benchmark("sam_weights")
    weights.write_weights(tmp_path, "starter", [])
    state = read_state_dict(tmp_path / "sam.safetensors").tensors
    assert {key.split(".")[0] for key in state} == {
        "image_encoder",
        "prompt_encoder",
        "mask_decoder",
    }
    with pytest.raises(ValueError, match="unknown weights 'big'; there are starter, 5m"):
        weights.write_weights(tmp_path, "big", [])
