from __future__ import annotations

import errno
import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import make_tiny_sam, write_image
from tinyvit.errors import CheckpointError
from tinyvit.folders.images import list_images
from tinyvit.folders.segment import SegmentFolder, write_logits
from tinyvit.images import draw, mask_ops
from tinyvit.images.decode import decode
from tinyvit.sam import Prompt, SamAutomaticMaskGenerator, SamPredictor, Segmenter

POINT = Prompt(points=[[20, 10]])
BOX = Prompt(box=[5, 5, 30, 20], name="thing")


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        write_image(tmp_path / "in" / f"{number}.png", 24, 40, number)
    return tmp_path / "in"


@pytest.fixture
def make_work(tmp_path):
    def make(sam=None, precision="fp32", batch_size=1, pad=None, **changes):
        sam = make_tiny_sam() if sam is None else sam
        segmenter = Segmenter(sam, precision=precision, batch_size=batch_size, pad=pad)
        return SegmentFolder(segmenter, tmp_path / "out", "a name", **changes)

    return make


def items_of(folder, *prompts):
    return [replace(item, prompts=prompts) for item in list_images([folder])]


def document(outcome):
    with open(outcome.told["document"], encoding="utf-8") as file:
        return json.load(file)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_masks_are_the_predictor_s(make_work, folder, tmp_path):
    sam = make_tiny_sam()
    first, *_ = make_work(sam, with_logits=True).run(items_of(folder, POINT, BOX))
    predictor = SamPredictor(sam)
    predictor.set_image(decode(folder / "0.png"))
    masks, scores, low_res = predictor.predict(np.array([[20, 10]]), np.array([1]))
    best = int(scores.argmax())
    saved = np.asarray(Image.open(tmp_path / "out" / "0.mask-1.png"))
    np.testing.assert_array_equal(saved, np.where(masks[best], 255, 0))
    annotation = document(first)["annotations"][0]
    np.testing.assert_array_equal(mask_ops.decode(annotation["segmentation"]), masks[best])
    np.testing.assert_allclose(annotation["score"], scores[best], atol=1e-5)  # other batch
    logits = np.load(tmp_path / "out" / "0.logits-1.npy")
    np.testing.assert_allclose(logits, low_res[best], atol=1e-4)
    of_box, _, _ = predictor.predict(box=np.array([5, 5, 30, 20]), multimask_output=False)
    second = np.asarray(Image.open(tmp_path / "out" / "0.mask-2.png"))
    np.testing.assert_array_equal(second > 0, of_box[0])
    assert list(first.told["seconds"]) == ["read", "encode", "decode", "write"]
    assert all(value > 0 for value in first.told["seconds"].values())


def test_the_document_is_what_coco_has(make_work, folder):
    first, *_ = make_work().run(items_of(folder, POINT, BOX))
    found = document(first)
    assert found["images"] == [{"id": 1, "file_name": "0.png", "height": 24, "width": 40}]
    assert found["categories"] == [{"id": 1, "name": "object"}]
    assert found["info"]["files"] == ["0.mask-1.png", "0.mask-2.png", "0.overlay.png"]
    assert found["info"]["is_complete"] is True
    assert found["info"]["seconds"] == first.told["seconds"]
    annotation = found["annotations"][1]
    mask = mask_ops.decode(annotation["segmentation"])
    rows, columns = np.nonzero(mask)
    left, top = columns.min(), rows.min()
    assert annotation == {
        **{"id": 2, "image_id": 1, "category_id": 1, "iscrowd": 0, "object": 2},
        "segmentation": mask_ops.encode(mask),
        "bbox": [left, top, columns.max() + 1 - left, rows.max() + 1 - top],
        "area": int(mask.sum()),
        "score": annotation["score"],
        "prompt": {"box": [5, 5, 30, 20], "name": "thing"},
        "mask": "0.mask-2.png",
    }
    told = {key: annotation[key] for key in ("bbox", "area", "score", "object", "mask")}
    assert (first.told["count"], first.told["masks"][1]) == (2, told)


