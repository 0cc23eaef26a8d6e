"""Everything mode against a slow and plain reference: every point, every mask, in full size."""

import inspect

import numpy as np
import pytest
import torch

from tinyvit.images import mask_ops as rle
from tinyvit.images.preprocess import to_input
from tinyvit.sam import automatic as candidates
from tinyvit.sam import decoder
from tinyvit.sam.automatic import (
    SamAutomaticMaskGenerator,
    build_all_layer_point_grids,
    generate_crop_boxes,
)
from tinyvit.sam.segmenter import Segmenter
from tinyvit.sam.upscale import Region

LENIENT = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


# -- the reference ---------------------------------------------------------------------------------


def overlap(a, b):
    """IoU of two boxes; nan for two without area."""
    common = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    areas = np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])
    with np.errstate(invalid="ignore"):
        return common / (sum(areas) - common)


def greedy(rows, scores, bound):
    """Rows that stay, the best first."""
    kept = []
    for i in sorted(range(len(rows)), key=lambda i: -scores[i]):
        if not any(overlap(rows[i]["box"], other["box"]) > bound for other in kept):
            kept.append(rows[i])
    return kept


def box_of(mask):
    if not mask.any():
        return np.zeros(4)
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()], float)


@torch.no_grad()
def masks_of_crop(sam, crop, points, offset):
    """(logits > 0, predicted IoU, stability, point) of every mask of every point."""
    pixels, placement = to_input(crop, sam.image_encoder.image_spec)
    tensor = torch.from_numpy(pixels)
    embedding = sam.image_encoder(tensor[None])
    grid = tuple(embedding.shape[2:])
    scale = np.array(placement.resized_size[::-1]) / np.array(placement.original_size[::-1])
    found = []
    for point in points:
        coords = torch.tensor(point * scale, dtype=torch.float32)[None, None]
        sparse, dense = sam.prompt_encoder((coords, torch.ones(1, 1)), None, None, grid)
        pe = sam.prompt_encoder.get_dense_pe(grid)
        low_res, iou = sam.mask_decoder(embedding, pe, sparse, dense, True)
        logits = sam.postprocess_masks(low_res, placement.resized_size, crop.shape[:2])[0]
        for one, score in zip(logits, iou[0].tolist(), strict=True):
            one = one - sam.mask_threshold
            inner, outer = int((one > offset).sum()), int((one > -offset).sum())
            stability = inner / outer if outer else float("nan")
            found.append(((one > 0).numpy(), score, stability, point))
    return found


def reference(sam, image, grids, n_layers=0, ratio=512 / 1500, **filters):
    height, width = image.shape[:2]
    rows = []
    for box, layer in zip(*generate_crop_boxes((height, width), n_layers, ratio), strict=True):
        x0, y0, x1, y1 = box
        points = grids[layer] * np.array([x1 - x0, y1 - y0])
        here = []
        for mask, iou, stability, point in masks_of_crop(
            sam, image[y0:y1, x0:x1], points, filters["offset"]
        ):
            if filters["iou"] > 0 and not iou > filters["iou"]:
                continue
            if filters["stability"] > 0 and not stability >= filters["stability"]:
                continue
            placed = box_of(mask) + np.array([x0, y0, x0, y0])
            near = np.abs(placed - box) <= 20
            if (near & ~(np.abs(placed - [0, 0, width, height]) <= 20)).any():
                continue
            whole = np.zeros((height, width), bool)
            whole[y0:y1, x0:x1] = mask
            row = {"mask": whole, "iou": iou, "stability": stability, "box": placed}
            here.append({**row, "point": point + np.array([x0, y0]), "crop": box})
        rows += greedy(here, [row["iou"] for row in here], filters["nms"])
    if n_layers:
        sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (row["crop"] for row in rows)]
        rows = greedy(rows, [1 / size for size in sizes], filters["nms"])
    return rows


