"""Code as it is written for segment-anything and MobileSAM, with nothing changed but the import.

The steps are those of the projects' READMEs and notebooks and of three kinds of public programs,
written anew. Values are compared with the library's own.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import tinyvit


@pytest.fixture(scope="module")
def image():
    with Image.open("examples/pictures/chelsea.png") as opened:
        return np.array(opened.convert("RGB").resize((160, 120)))


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    return "tinyvit_sam_2m"


def test_the_readme_of_segment_anything(image, starter):
    from tinyvit.compat.segment_anything import SamPredictor, sam_model_registry

    sam = sam_model_registry["default"](checkpoint=starter)
    sam.to(device="cpu")
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    masks, _scores, _ = predictor.predict(
        point_coords=np.array([[80, 60]]), point_labels=np.array([1]), multimask_output=True
    )
    assert masks.shape == (3, 120, 160)
    boxes = torch.tensor([[10, 10, 100, 90], [20, 5, 150, 110]], device=predictor.device)
    transformed = predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
    several, scores, _ = predictor.predict_torch(
        point_coords=None, point_labels=None, boxes=transformed, multimask_output=False
    )
    assert several.shape == (2, 1, 120, 160)
    same, again, _ = predictor.predict(box=boxes.numpy(), multimask_output=False)
    assert (same != several.numpy()).mean() < 1e-3  # logits within rounding of 0
    np.testing.assert_allclose(again, scores.numpy(), atol=1e-5)


def test_the_readme_of_mobile_sam(image, starter):
    from tinyvit.compat.mobile_sam import (
        SamAutomaticMaskGenerator,
        SamPredictor,
        sam_model_registry,
    )

    mobile_sam = sam_model_registry["tiny_vit_2m_sam"](checkpoint=starter)
    mobile_sam.to(device="cpu")
    mobile_sam.eval()
    predictor = SamPredictor(mobile_sam)
    predictor.set_image(image)
    assert predictor.predict(box=np.array([10, 10, 100, 90]))[0].shape == (3, 120, 160)
    generator = SamAutomaticMaskGenerator(mobile_sam, points_per_side=8)
    masks = generator.generate(image)
    assert masks and masks[0]["segmentation"].dtype == bool


def test_the_notebook_of_the_onnx_export(image, starter):
    """Its preparation of prompts; the module gives what the predictor does."""
    from tinyvit.compat.mobile_sam.utils.onnx import SamOnnxModel
    from tinyvit.compat.segment_anything import SamPredictor, sam_model_registry

    sam = sam_model_registry["default"](checkpoint=starter)
    onnx_model = SamOnnxModel(sam, return_single_mask=False)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    point, box = np.array([[80, 60]]), np.array([10, 10, 150, 110])
    coords = np.concatenate([point, box.reshape(2, 2)], axis=0)[None].astype(np.float32)
    labels = np.array([[1, 2, 3]], np.float32)
    coords = predictor.transform.apply_coords(coords, image.shape[:2]).astype(np.float32)
    inputs = {
        "image_embeddings": predictor.get_image_embedding(),
        "point_coords": torch.from_numpy(coords),
        "point_labels": torch.from_numpy(labels),
        "mask_input": torch.zeros(1, 1, 64, 64),
        "has_mask_input": torch.zeros(1),
        "orig_im_size": torch.tensor(image.shape[:2], dtype=torch.float32),
    }
    with torch.no_grad():
        masks, scores, low_res = onnx_model(**inputs)
    _, wanted_scores, wanted = predictor.predict(point, np.array([1]), box)
    np.testing.assert_allclose(low_res[0, 1:].numpy(), wanted, atol=1e-3)
    np.testing.assert_allclose(scores[0, 1:].numpy(), wanted_scores, atol=1e-4)
    assert masks.shape == (1, 4, 120, 160)
    mask = torch.from_numpy(wanted[None, :1])
    with torch.no_grad():
        refined = onnx_model(**{**inputs, "mask_input": mask, "has_mask_input": torch.ones(1)})
    _, _, wanted = predictor.predict(point, np.array([1]), box, wanted[:1], multimask_output=False)
    np.testing.assert_allclose(refined[2][0, 0].numpy(), wanted[0], atol=1e-3)
    best = SamOnnxModel(sam, return_single_mask=True, return_extra_metrics=True)
    with torch.no_grad():
        logits, score, stability, area, one = best(**inputs)
    assert one.shape == (1, 1, 64, 64)
    assert torch.equal(one[0, 0], low_res[0, 0])  # three points: the single mask
    assert score.shape == stability.shape == area.shape == (1, 1)
    assert int(area) == int((logits > 0).sum())


def test_the_onnx_model_can_be_traced_for_every_size_of_image(make_tiny_sam):
    from tinyvit.compat.segment_anything.utils.onnx import SamOnnxModel

    sam = make_tiny_sam()
    model = SamOnnxModel(sam, return_single_mask=True, use_stability_score=True).eval()

    def arguments(points, size):
        coords = 40 * torch.rand(1, points, 2)
        labels = torch.randint(0, 4, (1, points)).float()
        mask, has = torch.randn(1, 1, 16, 16), torch.ones(1)
        return torch.randn(1, 32, 4, 4), coords, labels, mask, has, torch.tensor(size).float()

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own, about constants
        traced = torch.jit.trace(model, arguments(5, (48, 64)), check_trace=False)
    for points, size in ((5, (48, 64)), (5, (90, 70))):
        given = arguments(points, size)
        with torch.no_grad():
            for found, wanted in zip(traced(*given), model(*given), strict=True):
                torch.testing.assert_close(found, wanted)


def test_hq_has_no_onnx_model(make_tiny_sam):
    from tinyvit.compat.mobile_sam.utils.onnx import SamOnnxModel

    with pytest.raises(TypeError, match="wants an early map"):
        SamOnnxModel(make_tiny_sam(is_hq=True), True)


def test_an_annotation_tool(image, starter):
    """Embeds once, keeps the features, and predicts polygons at each click."""
    from tinyvit.compat.mobile_sam.build_sam import build_sam_vit_t, sam_model_registry
    from tinyvit.compat.mobile_sam.modeling import Sam
    from tinyvit.compat.mobile_sam.predictor import SamPredictor

    assert callable(build_sam_vit_t)
    model = sam_model_registry["default"](starter)
    assert isinstance(model, Sam)
    predictor = SamPredictor(model)
    predictor.set_image(image, "RGB")
    cache = {
        "features": predictor.features,
        "original_size": predictor.original_size,
        "input_size": predictor.input_size,
        "is_image_set": True,
    }
    clicks, labels = np.array([[80, 60], [20, 20]]), np.array([1, 0])
    wanted = predictor.predict(clicks, labels, multimask_output=False)
    predictor.reset_image()
    for name, value in cache.items():
        setattr(predictor, name, value)
    mask, _, logits = predictor.predict(clicks, labels, multimask_output=False)
    assert np.array_equal(mask, wanted[0])
    again, _, _ = predictor.predict(clicks, labels, mask_input=logits, multimask_output=False)
    assert again.shape == (1, 120, 160)


def test_a_batch_script(image, starter, tmp_path):
    """Everything of a folder of images, as COCO run lengths in a JSON file each."""
    from tinyvit.compat.segment_anything import SamAutomaticMaskGenerator, sam_model_registry
    from tinyvit.compat.segment_anything.utils.amg import area_from_rle, rle_to_mask

    for name in ("a.png", "b.png"):
        Image.fromarray(image).save(tmp_path / name)
    sam = sam_model_registry["default"](checkpoint=starter)
    generator = SamAutomaticMaskGenerator(
        sam, points_per_side=6, output_mode="uncompressed_rle", min_mask_region_area=10
    )
    for path in sorted(tmp_path.glob("*.png")):
        with Image.open(path) as opened:
            records = generator.generate(np.array(opened))
        path.with_suffix(".json").write_text(json.dumps(records))
        for record in json.loads(path.with_suffix(".json").read_text()):
            mask = rle_to_mask(record["segmentation"])
            assert mask.shape == (120, 160)
            assert mask.sum() == record["area"] == area_from_rle(record["segmentation"])


def test_a_notebook_that_builds_everything_mode_itself(image, starter):
    """The loop of everything mode out of the parts of ``utils.amg``."""
    from tinyvit.compat.mobile_sam.utils.amg import (
        MaskData,
        batch_iterator,
        batched_mask_to_box,
        build_all_layer_point_grids,
        calculate_stability_score,
        generate_crop_boxes,
        mask_to_rle_pytorch,
        rle_to_mask,
        uncrop_boxes_xyxy,
    )
    from tinyvit.compat.mobile_sam.utils.transforms import ResizeLongestSide

    sam = tinyvit.build_sam(starter)
    predictor = tinyvit.SamPredictor(sam)
    predictor.set_image(image)
    (crop, *_), _ = generate_crop_boxes(image.shape[:2], 0, 0.3)
    points = build_all_layer_point_grids(3, 0, 1)[0] * np.array(image.shape[1::-1])
    transform = ResizeLongestSide(sam.image_encoder.img_size)
    found = MaskData()
    for (some,) in batch_iterator(4, points):
        coords = torch.as_tensor(transform.apply_coords(some, image.shape[:2]))
        logits, scores, _ = predictor.predict_torch(
            coords[:, None], torch.ones(len(some), 1), return_logits=True
        )
        logits, scores = logits.flatten(0, 1), scores.flatten(0, 1)
        data = MaskData(masks=logits, iou=scores, points=[*some.repeat(3, axis=0)])
        data.filter(data["iou"] > 0.2)
        data["stability"] = calculate_stability_score(data["masks"], 0.0, 1.0)
        data["boxes"] = uncrop_boxes_xyxy(batched_mask_to_box(data["masks"] > 0), crop)
        data["rles"] = mask_to_rle_pytorch(data["masks"] > 0)
        wanted = data["masks"] > 0
        for rle, mask in zip(data["rles"], wanted, strict=True):
            assert np.array_equal(rle_to_mask(rle), mask.numpy())
        del data["masks"]
        found.cat(data)
    found.to_numpy()
    assert len(found["rles"]) == len(found["iou"]) == len(found["points"]) > 0
    assert isinstance(found["boxes"], np.ndarray)


@pytest.mark.parametrize("package", ["segment_anything", "mobile_sam"])
def test_modules_that_code_imports(package):
    from importlib import import_module

    def names(module, *wanted):
        there = import_module(f"tinyvit.compat.{package}{module}")
        return [getattr(there, name) for name in wanted]

    sam, *heads = names(".modeling", "Sam", "MaskDecoder", "PromptEncoder", "TwoWayTransformer")
    assert sam is tinyvit.sam.Sam
    for module, head in zip(("mask_decoder", "prompt_encoder", "transformer"), heads, strict=True):
        assert names(f".modeling.{module}", head.__name__) == [head]
    assert names(".modeling.image_encoder", "ImageEncoderViT") == [tinyvit.TinyViT]
    assert names(".modeling.common", "LayerNorm2d")
    assert names(".modeling.sam", "Sam") == [tinyvit.sam.Sam]
    assert names(".automatic_mask_generator", "SamAutomaticMaskGenerator")


def test_names_of_segment_anything_say_what_is_supported():
    from tinyvit.compat.mobile_sam import build_sam_vit_b
    from tinyvit.compat.segment_anything import build_sam_vit_h, build_sam_vit_l, sam_model_registry

    for call in (
        lambda: sam_model_registry["vit_h"],
        lambda: build_sam_vit_h(checkpoint="sam_vit_h_4b8939.pth"),
        build_sam_vit_l,
        build_sam_vit_b,
    ):
        with pytest.raises(KeyError) as caught:
            call()
        assert str(caught.value).startswith("unknown SAM 'vit_")
        assert "TinyViT encoder only, such as MobileSAM ('vit_t')" in str(caught.value)
    assert "vit_h" not in sam_model_registry
    assert sam_model_registry.get("vit_h") is None
