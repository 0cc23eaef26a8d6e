from __future__ import annotations

import errno
import json

import numpy as np
import pytest
from PIL import Image

from tinyvit.errors import CheckpointError
from tinyvit.folders.images import list_images
from tinyvit.folders.segment import Answer, Job, Names
from tinyvit.images import draw
from tinyvit.images import draw as segments
from tinyvit.images.decode import decode
from tinyvit.sam import Prompt
from tinyvit.sam import mask_ops as rle

FACTS = {
    **{"made_by": "tinyvit segment", "model_sha256": "m", "image_spec": {}},
    "precision": "fp32",
}
POINT = (Prompt(points=[[5, 5]]),)


class HalfMethod:
    """Says that the left half of each image is the object."""

    engine = None

    def __init__(self, fails=()):
        self.fails, self.seen, self.open = fails, [], 0

    def facts(self, prompts):
        return {"prompts": [prompt.describe() for prompt in prompts]}

    def names(self, folder, stem, prompts):
        return Names.of(folder, stem, len(prompts), 1, False)

    def prepare(self, image):
        self.open += 1
        return None

    def answers(self, readings):
        for reading in readings:
            name = reading.task.image.name
            self.seen.append((name, self.open))
            failure = "of no use" if name in self.fails else ""
            yield Answer(reading, self._annotations(reading), failure=failure)

    def _annotations(self, reading):
        height, width = reading.image.shape[:2]
        for _ in reading.task.prompts:
            mask = np.zeros((height, width), bool)
            mask[:, : width // 2] = True
            reading.seconds["decode"] = 0.5
            yield {"segmentation": rle.encode(mask), "score": 0.5, "prompt": {}}, mask


@pytest.fixture
def folder(tmp_path, photo):
    for number in range(4):
        photo(tmp_path / "in" / f"{number}.png", 24, 40, number)
    return tmp_path / "in"


def work_of(folder, prompts=POINT):
    return [(image, prompts) for image in list_images([folder])]


def test_files_are_written_and_told(folder, tmp_path):
    outcomes = list(Job(HalfMethod(), tmp_path / "out", FACTS).run(work_of(folder)))
    assert [outcome.state for outcome in outcomes] == ["written"] * 4
    assert [outcome.image.name for outcome in outcomes] == ["0.png", "1.png", "2.png", "3.png"]
    first = outcomes[0]
    assert first.masks == ({"score": 0.5, "mask": "0.mask-1.png"},)
    assert (first.count, first.seconds["decode"]) == (1, 0.5)
    mask = np.asarray(Image.open(tmp_path / "out" / "0.mask-1.png"))
    assert mask.shape == (24, 40)
    assert (mask[:, :20] == 255).all() and not mask[:, 20:].any()
    content = json.loads((tmp_path / "out" / "0.json").read_text())
    assert content["info"]["is_complete"]
    assert content["info"]["seconds"]["decode"] == 0.5
    np.testing.assert_array_equal(rle.decode(content["annotations"][0]["segmentation"]), mask > 0)


def test_the_overlay_shows_the_best_masks_and_the_prompts(folder, tmp_path):
    prompts = (Prompt(points=[[30, 12]], labels=[0], box=[4, 4, 36, 20]),)
    list(Job(HalfMethod(), tmp_path / "out", FACTS).run(work_of(folder, prompts)))
    image = decode(folder / "0.png")
    mask = np.zeros((24, 40), bool)
    mask[:, :20] = True
    wanted = segments.draw_masks(image, [mask])
    wanted = segments.draw_boxes(wanted, [[4, 4, 36, 20]])
    wanted = segments.draw_points(wanted, [[30, 12]], [0])
    np.testing.assert_array_equal(decode(tmp_path / "out" / "0.overlay.png"), wanted)


def test_candidates_that_are_not_best_are_not_drawn(folder, tmp_path):
    class Candidates(HalfMethod):
        def _annotations(self, reading):
            for annotation, mask in super()._annotations(reading):
                yield {**annotation, "is_best": False}, mask

    list(
        Job(Candidates(), tmp_path / "out", FACTS).run(work_of(folder, (Prompt(box=[1, 1, 9, 9]),)))
    )
    image = decode(folder / "0.png")
    wanted = segments.draw_boxes(image, [[1, 1, 9, 9]])
    np.testing.assert_array_equal(decode(tmp_path / "out" / "0.overlay.png"), wanted)


def test_broken_images_and_failures_stop_nothing(folder, tmp_path):
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    method = HalfMethod(fails=["2.png"])
    outcomes = list(Job(method, tmp_path / "out", FACTS).run(work_of(folder)))
    states = {outcome.image.name: outcome.state for outcome in outcomes}
    assert states == {"0.png": "written", "1.png": "failed", "2.png": "failed", "3.png": "written"}
    reasons = {outcome.image.name: outcome.reason for outcome in outcomes}
    assert reasons["2.png"] == f"{folder / '2.png'}: of no use"
    assert "1.png" in reasons["1.png"]
    assert len(list((tmp_path / "out").glob("*.json"))) == 2


def test_nothing_but_broken_images(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    outcomes = list(Job(HalfMethod(), tmp_path / "out", FACTS).run(work_of(tmp_path / "in")))
    assert [outcome.state for outcome in outcomes] == ["failed"]
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept(folder, tmp_path):
    method = HalfMethod()
    job = Job(method, tmp_path / "out", FACTS)
    list(job.run(work_of(folder)))
    again = list(job.run(work_of(folder)))
    assert [outcome.state for outcome in again] == ["skipped"] * 4
    assert len(method.seen) == 4
    forced = list(Job(method, tmp_path / "out", FACTS, overwrite=True).run(work_of(folder)))
    assert [(one.state, one.reason) for one in forced] == [("written", "")] * 4
    other = work_of(folder, (Prompt(points=[[6, 6]]),))
    changed = list(job.run(other))
    assert {one.reason for one in changed} == {"made with other prompts or options"}


def test_no_more_is_read_ahead_than_allowed(tmp_path, photo):
    for number in range(12):
        photo(tmp_path / "in" / f"{number:02}.png", 8, 8, number)
    method = HalfMethod()
    job = Job(method, tmp_path / "out", FACTS, workers=1, ahead=2)
    list(job.run(work_of(tmp_path / "in")))
    assert all(opened <= number + 1 + 2 for number, (_, opened) in enumerate(method.seen))


def test_an_input_is_never_replaced(tmp_path, photo):
    for name in ("a.png", "a.mask-1.png"):
        photo(tmp_path / name)
    images = list_images([tmp_path / "a.png", tmp_path / "a.mask-1.png"])
    before = (tmp_path / "a.mask-1.png").read_bytes()
    job = Job(HalfMethod(), tmp_path, FACTS, overwrite=True)
    first, *_ = job.run([(image, POINT) for image in images])
    assert first.state == "failed"
    assert "would replace one of the images; write to another folder" in first.reason
    assert (tmp_path / "a.mask-1.png").read_bytes() == before


def test_a_full_disk_stops_and_what_is_half_done_is_known(folder, tmp_path, monkeypatch):
    def refuse(path, pixels):
        raise OSError(errno.ENOSPC, "No space left on device")

    job = Job(HalfMethod(), tmp_path / "out", FACTS)
    with monkeypatch.context() as patch:
        patch.setattr(draw, "save_png", refuse)
        with pytest.raises(OSError, match="No space left"):
            list(job.run(work_of(folder)))
    assert not list((tmp_path / "out").glob("*.part")) + list((tmp_path / "out").glob("*.tmp"))
    outcomes = list(job.run(work_of(folder)))
    assert [outcome.state for outcome in outcomes] == ["written"] * 4
    assert "left unfinished" in {outcome.reason for outcome in outcomes}


def test_a_document_that_cannot_be_written_stops_too(folder, tmp_path, monkeypatch):
    def refuse(path, write):
        raise CheckpointError("no") from OSError(errno.EACCES, "no")

    monkeypatch.setattr("tinyvit.folders.segment.write_text", refuse)
    with pytest.raises(CheckpointError, match="no"):
        list(Job(HalfMethod(), tmp_path / "out", FACTS).run(work_of(folder)))


def test_a_name_too_long_is_one_image_s_affair(tmp_path, photo):
    photo(tmp_path / "in" / f"{'x' * 240}.png")
    photo(tmp_path / "in" / "y.png")
    outcomes = list(Job(HalfMethod(), tmp_path / "out", FACTS).run(work_of(tmp_path / "in")))
    assert [outcome.state for outcome in outcomes] == ["failed", "written"]
    assert "too long" in outcomes[0].reason
