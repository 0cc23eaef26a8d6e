"""Segmenter against SamPredictor, and Masks."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvit.errors import CheckpointError, ImageError
from tinyvit.image_spec import ImageSpec
from tinyvit.sam.embedding import ImageEmbedding
from tinyvit.sam.predictor import SamPredictor
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Masks, Segmenter
from tinyvit.sam.upscale import upscale

HEIGHT, WIDTH = 48, 64
ROUNDING = 1e-5  # one prompt or eight in a product: fp32 sums in another order


def mixture(is_padded):
    """Prompts of every kind, in no order; without padding there are fewer low-res logits."""
    rows = 16 if is_padded else HEIGHT // 4
    logits = np.linspace(-5, 5, rows * 16, dtype=np.float32).reshape(rows, 16)
    return [
        Prompt([[20, 30]]),
        Prompt(box=[5, 8, 50, 40]),
        Prompt([[20, 30], [40, 10]], [1, 0]),
        Prompt([[1, 2]]),
        Prompt([[20, 30]], box=[5, 8, 50, 40]),
        Prompt([[20, 30]], mask=logits),
        Prompt(mask=logits),
        Prompt(box=[0, 0, 64, 48]),
        Prompt([[64, 48]], [0]),
        Prompt(mask=np.eye(HEIGHT, WIDTH, dtype=bool)),
    ]


def only(found):
    (masks,) = found
    return masks


def by_predictor(predictor, prompt, multimask):
    return predictor.predict(
        prompt.points, prompt.labels, prompt.box, prompt.mask, multimask_output=multimask
    )


def assert_same(masks, number, wanted):
    """One prompt's answer against what ``SamPredictor`` says."""
    binary, scores, low_res = wanted
    np.testing.assert_allclose(masks.low_res_logits[number], low_res, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(masks.predicted_ious[number], scores, rtol=0, atol=ROUNDING)
    for token, mask in enumerate(binary):
        # only logits within rounding of 0 may fall on the other side
        assert (masks.mask(number, token) != mask).mean() < 0.001


@pytest.mark.parametrize("multimask", [True, False, "auto"])
@pytest.mark.parametrize("is_hq", [False, True])
@pytest.mark.parametrize("pad", [None, False])
def test_each_answer_is_the_one_it_would_get_alone(make_tiny_sam, photo, multimask, is_hq, pad):
    sam, image = make_tiny_sam(is_hq=is_hq), photo(HEIGHT, WIDTH)
    prompts = mixture(is_padded=pad is None)
    masks = only(Segmenter(sam, pad=pad).segment(image, [prompts], multimask))
    predictor = SamPredictor(sam, pad=pad)
    predictor.set_image(image)
    assert len(masks) == len(prompts)
    for number, prompt in enumerate(prompts):
        many = prompt.kind == (1, False, False) if multimask == "auto" else multimask
        assert_same(masks, number, by_predictor(predictor, prompt, many))
        assert masks.prompts[number] is prompt
        assert len(masks.predicted_ious[number]) == (3 if many and not is_hq else 1)


point = st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT))
points = st.lists(point, min_size=1, max_size=3)


@st.composite
def prompt(draw):
    coords = draw(points)
    labels = draw(st.lists(st.integers(0, 1), min_size=len(coords), max_size=len(coords)))
    box = draw(st.none() | st.sampled_from([(0, 0, 10, 10), (3.5, 4, 64, 48), (10, 20, 11, 47)]))
    return Prompt(coords, labels, box)


@settings(max_examples=8)
@given(prompts=st.lists(prompt(), max_size=6))
def test_the_order_and_the_company_do_not_matter(make_tiny_sam, photo, prompts):
    segmenter = Segmenter(make_tiny_sam())
    embedding = only(segmenter.embed(photo(HEIGHT, WIDTH)))
    together = only(segmenter.segment(embedding, [prompts]))
    for number, one in enumerate(prompts):
        alone = only(segmenter.segment(embedding, [[one]]))
        for here, there in (
            (together.low_res_logits[number], alone.low_res_logits[0]),
            (together.predicted_ious[number], alone.predicted_ious[0]),
        ):
            np.testing.assert_allclose(here, there, rtol=0, atol=ROUNDING)


