from typing import get_args

from tinyvit.cli.options import PrecisionName, matching_checkpoints, matching_models
from tinyvit.inference.backend import Precision


def test_the_precisions_are_the_engine_s():
    assert {name.value for name in PrecisionName} == set(get_args(Precision))


def test_names_are_completed():
    assert matching_checkpoints("mob") == ["mobile_sam"]
    assert matching_models("tiny_vit_2") == [
        *("tiny_vit_21m_224", "tiny_vit_21m_384", "tiny_vit_21m_512"),
        *("tiny_vit_2m_sam", "tiny_vit_21m_sam"),
    ]
    assert matching_models("x") == []
