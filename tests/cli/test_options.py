from typing import get_args

import pytest
import typer

from tinyvit.cli.arguments import (
    PrecisionName,
    matching_checkpoints,
    matching_models,
    parse_precision,
)
from tinyvit.inference.backend import Precision


def test_the_precisions_are_the_engine_s():
    assert {name.value for name in PrecisionName} == set(get_args(Precision))


def test_precisions_are_parsed():
    assert all(parse_precision(name.value) is name for name in PrecisionName)
    with pytest.raises(
        typer.BadParameter, match=r"^'half' is not one of 'fp32', 'bf16', 'auto'\.$"
    ):
        parse_precision("half")


@pytest.mark.parametrize("verb", [["encode", "a.jpg", "-o", "x"], ["classify", "a.jpg"], ["bench"]])
def test_fp16_is_refused_with_the_reason(run, verb):
    result = run(*verb, "--precision", "fp16")
    assert result.code == (1 if verb == ["bench"] else 2)
    last = result.err.strip().splitlines()[-1]
    assert "precision 'fp16' is refused: it ends at 65504, and sums of squares" in last
    assert "use 'bf16', which is fast and has the range of 'fp32'" in last


def test_names_are_completed():
    assert matching_checkpoints("mob") == ["mobile_sam"]
    assert matching_models("tiny_vit_2") == [
        *("tiny_vit_21m_224", "tiny_vit_21m_384", "tiny_vit_21m_512"),
        *("tiny_vit_2m_sam", "tiny_vit_21m_sam"),
    ]
    assert matching_models("x") == []