def filters_at(sam, image, grids, share, offset, nms):
    """Bounds that a share of the masks passes, each in a gap, so that rounding decides nothing."""
    points = grids[0] * np.array(image.shape[1::-1])
    found = masks_of_crop(sam, image, points, offset)

    def gap(values):
        ranked = np.sort(np.array(values)[np.isfinite(values)])
        low = int(len(ranked) * (1 - share))
        i = low + int(np.argmax(np.diff(ranked[low : low + 6])))
        return float((ranked[i] + ranked[i + 1]) / 2)

    iou, stability = gap([row[1] for row in found]), gap([row[2] for row in found])
    return {"iou": iou, "stability": stability, "offset": offset, "nms": nms}


def assert_same(records, rows):
    assert len(records) == len(rows)
    for record, row in zip(records, rows, strict=True):
        # A pixel whose logit is nearly 0 may differ: both enlargements at once, or one by one.
        assert (record["segmentation"] != row["mask"]).mean() < 1e-3
        assert abs(record["area"] - row["mask"].sum()) <= max(2, row["mask"].size / 1000)
        np.testing.assert_allclose(record["predicted_iou"], row["iou"], atol=1e-4)
        np.testing.assert_allclose(record["stability_score"], row["stability"], atol=5e-3)
        np.testing.assert_allclose(record["point_coords"], [row["point"]])
        x0, y0, x1, y1 = row["box"]
        np.testing.assert_allclose(record["bbox"], [x0, y0, x1 - x0, y1 - y0], atol=1)
        x0, y0, x1, y1 = row["crop"]
        assert record["crop_box"] == [x0, y0, x1 - x0, y1 - y0]


@pytest.fixture
def make_sparse_sam(make_tiny_sam, photo):
    """Random weights, and a threshold so high that masks are spots and their boxes differ."""

    def make(**settings):
        sam = make_tiny_sam(**settings)
        sam.mask_threshold = 0.5  # one logit in twenty is higher
        with torch.no_grad():
            sam.mask_decoder.iou_prediction_head.layers[-1].bias += 0.5  # within 0..1
        return sam

    return make


# -- against the reference -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "layers", "pad"),
    [((48, 64), 0, True), ((90, 71), 0, True), ((90, 71), 0, False), ((200, 280), 1, True)],
)
def test_it_is_the_reference(make_sparse_sam, photo, size, layers, pad):
    sam, image = make_sparse_sam(pad=pad), photo(*size)
    grids = build_all_layer_point_grids(5, layers, 2)
    bounds = filters_at(sam, image, grids, 0.6, 0.05, 0.8)
    rows = reference(sam, image, grids, layers, **bounds)
    assert len(rows) > 1
    assert len({tuple(row["crop"]) for row in rows}) > layers
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=5,
        points_per_batch=7,
        pred_iou_thresh=bounds["iou"],
        stability_score_thresh=bounds["stability"],
        stability_score_offset=bounds["offset"],
        box_nms_thresh=bounds["nms"],
        crop_nms_thresh=bounds["nms"],
        crop_n_layers=layers,
        crop_n_points_downscale_factor=2,
    )
    assert_same(generator.generate(image), rows)


def test_without_filters_every_mask_stays(make_tiny_sam, photo):
    """Bounds of 0 filter nothing, and boxes never overlap by more than all."""
    sam, image = make_tiny_sam(), photo(40, 64)
    records = SamAutomaticMaskGenerator(
        sam, points_per_side=3, box_nms_thresh=1.0, **LENIENT
    ).generate(image)
    assert len(records) == 27
    ious = [record["predicted_iou"] for record in records]
    assert ious == sorted(ious, reverse=True)


def test_the_model_s_own_decoder_for_hq(make_tiny_sam, photo):
    sam, image = make_tiny_sam(is_hq=True), photo(40, 64)
    records = SamAutomaticMaskGenerator(
        sam, points_per_side=3, box_nms_thresh=1.0, **LENIENT
    ).generate(image)
    assert len(records) == 9  # one mask of a point
    assert all(record["segmentation"].shape == (40, 64) for record in records)


def test_given_grids(make_tiny_sam, photo):
    sam, image = make_tiny_sam(), photo(40, 64)
    grids = [np.array([[0.25, 0.5], [0.75, 0.5]])]
    records = SamAutomaticMaskGenerator(
        sam, None, point_grids=grids, box_nms_thresh=1.0, **LENIENT
    ).generate(image)
    assert {tuple(record["point_coords"][0]) for record in records} == {(16, 20), (48, 20)}


