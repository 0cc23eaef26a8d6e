from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tinyvit.errors import CheckpointError, ImageError
from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Engine
from tinyvit.sam.embedding import ImageEmbedding
from tinyvit.sam.model import build_sam
from tinyvit.sam.predictor import SamPredictor

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # the fast forms sum in another order, through all layers
POINTS, LABELS = np.array([[20, 30], [40.5, 10]]), np.array([1, 0])
BOX = np.array([5, 8, 50, 40])


def segment(sam, image, points=None, labels=None, box=None, masks=None, multimask=True):
    """What ``Sam.forward`` predicts, which runs the modules as they are."""
    transform = SamPredictor(sam).transform
    size = image.shape[:2]
    record = {
        "image": torch.from_numpy(transform.apply_image(image)).permute(2, 0, 1),
        "original_size": size,
    }
    if points is not None:
        record["point_coords"] = torch.from_numpy(transform.apply_coords(points, size)).float()[
            None
        ]
        record["point_labels"] = torch.from_numpy(labels)[None]
    if box is not None:
        record["boxes"] = torch.from_numpy(transform.apply_boxes(box, size)).float()
    if masks is not None:
        record["mask_inputs"] = torch.from_numpy(masks)[None]
    return sam([record], multimask)[0]


def assert_same(found, wanted):
    masks, scores, low_res = found
    np.testing.assert_allclose(scores, wanted["iou_predictions"][0], **CLOSE)
    np.testing.assert_allclose(low_res, wanted["low_res_logits"][0], **CLOSE)
    assert masks.shape == wanted["masks"][0].shape
    # only logits within rounding of 0 may fall on the other side
    assert (masks != wanted["masks"][0].numpy()).mean() < 0.002


@pytest.fixture
def predictor(make_tiny_sam, photo):
    predictor = SamPredictor(make_tiny_sam())
    predictor.set_image(photo(48, 64))
    return predictor


# --- the same as the plain model ------------------------------------------------------------------


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("is_hq", [False, True])
@pytest.mark.parametrize(
    "prompt",
    [
        {"points": POINTS, "labels": LABELS},
        {"box": BOX},
        {"points": POINTS[:1], "labels": LABELS[:1], "box": BOX},
        {"masks": np.linspace(-5, 5, 256, dtype=np.float32).reshape(1, 16, 16)},
        {
            "points": POINTS,
            "labels": LABELS,
            "masks": np.linspace(-5, 5, 256, dtype=np.float32).reshape(1, 16, 16),
        },
    ],
    ids=["points", "box", "point-and-box", "mask", "points-and-mask"],
)
def test_it_predicts_what_the_model_predicts(make_tiny_sam, photo, prompt, is_hq, multimask):
    sam, image = make_tiny_sam(is_hq=is_hq), photo(50, 70)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    found = predictor.predict(
        prompt.get("points"),
        prompt.get("labels"),
        prompt.get("box"),
        prompt.get("masks"),
        multimask_output=multimask,
    )
    count = 3 if multimask and not is_hq else 1
    masks, scores, low_res = found
    assert (masks.shape, masks.dtype) == ((count, 50, 70), bool)
    assert (scores.shape, scores.dtype) == ((count,), np.float32)
    assert (low_res.shape, low_res.dtype) == ((count, 16, 16), np.float32)
    assert_same(found, segment(sam, image, **prompt, multimask=multimask))


def test_light_hq_sam_may_give_its_fine_mask_alone(make_tiny_sam, photo):
    predictor = SamPredictor(make_tiny_sam(is_hq=True))
    predictor.set_image(photo(48, 64))
    both, _, _ = predictor.predict(box=BOX, return_logits=True)
    fine, _, _ = predictor.predict(box=BOX, return_logits=True, hq_token_only=True)
    assert np.abs(both - fine).max() > 0.01
    plain = SamPredictor(make_tiny_sam())
    plain.set_image(photo(48, 64))
    with pytest.raises(ValueError, match="hq_token_only=True wants"):
        plain.predict(box=BOX, hq_token_only=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (64, 64), (33, 64), (300, 200)])
