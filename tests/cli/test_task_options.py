from dataclasses import fields
from typing import get_args

import pytest

from tinyvit.cli.settings_options import (
    CLASSIFY,
    CONTROL,
    DISTILL_FEATURES,
    DISTILL_LOGITS,
    LOOP,
    SEGMENT,
)
from tinyvit.train.data.augment import Strength
from tinyvit.train.data.images import OnBroken
from tinyvit.train.tasks.classify import ClassifySettings
from tinyvit.train.tasks.distill import DistillFeaturesSettings
from tinyvit.train.tasks.losses import FeatureLoss
from tinyvit.train.tasks.segment import SegmentSettings

ALONE = {  # what is no setting of the task, or is chosen by another
    "classify": set(),
    "distill-logits": {"logits"},
    "distill-features": {"data", "features", "checkpoint", "model", "img_size", "sam"},
    "segment": set(),
}
NOT_HERE = {  # the loop has it; or it has no meaning here
    "classify": {"seed"},
    "distill-logits": {"seed", "mixup", "cutmix", "smoothing"},
    "distill-features": set(),
    "segment": {"seed"},
}
CASES = [
    ("classify", CLASSIFY, ClassifySettings),
    ("distill-logits", DISTILL_LOGITS, ClassifySettings),
    ("distill-features", DISTILL_FEATURES, DistillFeaturesSettings),
    ("segment", SEGMENT, SegmentSettings),
]


@pytest.mark.parametrize(("name", "rows", "settings"), CASES, ids=[case[0] for case in CASES])
def test_every_setting_is_an_option_with_its_default(name, rows, settings):
    table = {row.name: row for row in rows}
    known = {one.name: one for one in fields(settings)}
    assert set(table) - ALONE[name] == set(known) - NOT_HERE[name]
    for key, one in known.items():
        if key in table and key not in ("data", "checkpoint", "corrective_share"):
            assert table[key].default == one.default, key


@pytest.mark.parametrize("rows", [CLASSIFY, DISTILL_LOGITS, DISTILL_FEATURES, SEGMENT])
def test_no_flag_has_two_meanings(rows):
    everything = (*LOOP, *CONTROL, *rows)
    flags = [flag for row in everything for text in row.written for flag in text.split("/")]
    names = [row.name for row in everything]
    assert len(flags) == len(set(flags))
    assert len(names) == len(set(names))


def test_the_words_are_the_library_s():
    words = {row.name: row.words for row in (*SEGMENT, *CLASSIFY, *DISTILL_FEATURES)}
    assert words["augment"] == get_args(Strength)
    assert words["on_broken"] == get_args(OnBroken)
    assert set(words["loss"]) == set(get_args(FeatureLoss))
