import json

import numpy as np
import pytest
import torch

from tinyvit.evaluate.agreement import compare
from tinyvit.sam.model import build_sam
from tinyvit.sam.predictor import SamPredictor

from .segmenting import Discs


def test_a_model_agrees_with_itself():
    predictor = SamPredictor.from_checkpoint()
    found = compare(predictor, predictor, [Discs().load()[0]], grid=2)
    assert found.mean_cosine == pytest.approx(1)
    assert found.least_cosine == pytest.approx(1)
    assert (found.mean_iou, found.least_iou) == (1, 1)
    assert len(found.images[0].ious) == 4
    assert found.names == ("first", "second")
    assert json.loads(found.to_json())["mean_iou"] == 1


def test_other_weights_agree_less():
    sam = build_sam("tinyvit_sam_2m")
    with torch.no_grad():
        for parameter in sam.image_encoder.parameters():
            parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    images = [Discs().load()[0]]
    found = compare(SamPredictor.from_checkpoint(), SamPredictor(sam), images, grid=3)
    assert found.least_cosine <= found.mean_cosine < 0.99
    assert found.mean_iou < 0.99
    assert [row[0] for row in found.rows()][1:3] == ["cosine", "mask IoU"]


def test_embeddings_of_different_shapes_have_no_cosine():
    sides = [SamPredictor(build_sam("tinyvit_sam_2m", img_size=size)) for size in (256, 128)]
    found = compare(*sides, [Discs().load()[0]], grid=1, names=("large", "small"))
    assert found.mean_cosine is None
    assert found.rows()[1][0] == "mask IoU"
    assert found.rows()[2][:2] == ("clicks, each side's best mask", "1")


def test_broken_images_are_named(tmp_path):
    predictor = SamPredictor.from_checkpoint()
    (tmp_path / "bad.png").write_bytes(b"bad")
    good = np.zeros((20, 20, 3), np.uint8)
    found = compare(predictor, predictor, [tmp_path / "bad.png", good], grid=1)
    assert "bad.png" in found.skipped[0]
    assert [one.image for one in found.images] == ["image 1"]
    with pytest.raises(ValueError, match=r"no image could be compared: .*bad.png"):
        compare(predictor, predictor, [tmp_path / "bad.png"])
    with pytest.raises(ValueError, match="grid must be at least 1"):
        compare(predictor, predictor, [good], grid=0)
