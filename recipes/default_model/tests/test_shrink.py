import hashlib
import json

import pytest
import torch

from tinyvit.catalog import get_checkpoint
from tinyvit.checkpoints import read_state_dict, write_state_dict
from tinyvit.hub import __file__ as installed
from tinyvit.sam.model import build_sam

from .recipe_files import load

shrink = load("shrink")


def test_the_file_is_half_as_large_and_answers_alike(tmp_path, tiny_sam_file):
    found = shrink.build(tiny_sam_file, tmp_path / "ships" / "small.safetensors")
    target = tmp_path / "ships" / "small.safetensors"
    before, after = read_state_dict(tiny_sam_file), read_state_dict(target)
    assert found.bytes == target.stat().st_size < 0.56 * tiny_sam_file.stat().st_size
    assert found.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert json.loads(target.with_suffix(".json").read_text())["sha256"] == found.sha256
    assert after.metadata == before.metadata
    assert "tinyvit.image_spec" in after.metadata
    left_out = set(before.tensors) - set(after.tensors)
    assert left_out == {
        key
        for key in before.tensors
        if key.endswith("num_batches_tracked") or ".norm_head." in key or ".encoder.head." in key
        or key.startswith("image_encoder.head.")
    }  # fmt: skip
    wide = {key for key, tensor in after.tensors.items() if tensor.dtype == torch.float32}
    assert wide == {key for key in after.tensors if "running_" in key or "gaussian_matrix" in key}
    # Half precision keeps 11 bits; the errors of a few layers add up, and none is exactly zero.
    assert 0 < found.embedding_error < 0.02
    assert 0 < found.logit_error < 0.02
    assert found.mask_agreement > 0.99
    whole, small = build_sam(tiny_sam_file), build_sam(target)
    assert small.image_encoder.image_spec == whole.image_encoder.image_spec
    weight = "image_encoder.neck.0.weight"
    ours, theirs = small.state_dict()[weight], whole.state_dict()[weight]
    assert torch.equal(ours, theirs.half().float())


def test_the_embedded_weights_come_out_bit_for_bit(tmp_path):
    from pathlib import Path

    source = Path(installed).parent / "weights" / "sam_2m.safetensors"
    found = shrink.build(source, tmp_path / "sam_2m.safetensors")
    assert found.sha256 == get_checkpoint("tinyvit_sam_2m").sha256
    assert (found.embedding_error, found.logit_error, found.mask_agreement) == (0, 0, 1)


def test_offsets_and_thresholds_go_into_the_file(tmp_path, tiny_sam_file):
    thresholds = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.6}
    target, offsets = tmp_path / "small.safetensors", (0.1, 0.0, -0.2, 0.3)
    shrink.build(tiny_sam_file, target, offsets, thresholds)
    sam = build_sam(target)
    assert sam.thresholds == thresholds
    prompts = sam.prompt_encoder(
        (torch.tensor([[[9.0, 9.0]]]), torch.ones(1, 1)), None, None, (4, 4)
    )
    source = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    scores = []
    for model in (build_sam(tiny_sam_file), sam):
        pe = model.prompt_encoder.get_dense_pe((4, 4))
        with torch.no_grad():
            scores.append(model.mask_decoder.predict_masks(source, pe, *prompts)[1])
    torch.testing.assert_close(scores[1] - scores[0], torch.tensor([offsets]), atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match="has 4 masks, and 2 offsets came"):
        shrink.build(tiny_sam_file, target, (0.1, 0.2))


@pytest.mark.parametrize(
    "value, words",
    [
        (float("nan"), "a.weight holds values that are no finite numbers; train again"),
        (70_000.0, "a.weight holds 70000, and half precision ends at 65504"),
    ],
)
def test_values_that_do_not_fit_are_refused(value, words):
    with pytest.raises(ValueError, match=words):
        shrink.shrink_tensors({"a.weight": torch.tensor([1.0, value])})


def test_large_statistics_are_kept():
    kept = shrink.shrink_tensors({"a.running_var": torch.tensor([70_000.0])})
    assert kept["a.running_var"].item() == 70_000


def test_a_file_that_is_too_large_is_refused(tmp_path, tiny_sam_file, monkeypatch):
    monkeypatch.setattr(shrink, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1000 ship; train a smaller variant"):
        shrink.build(tiny_sam_file, tmp_path / "small.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_found_when_it_is_read_again(tmp_path, tiny_sam_file):
    from tinyvit.errors import CheckpointError

    tensors = dict(read_state_dict(tiny_sam_file).tensors)
    del tensors["mask_decoder.iou_token.weight"]
    source = write_state_dict(tmp_path / "part.safetensors", tensors)
    with pytest.raises(CheckpointError, match="iou_token"):
        shrink.build(source, tmp_path / "small.safetensors")