@pytest.mark.parametrize("pad", [None, False])
def test_images_of_any_size(make_tiny_sam, photo, size, pad):
    sam, image = make_tiny_sam(pad=pad is None), photo(*size)
    predictor = SamPredictor(sam, pad=pad)
    predictor.set_image(image)
    points, labels = np.array([[size[1] / 2, size[0] / 2]]), np.array([1])
    found = predictor.predict(points, labels, np.array([0, 0, size[1], size[0]]))
    assert found[0].shape == (3, *size)
    wanted = segment(sam, image, points, labels, np.array([0, 0, size[1], size[0]]))
    assert_same(found, wanted)


def test_an_unpadded_image_keeps_its_coordinates(make_tiny_sam, photo):
    """Without padding the encoder sees another image, but a click means the same place."""
    predictor = SamPredictor(make_tiny_sam(), pad=False)
    predictor.set_image(photo(30, 60))
    assert predictor.get_image_embedding().shape == (1, 32, 2, 4)
    assert predictor.input_size == (32, 64)
    tensors = predictor.predict_torch(torch.tensor([[[32.0, 16.0]]]), torch.tensor([[1]]))
    arrays = predictor.predict(np.array([[30, 15]]), np.array([1]))
    np.testing.assert_allclose(tensors[2][0], arrays[2], **CLOSE)


def test_logits_are_those_of_the_masks(predictor):
    masks, _, _ = predictor.predict(box=BOX)
    logits, _, _ = predictor.predict(box=BOX, return_logits=True)
    assert logits.dtype == np.float32
    assert np.array_equal(logits > 0, masks)


def test_the_threshold_is_the_models(make_tiny_sam, photo):
    sam = make_tiny_sam()
    sam.mask_threshold = 0.25
    predictor = SamPredictor(sam)
    predictor.set_image(photo(48, 64))
    logits, _, _ = predictor.predict(box=BOX, return_logits=True)
    assert np.array_equal(predictor.predict(box=BOX)[0], logits > 0.25)


def test_a_prediction_can_be_a_prompt(predictor):
    _, scores, low_res = predictor.predict(POINTS, LABELS)
    best = int(scores.argmax())
    again, _, _ = predictor.predict(
        POINTS, LABELS, mask_input=low_res[best][None], multimask_output=False
    )
    assert again.shape == (1, 48, 64)
    mask = np.zeros((48, 64), bool)
    mask[10:20, 10:20] = True
    assert predictor.predict(mask_input=mask)[0].shape == (3, 48, 64)


# --- tensors --------------------------------------------------------------------------------------


def test_many_prompts_as_tensors(predictor):
    boxes = np.array([[5, 8, 50, 40], [0, 0, 20, 20], [30, 10, 64, 48]])
    given = predictor.transform.apply_boxes_torch(torch.from_numpy(boxes), (48, 64))
    masks, scores, low_res = predictor.predict_torch(None, None, given, multimask_output=False)
    assert masks.shape == (3, 1, 48, 64)
    assert masks.dtype == torch.bool
    assert scores.shape == (3, 1)
    assert low_res.shape == (3, 1, 16, 16)
    for box, mask, score in zip(boxes, masks, scores, strict=True):
        alone = predictor.predict(box=box, multimask_output=False)
        np.testing.assert_allclose(score, alone[1], **CLOSE)
        assert (mask.numpy() != alone[0]).mean() < 0.002


def test_label_minus_1_is_no_point_in_tensors(predictor):
    coords = torch.tensor([[[20.0, 30.0], [0.0, 0.0]]])
    masks, _, low_res = predictor.predict_torch(coords, torch.tensor([[1, -1]]), return_logits=True)
    assert masks.dtype == torch.float32
    other = predictor.predict_torch(coords[:, :1], torch.tensor([[1]]))[2]
    assert not torch.allclose(low_res, other)  # a padding point is a token of its own


