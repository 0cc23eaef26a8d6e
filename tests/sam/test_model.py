"""``Sam``: preparation, whole predictions against the parts called by hand, sizes of all kinds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinyvit.image_spec import ImageSpec
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder, TwoWayTransformer
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.sam.model import Sam

MEAN, STD = (120.0, 110.0, 100.0), (50.0, 60.0, 70.0)


@pytest.fixture
def make_sam(make_tiny_vit, randomise):
    """``make_sam(size=(64, 64), is_hq=False, spec=None)``: a Sam with a frame of that size."""

    def make(size=(64, 64), is_hq=False, spec=None):
        encoder = make_tiny_vit(img_size=size)
        encoder.image_spec = spec
        transformer = TwoWayTransformer(2, 16, 4, 24)
        kind, extra = (HQMaskDecoder, {"vit_dim": 16}) if is_hq else (MaskDecoder, {})
        decoder = randomise(kind(transformer_dim=16, transformer=transformer, **extra))
        grid = tuple(-(-side // 16) for side in size)
        frame = tuple(16 * cells for cells in grid)
        prompts = randomise(PromptEncoder(16, grid, frame, 16))
        return Sam(encoder, prompts, decoder, MEAN, STD).eval()

    return make


def pixels(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def by_hand(sam, image, original, multimask, points=None, boxes=None, masks=None):
    """One image, the three parts called as segment-anything does it."""
    x = (image - sam.pixel_mean) / sam.pixel_std
    height, width = image.shape[1:]
    frame = sam.prompt_encoder.input_image_size
    x = F.pad(x, (0, frame[1] - width, 0, frame[0] - height))[None]
    sparse, dense = sam.prompt_encoder(points, boxes, masks)
    low_res, iou = sam.mask_decoder(
        sam.image_encoder(x), sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask
    )
    logits = F.interpolate(low_res, frame, mode="bilinear", align_corners=False)
    logits = logits[..., :height, :width]
    logits = F.interpolate(logits, original, mode="bilinear", align_corners=False)
    return {"masks": logits > 0, "iou_predictions": iou, "low_res_logits": low_res}


# float32 sums in batches of another size
NEAR = {"rtol": 1e-4, "atol": 1e-4}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key in ("iou_predictions", "low_res_logits"):
        torch.testing.assert_close(found[key], wanted[key], **NEAR)
    assert found["masks"].dtype == torch.bool
    assert found["masks"].shape == wanted["masks"].shape
    # only logits within rounding of 0 may fall on the other side
    assert (found["masks"] != wanted["masks"]).float().mean() < 0.001


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_batch_of_images_is_each_by_hand(make_sam, size, multimask):
    sam = make_sam(size)
    coords, labels = torch.tensor([[[10.0, 12.0], [30.0, 5.0]]]), torch.tensor([[1, 0]])
    boxes = torch.tensor([[3.0, 4.0, 30.0, 40.0], [0.0, 0.0, 20.0, 20.0]])
    logits = torch.randn(1, 1, size[0] // 4, size[1] // 4)
    first, second, third = pixels(*size), pixels(48, 50, 1), pixels(30, 64, 2)
    found = sam(
        [
            {
                "image": first,
                "original_size": (100, 90),
                "point_coords": coords,
                "point_labels": labels,
            },
            {"image": second, "original_size": (48, 50), "boxes": boxes},
            {"image": third, "original_size": (15, 32), "mask_inputs": logits},
        ],
        multimask,
    )
    assert_same(found[0], by_hand(sam, first, (100, 90), multimask, points=(coords, labels)))
    assert_same(found[1], by_hand(sam, second, (48, 50), multimask, boxes=boxes))
    assert_same(found[2], by_hand(sam, third, (15, 32), multimask, masks=logits))
    assert found[1]["masks"].shape == (2, 3 if multimask else 1, 48, 50)


def test_no_images_and_no_prompts(make_sam):
    sam = make_sam()
    assert sam([], True) == []
    [found] = sam([{"image": pixels(64, 64), "original_size": (64, 64)}], True)
    assert found["masks"].shape == (1, 3, 64, 64)
    empty = {"image": pixels(64, 64), "original_size": (20, 30), "boxes": torch.zeros(0, 4)}
    [found] = sam([empty], True)
    assert found["masks"].shape == (0, 3, 20, 30)
    assert found["low_res_logits"].shape == (0, 3, 16, 16)


def test_unpadded_images_of_any_size(make_sam):
    sam = make_sam(spec=ImageSpec.sam(64, pad=False))
    records = [
        {"image": pixels(*size), "original_size": (2 * size[0], 2 * size[1])}
        for size in ((64, 33), (16, 64), (64, 33), (1, 1), (90, 70))
    ]
    grids = [(4, 3), (1, 4), (4, 3), (1, 1), (6, 5)]
    for record, grid, found in zip(records, grids, sam(records, False), strict=True):
        assert found["low_res_logits"].shape == (1, 1, 4 * grid[0], 4 * grid[1])
        assert found["masks"].shape == (1, 1, *record["original_size"])


def test_an_unpadded_images_logits_keep_their_pitch(make_sam):
    sam = make_sam(spec=ImageSpec.sam(64, pad=False))
    # a ramp along x; each low-res logit is 4 pixels wide, and its centre keeps its value
    ramp = torch.arange(12.0).expand(1, 1, 16, 12)
    found = sam.postprocess_masks(ramp, (64, 41), (64, 41))
    wanted = (torch.arange(41) + 0.5) / 4 - 0.5
    torch.testing.assert_close(found[0, 0, 30, 2:], wanted[2:])


def test_a_frame_that_the_stride_does_not_divide(make_sam):
    sam = make_sam((50, 70))
    assert sam.prompt_encoder.image_embedding_size == (4, 5)
    assert sam.preprocess(pixels(40, 70)).shape == (3, 50, 70)
    ramp = torch.arange(20.0).expand(1, 1, 16, 20)
    found = sam.postprocess_masks(ramp, (50, 70), (50, 70))
    torch.testing.assert_close(found[0, 0, 3, 2:], ((torch.arange(70) + 0.5) / 4 - 0.5)[2:])


def test_postprocess_cuts_the_padding_before_the_last_resize(make_sam):
    logits = torch.full((1, 1, 16, 16), -1.0)
    logits[..., :8, :] = 1.0  # the image fills the upper half
    found = make_sam().postprocess_masks(logits, (32, 64), (320, 640))
    assert found.shape == (1, 1, 320, 640)
    assert bool((found[..., :290, :] == 1).all())
    # row 31 of the frame lies 3/8 between 1 and -1; with the padding row 32 would pull it down
    torch.testing.assert_close(found[..., -5:, :], torch.full((1, 1, 5, 640), 0.25))


def test_preprocess(make_sam):
    sam = make_sam()
    image = pixels(40, 64)
    found = sam.preprocess(image)
    assert found.shape == (3, 64, 64)
    wanted = (float(image[1, 7, 9]) - MEAN[1]) / STD[1]
    assert float(found[1, 7, 9]) == pytest.approx(wanted, abs=1e-6)  # one rounding of float32
    assert not found[:, 40:].any()
    assert torch.equal(sam.preprocess(image[None])[0], found)
    assert sam.double().preprocess(image).dtype == torch.float64


def test_preprocess_of_a_min_max_model(make_sam):
    sam = make_sam(spec=ImageSpec.litemedsam(64))
    image = pixels(30, 64)
    found = sam.preprocess(image)
    low, high = float(image.min()), float(image.max())
    assert found.shape == (3, 64, 64)
    torch.testing.assert_close(found[:, :30], (image - low) / (high - low))


@pytest.mark.parametrize(
    "shape, words",
    [
        ((3, 65, 64), r"65 x 64 .* 64 x 64; resize it first"),
        ((1, 64, 64), r"\[3, h, w\] or \[N, 3, h, w\]; came \[1, 64, 64\]"),
        ((64, 64), r"came \[64, 64\]"),
    ],
)
def test_images_that_do_not_fit(make_sam, shape, words):
    with pytest.raises(ValueError, match=words):
        make_sam().preprocess(torch.zeros(shape))


def test_points_without_labels(make_sam):
    record = {
        "image": pixels(64, 64),
        "original_size": (64, 64),
        "point_coords": torch.zeros(1, 1, 2),
    }
    with pytest.raises(ValueError, match="go together as tensors, got Tensor and NoneType"):
        make_sam()([record], True)


@torch.no_grad()
def test_an_hq_decoder_gets_the_early_map(make_sam):
    sam = make_sam(is_hq=True)
    image = pixels(64, 64)
    record = {"image": image, "original_size": (64, 64)}
    embedding, early = sam.image_encoder.forward_hq(sam.preprocess(image)[None])
    sparse, dense = sam.prompt_encoder(None, None, None)
    arguments = (embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
    for only in (False, True):
        wanted, _ = sam.mask_decoder(*arguments, only, early)
        [found] = sam([record], True, hq_token_only=only)
        torch.testing.assert_close(found["low_res_logits"], wanted, **NEAR)
        assert found["masks"].shape == (1, 1, 64, 64)


def test_attributes_and_keys(make_sam):
    sam = make_sam()
    assert (sam.mask_threshold, sam.image_format) == (0.0, "RGB")
    assert sam.device == torch.device("cpu")
    parts = {key.split(".")[0] for key in sam.state_dict()}
    assert parts == {"image_encoder", "prompt_encoder", "mask_decoder"}


def test_no_gradients_are_kept(make_sam):
    [found] = make_sam()([{"image": pixels(64, 64), "original_size": (64, 64)}], True)
    assert not found["low_res_logits"].requires_grad
