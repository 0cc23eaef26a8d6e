import numpy as np
import pytest
import torch

from tinyvit.evaluate.segment import PlainPredictor
from tinyvit.sam.build import build_sam
from tinyvit.sam.predictor import SamPredictor


@pytest.mark.parametrize(
    "prompt",
    [
        {"point_coords": np.array([[30, 20]]), "point_labels": np.array([1])},
        {"box": np.array([10, 10, 60, 50]), "multimask_output": False},
    ],
)
def test_it_answers_as_the_predictor_does(prompt):
    sam = build_sam("tinyvit_starter")
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    answers = []
    for predictor in (PlainPredictor(sam), SamPredictor(sam)):
        predictor.set_image(image)
        answers.append(predictor.predict(**prompt))
    (masks, scores, logits), (their_masks, their_scores, their_logits) = answers
    # the predictor's folded copies sum in another order
    np.testing.assert_allclose(logits, their_logits, atol=2e-3)
    np.testing.assert_allclose(scores, their_scores, atol=1e-4)
    assert (masks != their_masks).mean() < 1e-3


def test_it_sees_weights_at_once():
    sam = build_sam("tinyvit_starter")
    predictor = PlainPredictor(sam)
    predictor.set_image(np.zeros((40, 40, 3), np.uint8))
    points = {"point_coords": np.array([[20, 20]]), "point_labels": np.array([1])}
    _, before, _ = predictor.predict(**points)
    with torch.no_grad():
        sam.mask_decoder.iou_prediction_head.layers[-1].bias.add_(1)
    _, after, _ = predictor.predict(**points)
    np.testing.assert_allclose(after, before + 1, atol=1e-5)


def test_an_image_comes_first():
    predictor = PlainPredictor(build_sam("tinyvit_starter"))
    with pytest.raises(RuntimeError, match="no image is set"):
        predictor.predict(box=np.array([0, 0, 1, 1]))