# -- forms and sizes -------------------------------------------------------------------------------


def decode_runs(counts, size):
    """Column by column, beginning with what is not mask."""
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(size[::-1]).T


def test_output_modes_say_the_same(make_sparse_sam, photo):
    sam, image = make_sparse_sam(), photo(50, 70)
    modes = "binary_mask", "uncompressed_rle", "coco_rle"
    binary, plain, coco = (
        SamAutomaticMaskGenerator(sam, 4, output_mode=mode, **LENIENT).generate(image)
        for mode in modes
    )
    assert len(binary) == len(plain) == len(coco) > 1
    for mask, runs, text in zip(binary, plain, coco, strict=True):
        own = runs["segmentation"]
        assert own["size"] == text["segmentation"]["size"] == [50, 70]
        assert np.array_equal(decode_runs(own["counts"], own["size"]), mask["segmentation"])
        assert isinstance(text["segmentation"]["counts"], str)
        assert np.array_equal(rle.decode(text["segmentation"]), mask["segmentation"])
        assert mask["area"] == runs["area"] == text["area"] == mask["segmentation"].sum()
        for key in set(mask) - {"segmentation"}:
            assert mask[key] == runs[key] == text[key]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (33, 2)])
@pytest.mark.parametrize("layers", [0, 2])
def test_images_of_few_pixels(make_tiny_sam, photo, size, layers):
    generator = SamAutomaticMaskGenerator(
        make_tiny_sam(), points_per_side=2, crop_n_layers=layers, **LENIENT
    )
    for record in generator.generate(photo(*size)):
        assert record["segmentation"].shape == size


def test_every_kind_of_image(make_tiny_sam, photo):
    generator = SamAutomaticMaskGenerator(make_tiny_sam(), points_per_side=2, **LENIENT)
    grey = photo(30, 40)[:, :, 0]
    plain = generator.generate(np.repeat(grey[:, :, None], 3, axis=2))
    opaque = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    for image in (grey, opaque):
        records = generator.generate(image)
        assert len(records) == len(plain) > 0
        for record, wanted in zip(records, plain, strict=True):
            assert np.array_equal(record["segmentation"], wanted["segmentation"])


def test_an_embedding_will_do(make_tiny_sam, photo):
    sam, image = make_tiny_sam(), photo(40, 64)
    generator = SamAutomaticMaskGenerator(sam, 3, **LENIENT)
    (embedding,) = Segmenter(sam).embed(image)
    wanted = generator.generate(image)
    assert len(wanted) > 0
    for found, same in zip(generator.generate(embedding), wanted, strict=True):
        assert found.pop("segmentation").tolist() == same.pop("segmentation").tolist()
        assert found == same
    with pytest.raises(ValueError, match="an embedding has no pixels"):
        SamAutomaticMaskGenerator(sam, 3, crop_n_layers=1).generate(embedding)
    with pytest.raises(ValueError, match="made by an encoder with weights"):
        SamAutomaticMaskGenerator(make_tiny_sam(seed=4), 3).generate(embedding)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize(
    "bounds, words",
    [
        ({"pred_iou_thresh": 1}, r"0 of {n} points passed pred_iou_thresh 1 \(best .*\); try"),
        (
            {"pred_iou_thresh": 0, "stability_score_thresh": 1, "stability_score_offset": 99},
            r"0 of {m} masks passed stability_score_thresh 1 \(best 0\.\d\d\); try",
        ),
    ],
)
def test_a_warning_says_which_threshold_rejected_everything(
    make_tiny_sam, photo, layers, bounds, words
):
    sam, image = make_tiny_sam(), photo(40, 64)
    with torch.no_grad():
        sam.mask_decoder.iou_prediction_head.layers[-1].weight.mul_(0.01)
    generator = SamAutomaticMaskGenerator(
        sam, 2, crop_n_layers=layers, min_mask_region_area=9, **bounds
    )
    points = 4 * (1 + 4 * layers)
    with pytest.warns(UserWarning, match=words.format(n=points, m=3 * points)):
        assert generator.generate(image) == []