def test_a_transformed_image(make_tiny_sam, photo):
    sam, image = make_tiny_sam(), photo(48, 64)
    predictor = SamPredictor(sam)
    resized = predictor.transform.apply_image(image)
    predictor.set_torch_image(torch.from_numpy(resized).permute(2, 0, 1)[None], (48, 64))
    assert (predictor.original_size, predictor.input_size) == ((48, 64), (48, 64))
    assert_same(predictor.predict(POINTS, LABELS), segment(sam, image, POINTS, LABELS))
    for wrong in (torch.zeros(3, 48, 64), torch.zeros(1, 3, 48, 63), torch.zeros(1, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"wants \[1, 3, h, w\] with the longer side 64"):
            predictor.set_torch_image(wrong, (48, 64))


# --- images -------------------------------------------------------------------------------------


def test_arrays_in_grey_and_with_transparency(make_tiny_sam, photo):
    predictor = SamPredictor(make_tiny_sam())
    image = photo(48, 64)
    predictor.set_image(image)
    colour = predictor.features
    predictor.set_image(np.dstack([image, np.full((48, 64), 255, np.uint8)]))
    torch.testing.assert_close(predictor.features, colour)
    predictor.set_image(image[:, :, 0])
    grey = predictor.features
    predictor.set_image(np.repeat(image[:, :, :1], 3, axis=2))
    torch.testing.assert_close(predictor.features, grey)
    assert not torch.allclose(grey, colour)


def test_the_order_of_channels(make_tiny_sam, photo):
    predictor = SamPredictor(make_tiny_sam())
    image = photo(48, 64)
    predictor.set_image(image)
    rgb = predictor.features
    predictor.set_image(image[:, :, ::-1], image_format="BGR")
    torch.testing.assert_close(predictor.features, rgb)
    predictor.set_image(np.dstack([image[:, :, ::-1], np.full((48, 64), 255, np.uint8)]), "BGR")
    torch.testing.assert_close(predictor.features, rgb)
    predictor.set_image(image[:, :, 0], "BGR")
    with pytest.raises(ValueError, match=r"must be one of .*'RGB', 'BGR'.*came 'HSV'"):
        predictor.set_image(image, "HSV")
    with pytest.raises(ValueError, match="'BGR' is for arrays"):
        predictor.set_image(Image.fromarray(image), "BGR")


def encoded(image, kind, **more):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **more)
    return stream.getvalue()


