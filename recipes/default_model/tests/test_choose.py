import json

import numpy as np
import pytest

import composites
import regions
from tinyvit.sam import SamPredictor

from .recipe_files import load

choose = load("choose")


def said(count=200, seed=0):
    """A model whose second mask is best, though it thinks .06 less of it than of the third."""
    rng = np.random.default_rng(seed)
    ious = np.stack([rng.uniform(0.1, 0.4, count), rng.uniform(0.6, 0.9, count)], 1)
    ious = np.column_stack((ious, rng.uniform(0.4, 0.6, count)))
    scores = np.tile([0.3, 0.54, 0.6], (count, 1)) + rng.normal(0, 0.001, (count, 3))
    box = rng.uniform(0.5, 0.9, count)
    return choose.Answers(scores, ious, np.tile([0.2, 0.9, 0.5], (count, 1)), box - 0.1, box)


def test_offsets_make_the_best_mask_win_and_the_score_true_on_average():
    found = said()
    single, *added = choose.choose_offsets(found)
    assert single == pytest.approx(0.1, abs=1e-4)
    assert added[1] - added[2] >= 0.06
    before, after = choose.quality(found, np.zeros(3)), choose.quality(found, np.array(added))
    assert before[1] < 0.1 and after[1] > 0.95 and after[0] > before[0] + 0.2
    scores = found.click_scores + added
    assert scores.max(1).mean() == pytest.approx(found.click_ious[:, 1].mean(), abs=1e-3)


def test_no_offset_is_chosen_where_none_helps():
    found = said()
    good = choose.Answers(
        found.click_ious, found.click_ious, found.stabilities, *[found.box_ious] * 2
    )
    assert choose.choose_offsets(good) == (0, 0, 0, 0)


def test_thresholds_let_most_good_masks_through():
    found = said()
    levels = choose.choose_thresholds(found, np.zeros(3))
    good = found.click_ious >= choose.GOOD
    share = (found.click_scores[good] >= levels["pred_iou_thresh"] - 0.005).mean()
    assert share > 0.8 and levels["stability_score_thresh"] == 0.9
    bad = choose.Answers(found.click_scores, found.click_ious * 0.1, *[found.box_ious] * 3)
    assert choose.choose_thresholds(bad, np.zeros(3)) == {}


def test_what_is_chosen_is_written(tmp_path, make_supply, tiny_sam_file):
    pytest.importorskip("skimage")
    work = make_supply(tmp_path)
    regions.build(work)
    stages = tmp_path / "stages.toml"
    stages.write_text("[learn]\n")
    with pytest.raises(ValueError, match="learn has no weights; the step 'train' makes them"):
        choose.build(work, stages, work / "chosen.json", 4)
    folder = work / "runs" / "learn"
    folder.mkdir(parents=True)
    for name in ("best", "last"):
        (folder / f"{name}.safetensors").write_bytes(tiny_sam_file.read_bytes())
    chosen = choose.build(work, stages, work / "chosen.json", 4)
    assert json.loads((work / "chosen.json").read_text())["weights"] == chosen.weights
    assert chosen.weights == "runs/learn/best.safetensors"
    assert set(chosen.mean_ious) == {"best", "last"} and len(chosen.offsets) == 4


def test_a_mask_of_probabilities_is_what_is_above_a_half(tmp_path, make_supply, tiny_sam_file):
    things = composites.CompositeSet(make_supply(tmp_path), "val", size=64, things=1.0)[:2]
    assert all(one.load()[1].dtype == np.float32 for one in things)

    class Hard:
        def __init__(self, soft):
            self.soft = soft

        def load(self):
            image, masks = self.soft.load()
            return image, masks > 0.5

    predictor = SamPredictor.from_checkpoint(tiny_sam_file)
    soft, hard = (choose.answers(predictor, some, 2) for some in (things, map(Hard, things)))
    for one, other in zip(choose._parts(soft), choose._parts(hard), strict=True):
        assert len(one) == 2 and (one == other).all()
    assert (soft.click_ious < 1).all()


def test_things_have_a_say_in_the_offsets(tmp_path, make_supply, tiny_sam_file, monkeypatch):
    pytest.importorskip("skimage")
    work, seen = make_supply(tmp_path), []
    regions.build(work)
    folder = work / "runs" / "learn"
    folder.mkdir(parents=True)
    (folder / "last.safetensors").write_bytes(tiny_sam_file.read_bytes())
    stages = tmp_path / "stages.toml"
    stages.write_text("[learn]\n")

    def answers(predictor, images, most_masks):
        seen.append({label for one in images for label in one.labels})
        return said(10)

    monkeypatch.setattr(choose, "answers", answers)
    choose.build(work, stages, work / "chosen.json", 4)
    assert len(seen) == 3 and seen[1:] == [{"region"}, {"thing"}]