def test_a_mask_is_enlarged_only_where_it_can_be(make_tiny_sam, photo, monkeypatch):
    """Nothing ever holds masks in the size of the image: neither torch nor what is kept."""

    def refuse(*arguments):
        raise AssertionError("a whole mask was made")

    monkeypatch.setattr(decoder, "upscale", refuse)
    monkeypatch.setattr(candidates.mask_ops, "fill", refuse)
    generator = SamAutomaticMaskGenerator(make_tiny_sam(), 4, output_mode="coco_rle", **LENIENT)
    assert generator.generate(photo(50, 70))


# -- small regions ---------------------------------------------------------------------------------


def test_small_regions_go(make_tiny_sam, photo, monkeypatch):
    """Holes are filled and islands go; masks that changed come last, and yield to others."""
    size = (40, 40)
    tidy, holed, island, close = (np.zeros(size, bool) for _ in range(4))
    tidy[2:12, 2:12] = True
    holed[20:32, 20:32] = True
    holed[25, 25] = False
    island[2:12, 22:34] = True
    island[38, 38] = True
    close[20:32, 20:32] = True  # what holed becomes

    def found(self, *arguments):
        made = []
        for score, mask in ((0.9, holed), (0.8, tidy), (0.7, island), (0.6, close)):
            crop = [0, 0, 40, 40]
            counts, box = rle.runs_and_box(mask, 0, 0, size, (0, 0))
            made.append(candidates.Candidate(counts, box, score, 1.0, (1.0, 1.0), crop))
        return made

    monkeypatch.setattr(SamAutomaticMaskGenerator, "_candidates", found)
    make = make_tiny_sam()
    left = SamAutomaticMaskGenerator(make, 2).generate(photo(*size))
    assert [record["predicted_iou"] for record in left] == [0.9, 0.8, 0.7, 0.6]
    records = SamAutomaticMaskGenerator(make, 2, min_mask_region_area=4).generate(photo(*size))
    assert [record["predicted_iou"] for record in records] == [0.8, 0.6, 0.7]
    assert np.array_equal(records[0]["segmentation"], tidy)
    assert records[2]["bbox"] == [22, 2, 11, 9]
    assert records[2]["area"] == 120


# -- progress, threads of state, and errors --------------------------------------------------------


def test_progress_counts_points(make_tiny_sam, photo):
    seen = []
    generator = SamAutomaticMaskGenerator(
        make_tiny_sam(),
        *(4, 10, *LENIENT.values()),
        crop_n_layers=1,
        crop_n_points_downscale_factor=2,
    )
    generator.generate(photo(60, 60), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 32), (16, 32), (20, 32), (24, 32), (28, 32), (32, 32)]


def test_changed_weights_count(make_tiny_sam, photo):
    sam, image = make_tiny_sam(seed=5), photo(40, 64)
    generator = SamAutomaticMaskGenerator(sam, 2, box_nms_thresh=1.0, **LENIENT)
    before = [record["predicted_iou"] for record in generator.generate(image)]
    with torch.no_grad():
        sam.mask_decoder.iou_prediction_head.layers[-1].bias += 1
    after = [record["predicted_iou"] for record in generator.generate(image)]
    np.testing.assert_allclose(after, np.array(before) + 1, atol=1e-5)  # float32


def test_arguments_are_those_of_segment_anything():
    names = list(inspect.signature(SamAutomaticMaskGenerator).parameters)
    assert names[:14] == [
        *("model", "points_per_side", "points_per_batch", "pred_iou_thresh"),
        *("stability_score_thresh", "stability_score_offset", "box_nms_thresh", "crop_n_layers"),
        *("crop_nms_thresh", "crop_overlap_ratio", "crop_n_points_downscale_factor"),
        *("point_grids", "min_mask_region_area", "output_mode"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"points_per_side": None}, "exactly one of points_per_side and point_grids.*came none"),
        ({"point_grids": [[[0.5, 0.5]]]}, "came both; to give point_grids, set points_per_side"),
        ({"points_per_side": 0}, "points_per_side must be at least 1, came 0"),
        ({"points_per_batch": 0}, "points_per_batch must be at least 1, came 0"),
        ({"stability_score_offset": -1}, "stability_score_offset must be at least 0, came -1"),
        ({"pred_iou_thresh": float("nan")}, "pred_iou_thresh must be from 0 to 1, came nan"),
        ({"pred_iou_thresh": 7}, "pred_iou_thresh must be from 0 to 1, came 7"),
        ({"stability_score_thresh": -0.1}, "stability_score_thresh must be from 0 to 1, came -0"),
        ({"box_nms_thresh": 1.1}, "box_nms_thresh must be from 0 to 1, came 1.1"),
        ({"crop_n_layers": -1}, "crop_n_layers must be at least 0, came -1"),
        ({"crop_overlap_ratio": 1.0}, "crop_overlap_ratio must be at least 0 and below 1, came 1"),
        ({"min_mask_region_area": -3}, "min_mask_region_area must be at least 0, came -3"),
        ({"output_mode": "png"}, "output_mode must be one of .*'coco_rle'.*, came 'png'"),
    ],
)
def test_arguments_that_cannot_be(make_tiny_sam, arguments, words):
    with pytest.raises(ValueError, match=words):
        SamAutomaticMaskGenerator(make_tiny_sam(), **arguments)