def test_many_images_each_with_prompts_of_its_own(make_tiny_sam, photo):
    sam = make_tiny_sam()
    images = [photo(HEIGHT, WIDTH), photo(20, 30), photo(HEIGHT, WIDTH, seed=1)]
    prompts = [[Prompt([[10, 10]])], [], [Prompt(box=[0, 0, 9, 9]), Prompt([[3, 4]])]]
    found = list(Segmenter(sam, batch_size=2).segment(iter(images), iter(prompts)))
    assert [len(masks) for masks in found] == [1, 0, 2]
    assert [masks.shape[2:] for masks in found] == [(48, 64), (20, 30), (48, 64)]
    predictor = SamPredictor(sam)
    predictor.set_image(images[2])
    low_res = by_predictor(predictor, prompts[2][0], False)[2]
    # the encoder, too, has images in batches of another size here
    np.testing.assert_allclose(found[2].low_res_logits[0], low_res, atol=1e-4)


def test_dictionaries_are_prompts(make_tiny_sam, photo):
    segmenter = Segmenter(make_tiny_sam())
    image = photo(HEIGHT, WIDTH)
    named = only(segmenter.segment([image], [[{"points": [[20, 30]], "name": "cat"}]]))
    assert named.prompts[0].name == "cat"
    assert isinstance(named, Masks)


def test_embeddings_are_segmented_elsewhere(make_tiny_sam, photo, tmp_path):
    images = [photo(HEIGHT, WIDTH), photo(20, 30)]
    prompts = [[Prompt([[10, 10]])], [Prompt(box=[0, 0, 9, 9])]]
    segmenter = Segmenter(make_tiny_sam())
    paths = [
        embedding.save(tmp_path / f"{i}.safetensors")
        for i, embedding in enumerate(segmenter.embed(images))
    ]
    other = Segmenter(make_tiny_sam())
    found = list(other.segment((ImageEmbedding.load(path) for path in paths), prompts))
    for masks, wanted in zip(found, segmenter.segment(images, prompts), strict=True):
        np.testing.assert_array_equal(masks.low_res_logits[0], wanted.low_res_logits[0])
    with pytest.raises(ValueError, match="made by an encoder with weights"):
        list(Segmenter(make_tiny_sam(seed=4)).segment(segmenter.embed(images), prompts))


def test_alternating_images_are_prepared_once(make_tiny_sam, photo):
    segmenter = Segmenter(make_tiny_sam())
    embeddings = list(segmenter.embed([photo(HEIGHT, WIDTH), photo(20, 30)]))
    prompts = [Prompt([[10, 10]]), {"box": [0, 0, 9, 9]}]
    wanted = list(segmenter.segment(embeddings, [prompts, prompts]))
    prepared = [segmenter.prepare(embedding) for embedding in embeddings]
    assert all(one.nbytes > embeddings[0].features.nbytes for one in prepared)
    for i in (0, 1, 0):
        found = segmenter.predict(embeddings[i], prompts, prepared=prepared[i])
        once = segmenter.predict(embeddings[i], prompts)
        for mine, same, other in zip(
            found.low_res_logits, once.low_res_logits, wanted[i].low_res_logits, strict=True
        ):
            np.testing.assert_array_equal(mine, other)
            np.testing.assert_array_equal(same, other)
    other = Segmenter(make_tiny_sam(seed=4))
    for call in (other.prepare, lambda embedding: other.predict(embedding, prompts)):
        with pytest.raises(ValueError, match="made by an encoder with weights"):
            call(embeddings[0])


def test_new_weights_are_used(make_tiny_sam, photo):
    sam, image = make_tiny_sam(), photo(HEIGHT, WIDTH)
    segmenter, prompts = Segmenter(sam), [[Prompt([[10, 10]])]]
    before = only(segmenter.segment(image, prompts)).low_res_logits[0]
    embedding = only(segmenter.embed(image))
    sam.load_state_dict(make_tiny_sam(seed=9).state_dict())
    after = only(segmenter.segment(image, prompts)).low_res_logits[0]
    fresh = only(Segmenter(make_tiny_sam(seed=9)).segment(image, prompts)).low_res_logits[0]
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, fresh, atol=ROUNDING)
    with pytest.raises(ValueError, match="made by an encoder with weights"):
        list(segmenter.segment(embedding, prompts))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_the_thinnest_images_will_do(make_tiny_sam, photo, size):
    everything = Prompt([[0.5, 0.5]], box=[0, 0, size[1], size[0]], mask=np.ones(size, bool))
    for pad in (None, False):
        masks = only(Segmenter(make_tiny_sam(), pad=pad).segment(photo(*size), [[everything]]))
        assert masks.mask(0).shape == size


