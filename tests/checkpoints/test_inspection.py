from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from checkpoints.families import FAMILIES, small
from tinyvit.checkpoints import inspect, write_state_dict
from tinyvit.checkpoints.families import LAYOUTS
from tinyvit.errors import CheckpointError


@pytest.mark.parametrize("family", FAMILIES)
def test_reports_are_plain_data(tmp_path: Path, family: str) -> None:
    layout = LAYOUTS[family]
    wrapper = layout.wrapper if layout.container == "torch" else None
    path = write_state_dict(tmp_path / "a.bin", small(family), layout.container, wrapper)
    report = inspect(path)
    assert family == report.detection.family or family in report.detection.also
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.tensors == len(small(family))
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["size"] == path.stat().st_size
    assert facts["detection"]["strides"] == list(report.detection.strides)


def test_remarks(tmp_path: Path) -> None:
    state = small("cream")
    del state["head.bias"]
    state["layers.1.blocks.0.mlp.norm.bias"] = torch.zeros(3)
    state["layers.1.blocks.0.attn.attention_bias_idxs"] = torch.zeros(9, 9)
    state["left.over"] = torch.zeros(1)
    for block in range(8):
        state[f"extra.{block}"] = torch.zeros(1)
    path = tmp_path / "a.pth"
    torch.save({"model": state, "epoch": 3}, path)
    report = inspect(path)
    assert report.remarks == (
        "1 tensors have a shape that does not fit the others, for example "
        "layers.1.blocks.0.mlp.norm.bias: [3] instead of [16]",
        "missing: head (head.bias)",
        "left over: unknown (9 tensors)",
        "1 index tables (attention_bias_idxs) are not needed and dropped",
        "files of tinyvit have the very same keys and shapes",
        "strides 2,2,2 assumed: no tensor shows strides, and Cream TinyViT is a classification "
        "network",
        "the sizes are those of no variant in the catalog",
        "there is no neck: as a SAM encoder its neck would be untrained",
        "not used: epoch = 3",
    )
    wrong = report.to_dict()["detection"]["wrong_shapes"]  # type: ignore[index]
    assert wrong == {"layers.1.blocks.0.mlp.norm.bias": {"wanted": [16], "found": [3]}}


def test_remarks_on_a_sam_file(tmp_path: Path) -> None:
    path = write_state_dict(tmp_path / "mobile_sam.pt", small("mobile_sam"), "torch")
    remarks = inspect(path).remarks
    assert "the classification head of a SAM encoder was never trained" in remarks
    assert not any("no neck" in remark for remark in remarks)


def test_no_tinyvit(tmp_path: Path) -> None:
    path = write_state_dict(tmp_path / "a.safetensors", {"layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="looks like a ResNet"):
        inspect(path)
