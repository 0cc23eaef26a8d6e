import numpy as np
import pytest
import torch

from history import read_stages
from tinyvit.catalog import VARIANTS
from tinyvit.sam import build_sam
from tinyvit.train import TrainSettings
from tinyvit.train.settings import settings_of
from tinyvit.train.tasks.settings import SegmentSettings

from .recipe_files import RECIPE, load

train, composites = load("train"), load("composites")

OWN = {"start", "encoder", "decoder", "teacher", "kinds", "things", "regions"}
FILES = ["stages.toml", "control.toml", "tiny.toml"]


@pytest.mark.parametrize("file", FILES)
def test_every_stage_can_be_trained(file):
    stages = read_stages(RECIPE / file)
    known = OWN | set(settings_of(TrainSettings)) | set(settings_of(SegmentSettings))
    known |= set(composites.CompositeSettings.__dataclass_fields__)
    for place, (name, stage) in enumerate(stages.items()):
        assert set(stage) <= known
        TrainSettings.from_mapping({"folder": "run", **train._own(TrainSettings, stage)}, name)
        own = train._own(SegmentSettings, stage, ("teacher", "model", "img_size", "seed"))
        SegmentSettings("data", **own)
        composites.CompositeSettings(**train._own(composites.CompositeSettings, stage))
        assert stage["model"] in {row.name for row in VARIANTS if row.task == "sam"}
        assert set(stage["kinds"]) <= {"photo", "cutout", "render", "emoji", "clipart"}
        assert stage["regions"] + stage["things"] < 1
        for key in ("start", "decoder", "teacher"):
            named = stage.get(key, "")
            is_earlier = named in list(stages)[:place]
            is_known = (RECIPE / named).is_file() or (key, named) == ("teacher", "lite2")
            assert not named or is_earlier or is_known


def test_the_weights_it_begins_with_are_there(tmp_path):
    first = next(iter(read_stages(train.STAGES).values()))
    path = train.found(tmp_path, first["start"])
    assert path == str(RECIPE / "start" / "starter.safetensors")
    assert build_sam(path).image_encoder.embed_dims == (32, 64, 96, 160)


def test_a_stage_is_found_by_its_name(tmp_path):
    assert train.found(tmp_path, "") == "" and train.found(tmp_path, "mobile_sam") == "mobile_sam"
    folder = tmp_path / "runs" / "learn"
    folder.mkdir(parents=True)
    (folder / "last.safetensors").touch()
    assert train.found(tmp_path, "learn") == str(folder / "last.safetensors")
    (folder / "best.safetensors").touch()
    assert train.found(tmp_path, "learn") == str(folder / "best.safetensors")


STAGE = {
    "start": "", "model": "tiny_vit_2m_sam", "img_size": 64, "objects": 2, "things": 0.5,
    "regions": 0.0, "seed": 3, "kinds": {"photo": 1.0},
}  # fmt: skip


def test_the_mix_reaches_the_samples(tmp_path, make_supply):
    task = train.task_of(make_supply(tmp_path), {**STAGE, "crowds": 0.25})
    assert task.data.settings.crowds == 0.25 and task.data.things == 0.5
    samples = [task.sample(i, np.random.default_rng(i)) for i in range(12)]
    kinds = {sample["masks"].dtype for sample in samples}
    assert kinds == {np.dtype(bool), np.dtype(np.float32)}
    batch = task.collate(samples)  # of both kinds
    assert task.loss(task.model, batch, torch.Generator().manual_seed(0))[0].isfinite()


def test_a_decoder_of_another_stage_is_taken(tmp_path, make_supply, tiny_sam_file):
    work = make_supply(tmp_path)
    other = train.task_of(work, {**STAGE, "seed": 4})
    (work / "runs" / "other").mkdir(parents=True)
    other.save(other.model, work / "runs" / "other" / "last.safetensors")
    sam = train.task_of(work, {**STAGE, "decoder": "other"}).model
    ours, theirs = sam.state_dict(), other.model.state_dict()
    key = "mask_decoder.iou_token.weight"
    assert torch.equal(ours[key], theirs[key])
    key = "image_encoder.neck.0.weight"
    assert not torch.equal(ours[key], theirs[key])