def test_threads_may_share_it(make_tiny_sam, photo):
    segmenter, found = Segmenter(make_tiny_sam()), {}
    prompts = [[Prompt([[10, 10]]), Prompt(box=[0, 0, 9, 9])]]

    def work(seed):
        found[seed] = only(segmenter.segment(photo(HEIGHT, WIDTH, seed), prompts))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, masks in found.items():
        wanted = only(segmenter.segment(photo(HEIGHT, WIDTH, seed), prompts))
        for here, there in zip(masks.low_res_logits, wanted.low_res_logits, strict=True):
            np.testing.assert_allclose(here, there, atol=ROUNDING)
    assert len(found) == 4


@pytest.mark.parametrize(
    "prompts, kind, words",
    [
        ([[Prompt([[65, 1]])]], ValueError, "prompt 0 of image 0: point 0 at .* outside"),
        (
            [[Prompt([[1, 1]]), {"points": [[1, 1]], "labels": [2]}]],
            ValueError,
            "prompt 1 of image 0: labels of points",
        ),
        ([[Prompt(mask=np.zeros((8, 8)))]], ValueError, "prompt 0 of image 0: a mask prompt"),
        ([[{"pts": 1}]], ValueError, "prompt 0 of image 0: a prompt has the keys"),
        ([[[1, 2]]], TypeError, "prompt 0 of image 0: wanted a Prompt or a dictionary"),
        ([Prompt([[1, 1]])], TypeError, "of image 0 must be a list of prompts, came Prompt"),
        ([{"points": [[1, 1]]}], TypeError, "of image 0 must be a list of prompts, came dict"),
        ([], ValueError, "image 0 has no list of prompts: there are only 0 lists"),
        ([[], []], ValueError, "more lists of prompts than the 1 images"),
    ],
)
def test_wrong_prompts_say_where_they_are(make_tiny_sam, photo, prompts, kind, words):
    with pytest.raises(kind, match=words):
        list(Segmenter(make_tiny_sam()).segment([photo(HEIGHT, WIDTH)], prompts))


def test_wrong_calls_say_what_was_wanted(make_tiny_sam, photo, tmp_path):
    segmenter, image = Segmenter(make_tiny_sam()), photo(HEIGHT, WIDTH)
    embedding = only(segmenter.embed(image))
    with pytest.raises(ValueError, match="multimask must be True, False or 'auto', came 'best'"):
        segmenter.segment(image, [[]], "best")
    with pytest.raises(TypeError, match="one list of prompts for each image, came one prompt"):
        segmenter.segment(image, Prompt([[1, 1]]))
    with pytest.raises(TypeError, match="after embeddings came a ndarray"):
        list(segmenter.segment([embedding, image], [[], []]))
    with pytest.raises(TypeError, match="after images came an ImageEmbedding"):
        list(segmenter.segment([image, embedding], [[], []]))
    with pytest.raises(ImageError, match="there is no file"):
        list(segmenter.segment([tmp_path / "none.png"], [[]]))
    with pytest.raises(CheckpointError):
        Segmenter(tmp_path / "none.pt")


def test_no_images_have_no_masks(make_tiny_sam):
    assert list(Segmenter(make_tiny_sam()).segment([], [])) == []
    with pytest.raises(ValueError, match="more lists of prompts than the 0 images"):
        list(Segmenter(make_tiny_sam()).segment([], [[]]))


def test_a_bad_image_comes_after_the_good_ones(make_tiny_sam, photo, tmp_path):
    found = []
    stream = Segmenter(make_tiny_sam(), batch_size=1).segment(
        [photo(20, 20), tmp_path / "none.png"], [[Prompt([[1, 1]])], []]
    )
    with pytest.raises(ImageError, match="there is no file"):
        for masks in stream:
            found.append(masks)
    assert len(found) <= 1


def test_the_embedded_weights_are_the_default(photo):
    masks = only(Segmenter(device="cpu").segment(photo(HEIGHT, WIDTH), [[Prompt([[10, 10]])]]))
    assert masks.shape == (1, 3, HEIGHT, WIDTH)


PLACEMENT = ImageSpec.sam(64).place(32, 64)
STRIDE = 4.0


def block(top, bottom, left, right, size=16):
    """Logits of a block of cells: +6 in it, -6 elsewhere."""
    logits = np.full((size, size), -6.0, np.float32)
    logits[top:bottom, left:right] = 6.0
    return logits


