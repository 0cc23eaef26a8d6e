from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tinyvit.folders.images import ImageFile
from tinyvit.folders.segment import Reading, Settings, Task, by_grid, by_prompts, recipe
from tinyvit.sam import Prompt, SamAutomaticMaskGenerator, SamPredictor
from tinyvit.sam import mask_ops as rle

POINT = Prompt(points=[[20, 10]])
BOX = Prompt(box=[5, 5, 30, 20], name="thing")


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


@pytest.fixture
def answers_of(tmp_path):
    """``answers_of(method, [(image, prompts), ...])``: annotations with masks, and answers."""

    def call(method, work):
        readings = []
        for number, (image, prompts) in enumerate(work):
            file = ImageFile(tmp_path / f"{number}.png", f"{number}.png", f"{number}")
            names = method.names(tmp_path, file.stem, prompts)
            task = Task(file, prompts, names, {}, None)
            readings.append(Reading(task, image, method.prepare(image), {}))
        return [(list(answer.annotations), answer) for answer in method.answers(iter(readings))]

    return call


def test_masks_are_the_predictor_s(make_tiny_sam, image, answers_of):
    sam = make_tiny_sam()
    method = by_prompts(sam, Settings(), multimask=False, with_logits=True)
    ((annotations, answer),) = answers_of(method, [(image, (POINT, BOX))])
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    masks, scores, low_res = predictor.predict(np.array([[20, 10]]), np.array([1]))
    best = int(scores.argmax())
    annotation, mask = annotations[0]
    np.testing.assert_array_equal(mask, masks[best])
    np.testing.assert_allclose(annotation["score"], scores[best], atol=1e-5)  # other batch
    np.testing.assert_allclose(answer.logits[0], low_res[best], atol=1e-4)
    of_box, _, _ = predictor.predict(box=np.array([5, 5, 30, 20]), multimask_output=False)
    np.testing.assert_array_equal(annotations[1][1], of_box[0])
    assert set(answer.reading.seconds) == {"encode", "decode"}
    assert all(value > 0 for value in answer.reading.seconds.values())


def test_an_annotation_says_all(make_tiny_sam, image, answers_of):
    method = by_prompts(make_tiny_sam(), Settings(), multimask=False, with_logits=False)
    ((annotations, answer),) = answers_of(method, [(image, (POINT, BOX))])
    annotation, mask = annotations[1]
    rows, columns = np.nonzero(mask)
    left, top = columns.min(), rows.min()
    assert annotation == {
        **{"image_id": 1, "category_id": 1, "iscrowd": 0, "object": 2},
        "segmentation": rle.encode(mask),
        "bbox": [left, top, columns.max() + 1 - left, rows.max() + 1 - top],
        "area": int(mask.sum()),
        "score": annotation["score"],
        "prompt": {"box": [5, 5, 30, 20], "name": "thing"},
    }
    assert answer.logits == []
    json.dumps(annotations[0][0])


