"""As others call it: pickled and copied, and inside of autocast."""

import copy
import multiprocessing
import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvit.sam.automatic import SamAutomaticMaskGenerator
from tinyvit.sam.predictor import SamPredictor
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Segmenter

HEIGHT, WIDTH = 48, 64
LENIENT = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
POINTS, LABELS = np.array([[20, 30], [40.5, 10]]), np.array([1, 0])


def only(found):
    (masks,) = found
    return masks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("is_fast", [True, False])
def test_a_copy_of_the_predictor_has_the_image_and_predicts_the_same(
    make_tiny_sam, photo, copied, is_fast
):
    fresh = SamPredictor(make_tiny_sam(), fast=is_fast)
    copied(fresh)  # before anything was derived
    fresh.set_image(photo(48, 64))
    wanted = fresh.predict(POINTS, LABELS)
    other = copied(fresh)
    assert other.model is not fresh.model
    for found, same in zip(other.predict(POINTS, LABELS), wanted, strict=True):
        np.testing.assert_array_equal(found, same)
    with torch.no_grad():  # the copy derives from its own model
        other.model.mask_decoder.mask_tokens.weight.mul_(-1)
    assert np.abs(other.predict(POINTS, LABELS)[2] - wanted[2]).max() > 0.01
    np.testing.assert_array_equal(fresh.predict(POINTS, LABELS)[2], wanted[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_fast", [True, False])
def test_autocast_changes_nothing_of_the_predictor(make_tiny_sam, photo, dtype, is_fast):
    sam, image = make_tiny_sam(), photo(48, 64)
    plain = SamPredictor(sam, fast=is_fast)
    plain.set_image(image)
    wanted = plain.predict(POINTS, LABELS)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        fresh = SamPredictor(sam, fast=is_fast)
        fresh.set_image(image)
        inside = fresh.predict(POINTS, LABELS)
        tensors = fresh.predict_torch(torch.rand(2, 1, 2), torch.ones(2, 1))
    for found in (inside, fresh.predict(POINTS, LABELS)):
        for one, same in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, same)
    assert tensors[1].dtype == tensors[2].dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_segmenter_segments_the_same(make_tiny_sam, photo, copied):
    segmenter, image = Segmenter(make_tiny_sam()), photo(HEIGHT, WIDTH)
    prompts = [[Prompt([[10, 10]]), Prompt(box=[0, 0, 9, 9])]]
    wanted = only(segmenter.segment(image, prompts))
    found = only(copied(segmenter).segment(image, prompts))
    for here, there in zip(found.low_res_logits, wanted.low_res_logits, strict=True):
        np.testing.assert_array_equal(here, there)


def test_reprs_are_one_line(make_tiny_sam, photo):
    """A notebook shows a value by its repr; arrays in it would fill the screen."""
    sam, image = make_tiny_sam(), photo(HEIGHT, WIDTH)
    predictor, segmenter = SamPredictor(sam), Segmenter(sam)
    assert "no image set" in repr(predictor)
    predictor.set_image(image)
    assert "image 48x64" in repr(predictor)
    (embedding,) = segmenter.embed(image)
    assert repr(embedding) == "ImageEmbedding([32, 4, 4], image 48x64)"
    generator = SamAutomaticMaskGenerator(sam, 3)
    assert "9 points" in repr(generator)
    for one in (predictor, segmenter, embedding, generator):
        assert "\n" not in repr(one) and len(repr(one)) < 300
    with Image.open(BytesIO(embedding._repr_png_())) as png:
        assert png.size == (64, 64)


def _predict(arguments):
    predictor, points = arguments
    return predictor.predict(points, LABELS)[2]


def test_a_predictor_works_in_a_spawned_process(make_tiny_sam, photo):
    """``spawn`` is what macOS, Windows and Python from 3.14 on do: all is pickled."""
    predictor = SamPredictor(make_tiny_sam())
    predictor.set_image(photo(HEIGHT, WIDTH))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found,) = pool.map(_predict, [(predictor, POINTS)])
    np.testing.assert_array_equal(found, predictor.predict(POINTS, LABELS)[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_hq", [False, True])
def test_autocast_changes_nothing_of_the_segmenter(make_tiny_sam, photo, dtype, is_hq):
    sam, image, prompts = make_tiny_sam(is_hq=is_hq), photo(HEIGHT, WIDTH), [[Prompt([[10, 10]])]]
    wanted = only(Segmenter(sam).segment(image, prompts))
    with torch.autocast("cpu", dtype):
        inside = Segmenter(sam)
        found = only(inside.segment(image, prompts))
    again = only(inside.segment(image, prompts))
    np.testing.assert_array_equal(found.low_res_logits[0], wanted.low_res_logits[0])
    np.testing.assert_array_equal(again.low_res_logits[0], wanted.low_res_logits[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_everything_mode_generates_the_same(make_tiny_sam, photo, copied):
    generator = SamAutomaticMaskGenerator(make_tiny_sam(), 3, **LENIENT)
    image = photo(40, 64)
    wanted = generator.generate(image)
    found = copied(generator).generate(image)
    assert [one["predicted_iou"] for one in found] == [one["predicted_iou"] for one in wanted]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_of_everything_mode(make_tiny_sam, photo, dtype):
    sam, image = make_tiny_sam(), photo(40, 64)
    wanted = SamAutomaticMaskGenerator(sam, 3, **LENIENT).generate(image)
    with torch.autocast("cpu", dtype):
        found = SamAutomaticMaskGenerator(sam, 3, **LENIENT).generate(image)
    assert [one["predicted_iou"] for one in found] == [one["predicted_iou"] for one in wanted]