def test_files_and_images(make_tiny_sam, photo, tmp_path):
    predictor = SamPredictor(make_tiny_sam())
    image = photo(48, 64)
    predictor.set_image(image)
    wanted = predictor.features
    (tmp_path / "a.png").write_bytes(encoded(image, "PNG"))
    for source in (tmp_path / "a.png", encoded(image, "PNG"), Image.fromarray(image)):
        predictor.set_image(source)
        torch.testing.assert_close(predictor.features, wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_segmented_as_it_is_shown(
    make_tiny_sam, photo, tmp_path, orientation
):
    sam, path = make_tiny_sam(), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.write_bytes(encoded(photo(40, 64), "JPEG", exif=exif))
    with Image.open(path) as opened:
        shown = np.array(ImageOps.exif_transpose(opened))
    predictor = SamPredictor(sam)
    predictor.set_image(path)
    assert predictor.original_size == shown.shape[:2]
    click = np.array([[30.0, 35.0]])
    assert_same(predictor.predict(click, np.array([1])), segment(sam, shown, click, np.array([1])))


def test_a_large_photograph(make_tiny_sam):
    sam, image = make_tiny_sam(), np.zeros((2000, 3000, 3), np.uint8)
    image[500:1500, 1000:2000] = 255
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    points, labels = np.array([[1500, 1000]]), np.array([1])
    assert_same(predictor.predict(points, labels), segment(sam, image, points, labels))


def test_an_image_that_cannot_be_read_is_not_set(predictor, tmp_path):
    assert predictor.is_image_set
    with pytest.raises(ImageError, match="there is no file"):
        predictor.set_image(tmp_path / "none.png")
    assert not predictor.is_image_set  # nor is the image before
    with pytest.raises(ImageError, match=r"came \[3, 48, 64\]; move the channels last"):
        predictor.set_image(np.zeros((3, 48, 64), np.uint8))
    with pytest.raises(TypeError, match="came int"):
        predictor.set_image(7)


# --- what is set ----------------------------------------------------------------------------------


def test_nothing_works_without_an_image(make_tiny_sam):
    predictor = SamPredictor(make_tiny_sam())
    coords, labels = torch.zeros(1, 1, 2), torch.ones(1, 1)
    for call in (
        lambda: predictor.predict(POINTS, LABELS),
        lambda: predictor.predict_torch(coords, labels),
        predictor.get_image_embedding,
        lambda: predictor.embedding,
    ):
        with pytest.raises(RuntimeError, match=r"An image must be set with \.set_image"):
            call()


def test_what_segment_anything_has_as_attributes(predictor):
    assert predictor.is_image_set
    assert predictor.features.shape == predictor.get_image_embedding().shape == (1, 32, 4, 4)
    assert predictor.original_size == (48, 64)
    assert predictor.input_size == (48, 64)
    assert predictor.device == torch.device("cpu")
    assert predictor.transform.target_length == 64
    assert predictor.model.mask_threshold == 0.0
    predictor.reset_image()
    assert not predictor.is_image_set
    assert predictor.features is predictor.original_size is predictor.input_size is None
    with pytest.raises(RuntimeError, match="An image must be set"):
        predictor.predict(POINTS, LABELS)


def test_features_may_be_put_in_by_hand(predictor, make_tiny_sam):
    """As tools that keep embeddings in files of their own do."""
    wanted = predictor.predict(POINTS, LABELS)
    other = SamPredictor(make_tiny_sam())
    other.features = predictor.features.clone()
    other.original_size, other.input_size = predictor.original_size, predictor.input_size
    other.is_image_set = True
    for found, same in zip(other.predict(POINTS, LABELS), wanted, strict=True):
        np.testing.assert_array_equal(found, same)
    assert other.embedding.weights_sha256 is None


def test_features_put_in_by_hand_do_not_go_with_the_early_map_of_another_image(
    make_tiny_sam, photo
):
    predictor = SamPredictor(make_tiny_sam(is_hq=True))
    predictor.set_image(photo(48, 64))
    predictor.features = predictor.features.clone()
    with pytest.raises(ValueError, match="wants interm_features"):
        predictor.predict(POINTS, LABELS)


def test_an_embedding_is_decoded_elsewhere(predictor, make_tiny_sam, tmp_path):
    wanted = predictor.predict(POINTS, LABELS)
    path = predictor.embedding.save(tmp_path / "a.safetensors")
    other = SamPredictor(make_tiny_sam())
    other.set_embedding(ImageEmbedding.load(path))
    for found, same in zip(other.predict(POINTS, LABELS), wanted, strict=True):
        np.testing.assert_array_equal(found, same)
    with pytest.raises(ValueError, match="made by an encoder with weights"):
        SamPredictor(make_tiny_sam(seed=5)).set_embedding(predictor.embedding)
    with pytest.raises(ValueError, match="but the model wants"):
        SamPredictor(make_tiny_sam(size=96)).set_embedding(
            ImageEmbedding(
                predictor.features[0], ImageSpec.sam(64).place(48, 64), ImageSpec.sam(64)
            )
        )


def test_light_hq_sams_embedding_has_its_early_map(make_tiny_sam, photo, tmp_path):
    predictor = SamPredictor(make_tiny_sam(is_hq=True))
    predictor.set_image(photo(48, 64))
    wanted = predictor.predict(POINTS, LABELS)
    other = SamPredictor(make_tiny_sam(is_hq=True))
    other.set_embedding(ImageEmbedding.load(predictor.embedding.save(tmp_path / "a.safetensors")))
    np.testing.assert_array_equal(other.predict(POINTS, LABELS)[2], wanted[2])


def test_new_weights_of_the_decoder_are_used(make_tiny_sam, photo):
    sam, image = make_tiny_sam(), photo(48, 64)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    before = predictor.predict(POINTS, LABELS)[2]
    with torch.no_grad():
        sam.mask_decoder.mask_tokens.weight.mul_(-1)
    assert np.abs(predictor.predict(POINTS, LABELS)[2] - before).max() > 0.01
    assert_same(predictor.predict(POINTS, LABELS), segment(sam, image, POINTS, LABELS))


def test_new_weights_of_the_encoder_want_the_image_again(make_tiny_sam, photo):
    sam, image = make_tiny_sam(), photo(48, 64)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    with torch.no_grad():
        sam.image_encoder.neck[0].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"weights have changed .* call \.set_image"):
        predictor.predict(POINTS, LABELS)
    predictor.set_image(image)
    assert_same(predictor.predict(POINTS, LABELS), segment(sam, image, POINTS, LABELS))