def test_it_wants_a_sam(make_tiny_vit):
    with pytest.raises(
        TypeError, match=r"wants a Sam, as build_sam makes it, or the name or path .* came TinyViT"
    ):
        SamAutomaticMaskGenerator(make_tiny_vit(0))


def a_region(mask, inner=3, outer=4):
    return Region(np.array(mask, bool), 1, 2, inner, outer)


def test_a_mask_of_a_crop_is_placed_in_the_image():
    mask, crop = np.array([[0, 1, 1], [0, 0, 1]], bool), [10, 20, 40, 40]
    counts, box = rle.runs_and_box(mask, 21, 12, (60, 80), (crop[1], crop[0]))
    assert box == (10 + 2 + 1, 20 + 1, 10 + 2 + 2, 20 + 2)
    whole = np.zeros((60, 80), bool)
    whole[21:23, 12:15] = mask
    assert np.array_equal(rle.fill((60, 80), counts), whole)
    assert box == (*np.argwhere(whole).min(0)[::-1], *np.argwhere(whole).max(0)[::-1])


def test_an_empty_mask_is_a_point_in_its_crop():
    """segment-anything gives it the box 0, 0, 0, 0 of the crop."""
    empty, crop = np.zeros((2, 2), bool), [10, 20, 40, 40]
    counts, box = rle.runs_and_box(empty, 21, 12, (60, 80), (crop[1], crop[0]))
    assert box == (10, 20, 10, 20)
    assert not rle.fill((60, 80), counts).any()


def test_a_candidate_is_small():
    """A disc in 12 megapixels: two numbers for each of its columns."""
    y, x = np.ogrid[:1000, :1000]
    disc = (y - 500) ** 2 + (x - 500) ** 2 < 400**2
    counts, _ = rle.runs_and_box(disc, 2000, 1000, (3000, 4000), (0, 0))
    assert counts.nbytes < disc.size / 50
    assert counts[1::2].sum() == disc.sum()


def test_stability_is_compared_in_single_precision():
    assert a_region([[1]], 19, 20).stability == float(np.float32(0.95))
    assert np.isnan(a_region([[0]], 0, 0).stability)
    assert a_region([[1]], 1, 3).stability == pytest.approx(1 / 3)


def test_thresholds_are_the_callers_then_the_checkpoints_then_segment_anythings(make_tiny_sam):
    sam = make_tiny_sam()
    generator = SamAutomaticMaskGenerator(sam)
    assert generator.pred_iou_thresh == 0.88
    assert generator.stability_score_thresh == 0.95
    assert generator.stability_score_offset == 1.0
    sam.thresholds = {"pred_iou_thresh": 0.5, "stability_score_offset": 0.25}
    generator = SamAutomaticMaskGenerator(sam, stability_score_offset=0.75)
    assert generator.pred_iou_thresh == 0.5
    assert generator.stability_score_thresh == 0.95
    assert generator.stability_score_offset == 0.75


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png", "rocket.jpg"])
def test_the_embedded_weights_find_masks_with_no_options(name):
    generator = SamAutomaticMaskGenerator("tinyvit_sam_2m", points_per_side=16)
    assert len(generator.generate(f"examples/pictures/{name}")) > 3
