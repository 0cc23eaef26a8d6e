from dataclasses import fields

import pytest

from history import read_stages
from tinyvit.catalog import VARIANTS
from tinyvit.sam import build_sam
from tinyvit.train import TrainSettings

from .recipe_files import RECIPE, load

train = load("train")

OWN = {
    "start", "model", "img_size", "objects", "box_share", "corrective_share", "most_corrections",
    "focal", "kinds", "regions", "val_masks",
}  # fmt: skip


@pytest.mark.parametrize("file", ["stages.toml", "gpu.toml", "tiny.toml"])
def test_every_stage_can_be_trained(file):
    loops = {field.name for field in fields(TrainSettings)}
    for name, stage in read_stages(RECIPE / file).items():
        assert set(stage) <= OWN | loops and set(stage) >= OWN - {"regions"}
        loop = {key: value for key, value in stage.items() if key in loops}
        TrainSettings.from_mapping({"folder": "run", **loop}, name)
        assert stage["model"] in {row.name for row in VARIANTS if row.task == "sam"}
        assert set(stage["kinds"]) == {"photo", "render", "emoji", "clipart"}


def test_the_weights_it_begins_with_are_there():
    first = next(iter(read_stages(train.STAGES).values()))
    path = train.beside(first["start"])
    assert path == str(RECIPE / "start" / "first.safetensors")
    assert build_sam(path).image_encoder.embed_dims == (32, 64, 96, 160)


def test_a_name_or_nothing_stays_as_it_is():
    assert train.beside("") == "" and train.beside("mobile_sam") == "mobile_sam"