def test_weights_that_are_written_again_are_the_same(predictor):
    encoder = predictor.model.image_encoder
    encoder.load_state_dict({key: value.clone() for key, value in encoder.state_dict().items()})
    predictor.predict(POINTS, LABELS)


# --- wrong prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "nothing is prompted"),
        ({"point_coords": POINTS}, "point_labels must be supplied if point_coords is supplied"),
        ({"point_labels": LABELS}, "labels came without points"),
        ({"point_coords": POINTS, "point_labels": [1]}, r"2 points, so \[2\]; came \[1\]"),
        ({"point_coords": POINTS, "point_labels": [1, -1]}, r"must be 1 .* came \[-1"),
        ({"point_coords": POINTS, "point_labels": [1, 3]}, r"must be 1 .* came \[3"),
        ({"point_coords": POINTS[0], "point_labels": [1]}, r"\[P, 2\]; came \[2\]"),
        ({"point_coords": POINTS * np.nan, "point_labels": LABELS}, "must be finite"),
        ({"point_coords": [[65.1, 0]], "point_labels": [1]}, "lies outside the image"),
        ({"point_coords": [[0, -1]], "point_labels": [1]}, "lies outside the image"),
        ({"box": [50, 8, 5, 40]}, "x1 < x0"),
        ({"box": [5, 8, 50, 49]}, r"the box's corner .* lies outside"),
        ({"box": [5, 8, 50, np.inf]}, "box must be finite"),
        ({"mask_input": np.zeros((1, 8, 8), np.float32)}, r"\[16, 16\] of floats; came \[8, 8\]"),
        ({"mask_input": np.zeros((3, 16, 16), np.float32)}, r"came \[3, 16, 16\]"),
    ],
)
def test_wrong_prompts_say_what_was_wanted(predictor, arguments, words):
    with pytest.raises(ValueError, match=words):
        predictor.predict(**arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((None, None), "nothing is prompted"),
        ((torch.zeros(1, 1, 2), None), "point_coords and point_labels go together"),
        ((torch.zeros(1, 2), torch.ones(1)), r"\[B, N, 2\]; came \[1, 2\]"),
        ((None, None, np.zeros((1, 4))), "boxes must be a tensor, came ndarray"),
        ((None, None, torch.zeros(4)), r"\[B, 4\]; came \[4\]"),
        ((None, None, None, torch.zeros(1, 1, 8, 8)), r"\[B, 1, 16, 16\]; came \[1, 1, 8, 8\]"),
    ],
)
def test_wrong_tensors_say_what_was_wanted(predictor, arguments, words):
    with pytest.raises(ValueError, match=words):
        predictor.predict_torch(*arguments)


# --- how it is made -------------------------------------------------------------------------------


def test_it_wants_a_sam(make_tiny_vit):
    with pytest.raises(
        TypeError, match=r"SamPredictor wants a Sam, .* or the name or path of a .*; came TinyViT"
    ):
        SamPredictor(make_tiny_vit())


def test_engine_and_device_may_be_chosen(make_tiny_sam, photo):
    sam = make_tiny_sam()
    engine = Engine(sam.image_encoder, pad=False)
    predictor = SamPredictor(sam, engine=engine)
    predictor.set_image(photo(20, 40))
    assert predictor.features.shape == (1, 32, 2, 4)
    assert SamPredictor(sam, device="cpu").device == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be"):
        SamPredictor(sam, device="gpu7")


def test_from_the_embedded_weights(photo):
    predictor = SamPredictor.from_checkpoint(device="cpu")
    image = photo(100, 128)
    predictor.set_image(image)
    found = predictor.predict(POINTS, LABELS)
    assert found[2].shape == (3, 64, 64)
    assert_same(found, segment(build_sam("tinyvit_sam_2m"), image, POINTS, LABELS))


def test_a_name_or_a_file_is_a_model(make_tiny_sam, photo, tmp_path):
    predictor = SamPredictor("tinyvit_sam_2m")
    assert (
        predictor.model.image_encoder.img_size == build_sam("tinyvit_sam_2m").image_encoder.img_size
    )
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        SamPredictor(tmp_path / "none.safetensors")


