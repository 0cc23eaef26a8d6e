"""What segment-anything's README shows, with nothing changed but the import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IMAGE = next((Path(__file__).parents[2] / "examples" / "pictures").glob("*.jpg"))


@pytest.fixture
def image():
    with Image.open(IMAGE) as opened:
        return np.array(opened.convert("RGB").resize((320, 240)))


def test_masks_from_a_prompt(image):
    from tinyvit.sam import SamPredictor, sam_model_registry

    sam = sam_model_registry["default"](checkpoint="tinyvit_sam_2m")
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    masks, scores, logits = predictor.predict(np.array([[160, 120]]), np.array([1]))

    assert (masks.shape, masks.dtype) == ((3, 240, 320), np.bool_)
    assert (scores.shape, scores.dtype) == ((3,), np.float32)
    assert (logits.shape, logits.dtype) == ((3, 64, 64), np.float32)


def test_the_steps_of_the_predictor_notebook(image):
    from tinyvit.sam import SamPredictor, sam_model_registry

    sam = sam_model_registry["default"]()
    sam.to(device="cpu")
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    input_point = np.array([[160, 120], [200, 100]])
    input_label = np.array([1, 0])
    masks, scores, logits = predictor.predict(
        point_coords=input_point, point_labels=input_label, multimask_output=True
    )
    mask_input = logits[np.argmax(scores), :, :]
    masks, _, _ = predictor.predict(
        point_coords=input_point,
        point_labels=input_label,
        mask_input=mask_input[None, :, :],
        multimask_output=False,
    )
    assert masks.shape == (1, 240, 320)

    import torch

    input_boxes = torch.tensor([[50, 60, 200, 200], [10, 10, 300, 230]], device=predictor.device)
    transformed_boxes = predictor.transform.apply_boxes_torch(input_boxes, image.shape[:2])
    masks, _, _ = predictor.predict_torch(
        point_coords=None, point_labels=None, boxes=transformed_boxes, multimask_output=False
    )
    assert masks.shape == (2, 1, 240, 320)

    transform = predictor.transform
    batched_input = [
        {
            "image": torch.as_tensor(transform.apply_image(image)).permute(2, 0, 1).contiguous(),
            "boxes": transformed_boxes,
            "original_size": image.shape[:2],
        }
    ]
    batched_output = sam(batched_input, multimask_output=False)
    assert batched_output[0]["masks"].shape == (2, 1, 240, 320)
    # logits within rounding of 0 may fall on the other side
    assert (batched_output[0]["masks"] != masks).float().mean() < 0.001


def test_masks_of_everything(image):
    from tinyvit.sam import SamAutomaticMaskGenerator, sam_model_registry

    sam = sam_model_registry["default"](checkpoint="tinyvit_sam_2m")
    mask_generator = SamAutomaticMaskGenerator(
        sam, points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.5
    )
    masks = mask_generator.generate(image)

    keys = {"segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score"}
    assert isinstance(masks, list)
    for record in masks:
        assert set(record) == {*keys, "crop_box"}
        assert record["segmentation"].shape == (240, 320)
        assert record["area"] == record["segmentation"].sum()