def test_multimask_gives_three_of_each_and_names_for_them(
    make_tiny_sam, image, answers_of, tmp_path
):
    method = by_prompts(make_tiny_sam(), Settings(), multimask=True, with_logits=True)
    ((annotations, answer),) = answers_of(method, [(image, (POINT, BOX))])
    fields = [one for one, _ in annotations]
    assert [(one["object"], one["candidate"]) for one in fields] == [
        *((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
    ]
    assert sum(one["is_best"] for one in fields) == 2
    for number in (1, 2):
        scores = [one["score"] for one in fields if one["object"] == number]
        best = [one["score"] for one in fields if one["object"] == number and one["is_best"]]
        assert best == [max(scores)]
    assert len(answer.logits) == 2
    assert len(answer.reading.task.names.masks) == 6


def test_light_hq_sam_gives_one(make_tiny_sam, image, answers_of):
    method = by_prompts(make_tiny_sam(is_hq=True), Settings(), multimask=True, with_logits=False)
    ((annotations, answer),) = answers_of(method, [(image, (POINT,))])
    assert len(annotations) == len(answer.reading.task.names.masks) == 1
    assert "candidate" not in annotations[0][0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_change_no_mask_and_keep_the_order(make_tiny_sam, answers_of, batch_size):
    method = by_prompts(make_tiny_sam(), Settings(batch_size=batch_size), False, False)
    noise = np.random.default_rng(1).integers(0, 256, (5, 24, 40, 3), np.uint8)
    together = answers_of(method, [(one, (POINT,)) for one in noise])
    assert [a.reading.task.image.stem for _, a in together] == list("01234")
    for image, (found, _) in zip(noise, together, strict=True):
        ((alone, _),) = answers_of(method, [(image, (POINT,))])
        assert alone[0][0]["segmentation"] == found[0][0]["segmentation"]


def test_a_prompt_that_does_not_fit_is_a_failure_and_the_next_image_goes_on(
    make_tiny_sam, image, answers_of
):
    method = by_prompts(make_tiny_sam(), Settings(), False, False)
    outside = Prompt(points=[[10, 30]])
    wrong_mask = Prompt(mask=np.ones((3, 3), bool))
    first, second, third = answers_of(
        method, [(image, (POINT, outside)), (image, (wrong_mask,)), (image, (POINT,))]
    )
    assert first[1].failure.startswith("object 2: point 0 at (x, y) = (10, 30) lies outside")
    assert second[1].failure.startswith("a mask prompt must be a bool mask of the image")
    assert first[0] == second[0] == []
    assert third[1].failure == ""
    assert len(third[0]) == 1


def test_features_that_are_not_finite(make_tiny_sam, image, answers_of):
    sam = make_tiny_sam(seed=3)
    with torch.no_grad():
        for parameter in sam.image_encoder.neck.parameters():
            parameter.fill_(float("nan"))
    ((_, answer),) = answers_of(by_prompts(sam, Settings(), False, False), [(image, (POINT,))])
    assert answer.failure == "its features are not all finite numbers; try --precision fp32"


def test_everything_is_the_generator_s(make_tiny_sam, image, answers_of):
    sam, told = make_tiny_sam(), []

    @contextmanager
    def progress(name):
        yield lambda done, total: told.append((name, done, total))

    arguments = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": -1.0}
    method = by_grid(sam, Settings(), arguments, progress)
    assert method.facts(()) == {"mode": "everything", **arguments}
    ((annotations, answer),) = answers_of(method, [(image, ())])
    wanted = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **arguments).generate(image)
    assert wanted
    extra = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    assert [one for one, _ in annotations] == [{**extra, **record} for record in wanted]
    assert all(mask is None for _, mask in annotations)
    assert told[-1] == ("0.png", 16, 16)
    assert list(answer.reading.seconds) == ["generate"]
    assert answer.reading.task.names.masks == ()


def test_settings_reach_the_engine(make_tiny_sam):
    settings = Settings(precision="bf16", batch_size=3, pad=False)
    for method in (
        by_prompts(make_tiny_sam(), settings, False, False),
        by_grid(make_tiny_sam(), settings, {}, None),
    ):
        assert method.engine.batch_size == 3
        assert method.engine.image_spec.pad is False
        assert recipe(make_tiny_sam(), method.engine, "x")["precision"] == "bf16"


def test_the_recipe_names_the_whole_model(make_tiny_sam):
    sam = make_tiny_sam()
    engine = by_prompts(sam, Settings(), False, False).engine
    facts = recipe(sam, engine, "name")
    assert facts["made_by"] == "tinyvit segment"
    assert facts["checkpoint"] == "name"
    assert recipe(make_tiny_sam(), engine, "name") == facts
    other = make_tiny_sam()
    with torch.no_grad():  # the decoder counts too
        other.mask_decoder.iou_token.weight += 1
    assert recipe(other, engine, "name")["model_sha256"] != facts["model_sha256"]
    assert json.loads(json.dumps(facts)) == facts


def test_the_facts_tell_masks_apart(make_tiny_sam):
    method = by_prompts(make_tiny_sam(), Settings(), False, False)
    ones, zeros = np.ones((4, 4), bool), np.zeros((4, 4), bool)
    first, second = (method.facts((Prompt(mask=mask),)) for mask in (ones, zeros))
    assert first != second
    assert first == method.facts((Prompt(mask=ones.copy()),))
    assert json.loads(json.dumps(first)) == first