# --- as it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_hq", [False, True])
@pytest.mark.parametrize("prompt", [{"points": POINTS, "labels": LABELS}, {"box": BOX}])
def test_the_plain_form_is_the_model(make_tiny_sam, photo, prompt, is_hq):
    sam, image = make_tiny_sam(is_hq=is_hq), photo(50, 70)
    predictor = SamPredictor(sam, fast=False)
    predictor.set_image(image)
    found = predictor.predict(prompt.get("points"), prompt.get("labels"), prompt.get("box"))
    assert_same(found, segment(sam, image, **prompt))


def test_the_plain_form_sees_new_weights_at_once(make_tiny_sam, photo):
    sam = make_tiny_sam()
    predictor = SamPredictor(sam, fast=False)
    predictor.set_image(photo(40, 40))
    _, before, _ = predictor.predict(POINTS[:1], LABELS[:1])
    sam.mask_decoder.iou_prediction_head.layers[-1].bias.data[2] += 1  # which no watch notices
    _, after, _ = predictor.predict(POINTS[:1], LABELS[:1])
    np.testing.assert_allclose(after - before, [0, 1, 0], atol=1e-5)


def test_the_plain_form_has_no_backend_and_no_precision(make_tiny_sam):
    with pytest.raises(ValueError, match="fast=False runs the model as it is; leave engine"):
        SamPredictor(make_tiny_sam(), backend="openvino", fast=False)
    with pytest.raises(ValueError, match="fast=False runs the model as it is; leave the precision"):
        SamPredictor(make_tiny_sam(), decoder_precision="fp64", fast=False)


def test_features_that_are_written_to_are_used(predictor):
    before = predictor.predict(POINTS, LABELS)[2]
    predictor.features.mul_(-1)
    assert np.abs(predictor.predict(POINTS, LABELS)[2] - before).max() > 0.01
    assert predictor.embedding.weights_sha256 is None


def test_several_boxes_have_the_masks_that_each_has_alone(make_tiny_sam, photo):
    predictor = SamPredictor(make_tiny_sam())
    predictor.set_image(photo(48, 64))
    boxes = np.array([[5, 8, 50, 40], [0, 0, 20, 20], [30.5, 10, 64, 48]])
    masks, scores, low_res = predictor.predict(box=boxes, multimask_output=False)
    assert masks.shape == (3, 1, 48, 64) and masks.dtype == bool
    assert scores.shape == (3, 1) and low_res.shape == (3, 1, 16, 16)
    for i, box in enumerate(boxes):
        _, one_scores, one = predictor.predict(box=box, multimask_output=False)
        np.testing.assert_allclose(low_res[i], one, atol=1e-5)  # sums in another order
        np.testing.assert_allclose(scores[i], one_scores, atol=1e-5)
    with pytest.raises(ValueError, match=r"are for one box, came 3; .* multimask_output=False"):
        predictor.predict(box=boxes)
    assert predictor.predict(box=boxes[:1])[0].shape == (3, 48, 64)
    with pytest.raises(ValueError, match="points and a mask go with one box, came 3"):
        predictor.predict(np.array([[1, 1]]), np.array([1]), boxes)


def test_what_leaves_the_image_by_less_than_a_pixel_is_clipped(make_tiny_sam, photo):
    """As detectors produce it; the right value is that of the clipped box."""
    predictor = SamPredictor(make_tiny_sam())
    predictor.set_image(photo(48, 64))
    found = predictor.predict(box=np.array([-0.3, 5, 64.9, 48.4]))[2]
    np.testing.assert_array_equal(found, predictor.predict(box=np.array([0, 5, 64, 48]))[2])
    found = predictor.predict(np.array([[-0.9, 48.9]]), np.array([1]))[2]
    same = predictor.predict(np.array([[0, 48]]), np.array([1]))[2]
    np.testing.assert_array_equal(found, same)
    for box in ([-1, 5, 60, 40], [0, 5, 65, 40], [0, -3, 60, 40]):
        with pytest.raises(ValueError, match="lies outside the image of width 64 and height 48"):
            predictor.predict(box=np.array(box))