EMPTY = np.full((16, 16), -6.0, np.float32)
LOW_RES = (
    np.stack([block(0, 2, 0, 4), block(2, 6, 4, 12), EMPTY]),
    block(0, 8, 0, 16)[None],
    EMPTY[None],
)
IOUS = tuple(np.array(v, np.float32) for v in ([0.5, 0.9, 0.1], [0.7], [0.2]))


@pytest.fixture
def masks():
    prompts = Prompt([[1, 2]], name="cat"), Prompt(box=[0, 0, 3, 4]), Prompt([[1, 2], [3, 4]])
    return Masks(prompts, LOW_RES, IOUS, PLACEMENT, STRIDE)


def test_scores_of_masks_that_a_prompt_does_not_have_are_nan(masks):
    assert masks.shape == (3, 3, 32, 64)
    assert len(masks) == 3
    nan = np.nan
    wanted = np.array([[0.5, 0.9, 0.1], [0.7, nan, nan], [0.2, nan, nan]], np.float32)
    np.testing.assert_array_equal(masks.scores, wanted)
    assert masks.best().tolist() == [1, 0, 0]
    assert "3 prompts, up to 3 masks each, image 32x64" in repr(masks)


def test_a_mask_is_its_logits_above_the_threshold(masks):
    for prompt, token in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0)):
        wanted = upscale(LOW_RES[prompt][token], PLACEMENT)
        np.testing.assert_array_equal(masks.logits(prompt, token), wanted)
        np.testing.assert_array_equal(masks.mask(prompt, token), wanted > 0)
    strict = Masks(masks.prompts, LOW_RES, IOUS, PLACEMENT, STRIDE, threshold=3.0)
    np.testing.assert_array_equal(strict.mask(0), strict.logits(0) > 3)


def test_the_best_is_what_comes_when_nothing_else_is_said(masks):
    np.testing.assert_array_equal(masks.mask(0), masks.mask(0, 1))
    for number, mask in enumerate(masks):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, masks.mask(number))


def test_all_at_once(masks):
    found = masks.to_numpy()
    assert found.shape == (3, 3, 32, 64)
    np.testing.assert_array_equal(found[0, 1], masks.mask(0))
    np.testing.assert_array_equal(found[1, 0], masks.mask(1))
    assert not found[1, 1:].any()


def test_boxes_are_around_the_best(masks):
    # cells are 4 pixels and the logits of neighbours are each other's negative, so that an edge
    # lies exactly between two cells; the image ends at row 32
    assert masks.boxes.tolist() == [[16, 8, 48, 24], [0, 0, 64, 32], [0, 0, 0, 0]]


def test_coco_has_what_its_tools_read(masks):
    annotations = masks.to_coco(image_id=7, category_id=3)
    assert json.loads(json.dumps(annotations)) == annotations
    first = annotations[0]
    assert first["image_id"] == 7
    assert first["category_id"] == 3
    assert first["bbox"] == [16, 8, 32, 16]
    assert first["area"] == masks.mask(0).sum() == 32 * 16 - 4  # bilinear rounds the corners
    assert first["score"] == first["predicted_iou"] == pytest.approx(0.9)
    assert first["iscrowd"] == 0
    assert first["prompt"] == {"points": [[1, 2]], "labels": [1], "name": "cat"}
    assert first["segmentation"]["size"] == [32, 64]
    assert isinstance(first["segmentation"]["counts"], str)
    assert annotations[2]["bbox"] == [0, 0, 0, 0]
    assert annotations[2]["area"] == 0


def test_no_prompts_have_no_masks():
    masks = Masks((), (), (), PLACEMENT, STRIDE)
    assert masks.shape == (0, 0, 32, 64)
    assert masks.scores.shape == (0, 0)
    assert masks.boxes.shape == (0, 4)
    assert masks.best().shape == (0,)
    assert masks.to_numpy().shape == (0, 0, 32, 64)
    assert masks.to_coco(1) == list(masks) == []


def test_what_is_not_there(masks):
    with pytest.raises(IndexError, match="there are 3 prompts; there is no prompt 3"):
        masks.mask(3)
    with pytest.raises(IndexError, match="prompt 1 has 1 masks; there is no mask 1"):
        masks.mask(1, 1)
    assert np.array_equal(masks.mask(-2), masks.mask(1))


def test_the_older_name_of_the_stride(masks):
    assert masks.pitch == masks.logit_stride == STRIDE