def test_multimask_writes_three_of_each(make_work, folder, tmp_path):
    first, *_ = make_work(multimask=True, with_logits=True).run(items_of(folder, POINT, BOX))
    masks = first.told["masks"]
    assert [(one["object"], one["candidate"]) for one in masks] == [
        *((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
    ]
    for number in (1, 2):
        scores = [one["score"] for one in masks if one["object"] == number]
        best = [one["score"] for one in masks if one["object"] == number and one["is_best"]]
        assert best == [max(scores)]
    assert [one["mask"] for one in masks][1::2] == [
        *("0.mask-1-2.png", "0.mask-2-1.png", "0.mask-2-3.png")
    ]
    assert [n for n in names(tmp_path / "out") if n.startswith("0.logits")] == [
        *("0.logits-1.npy", "0.logits-2.npy")
    ]


def test_light_hq_sam_gives_one(make_work, folder):
    first, *_ = make_work(make_tiny_sam(is_hq=True), multimask=True).run(items_of(folder, POINT))
    (mask,) = first.told["masks"]
    assert mask["mask"] == "0.mask-1.png"
    assert "candidate" not in mask


def test_the_overlay_shows_the_best_masks_and_the_prompts(make_work, folder):
    prompt = Prompt(points=[[30, 12]], labels=[0], box=[4, 4, 36, 20])
    first, *_ = make_work(multimask=True).run(items_of(folder, prompt))
    found = [one for one in document(first)["annotations"] if one["is_best"]]
    wanted = draw.draw_masks(decode(folder / "0.png"), [mask_ops.decode(found[0]["segmentation"])])
    wanted = draw.draw_points(draw.draw_boxes(wanted, [[4, 4, 36, 20]]), [[30, 12]], [0])
    np.testing.assert_array_equal(decode(first.told["overlay"]), wanted)


def test_batches_change_no_mask(make_work, folder):
    items = items_of(folder, POINT)
    found = [
        [document(one)["annotations"][0]["segmentation"] for one in work.run(items)]
        for work in (make_work(), make_work(batch_size=3, overwrite=True))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_a_prompt_that_does_not_fit_is_a_failure_and_the_next_image_goes_on(make_work, folder):
    images = list_images([folder])
    prompts = (POINT, Prompt(points=[[10, 30]])), (Prompt(mask=np.ones((3, 3), bool)),), (POINT,)
    items = [replace(image, prompts=own) for image, own in zip(images, prompts, strict=True)]
    first, second, third = make_work().run(items)
    words = f"{images[0].path}: object 2: point 0 at (x, y) = (10, 30) lies outside"
    assert first.reason.startswith(words)
    assert second.reason.startswith(f"{images[1].path}: a mask prompt must be a bool mask of the")
    assert [one.state for one in (first, second, third)] == ["failed", "failed", "written"]


def test_features_that_are_not_finite(make_work, folder):
    sam = make_tiny_sam(seed=3)
    with torch.no_grad():
        for parameter in sam.image_encoder.neck.parameters():
            parameter.fill_(float("nan"))
    first, *_ = make_work(sam).run(items_of(folder, POINT))
    assert first.reason.endswith(": its features are not all finite numbers; try --precision fp32")


def test_everything_is_the_generator_s(make_work, folder, tmp_path):
    sam, told = make_tiny_sam(), []

    @contextmanager
    def progress(name):
        yield lambda done, total: told.append((name, done, total))

    arguments = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    first, *_ = make_work(sam, everything=arguments, progress=progress).run(items_of(folder))
    generator = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **arguments)
    wanted = generator.generate(decode(folder / "0.png"))
    assert wanted
    extra = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    assert document(first)["annotations"] == [
        {"id": number, **extra, **record} for number, record in enumerate(wanted, 1)
    ]
    assert document(first)["info"]["task"] == {"mode": "everything", **arguments}
    assert ("0.png", 16, 16) in told
    assert list(first.told["seconds"]) == ["read", "generate", "write"]
    assert (first.told["count"], first.told["masks"]) == (len(wanted), [])
    assert [n for n in names(tmp_path / "out") if n.startswith("0")] == ["0.json", "0.overlay.png"]


def test_the_facts_name_the_whole_model(make_work):
    facts = make_work(precision="bf16", pad=False).facts
    assert (facts["made_by"], facts["checkpoint"]) == ("tinyvit segment", "a name")
    assert (facts["precision"], facts["image_spec"]["pad"]) == ("bf16", False)
    other = make_tiny_sam()
    with torch.no_grad():  # the decoder counts too
        other.mask_decoder.iou_token.weight += 1
    assert make_work(other).facts["model_sha256"] != facts["model_sha256"]


def test_what_is_there_is_kept_unless_prompts_differ(make_work, folder, tmp_path):
    ones, zeros = np.ones((24, 40), bool), np.eye(24, 40, dtype=bool)
    work = make_work()
    first = items_of(folder, Prompt(mask=ones), POINT)
    assert {one.state for one in work.run(first)} == {"written"}
    same = items_of(folder, Prompt(mask=ones.copy()), POINT)
    assert {one.state for one in work.run(same)} == {"skipped"}
    changed = list(work.run(items_of(folder, Prompt(mask=zeros))))
    assert {one.reason for one in changed} == {"made with other prompts or options"}
    assert "0.mask-2.png" not in names(tmp_path / "out")  # fewer than before leave none behind
    (tmp_path / "out" / "0.mask-2.png").write_text("mine")
    foreign, *_ = work.run(first)
    assert foreign.state == "failed"
    assert "0.mask-2.png is there already and was not made by this command" in foreign.reason


def test_an_input_is_never_replaced(make_work, tmp_path):
    paths = [write_image(tmp_path / "out" / name) for name in ("a.png", "a.mask-1.png")]
    before = paths[1].read_bytes()
    items = [replace(item, prompts=(POINT,)) for item in list_images(paths)]
    first, *_ = make_work(overwrite=True).run(items)
    assert first.state == "failed"
    assert "would replace one of the images; write to another folder" in first.reason
    assert paths[1].read_bytes() == before


def test_a_full_disk_stops_and_what_is_half_done_is_known(make_work, folder, tmp_path, monkeypatch):
    def refuse(path, pixels):
        raise OSError(errno.ENOSPC, "No space left on device")

    work = make_work()
    with monkeypatch.context() as patch:
        patch.setattr(draw, "save_png", refuse)
        with pytest.raises(OSError, match="No space left"):
            list(work.run(items_of(folder, POINT)))
    assert not list((tmp_path / "out").glob("*.part")) + list((tmp_path / "out").glob("*.tmp"))
    outcomes = list(work.run(items_of(folder, POINT)))
    assert [outcome.state for outcome in outcomes] == ["written"] * 3
    assert "left unfinished" in {outcome.reason for outcome in outcomes}


def test_logits_are_whole_or_not_there(tmp_path):
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_logits(tmp_path / "a.npy", logits)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), logits)
    with pytest.raises(CheckpointError, match="no folder"):
        write_logits(tmp_path / "none" / "a.npy", logits)
    assert names(tmp_path) == ["a.npy"]
