"""What benchmarks/proof.py and ranges.py count, on inputs whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_errors_are_those_of_the_worst_call_and_image(load_benchmark):
    proof = load_benchmark("proof")
    calls = []

    def run(batch):
        calls.append(1)
        return batch * (2 if len(calls) == 3 else 1)

    batches = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])]
    same = proof.errors("openvino graph, fp32", run, batches, batches)
    assert len(calls) == 6
    assert (same["max_error"], same["mean_error"], same["largest"]) == (4.0, 3.5, 4.0)
    calls.clear()
    assert proof.errors("torch, fp32", run, batches, batches)["max_error"] == 0.0
    assert len(calls) == 2
    other = proof.compare(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert other["one_minus_cosine"] == 1.0


def test_iou(load_benchmark):
    ours = np.zeros((3, 2, 2), bool)
    theirs = np.zeros((3, 2, 2), bool)
    ours[0, 0], theirs[0, :, 0] = True, True
    ours[1], theirs[1] = True, True
    assert load_benchmark("proof").iou(ours, theirs).tolist() == [1 / 3, 1.0, 1.0]


def test_the_table(load_benchmark):
    row = {"max_error": 0.25, "mean_error": 0.1, "one_minus_cosine": 1e-9, "largest": 5.0}
    found = {
        "command": "python benchmarks/proof.py",
        "machine": {"cpu": "some", "memory": 8 * 10**9},
        "threads": 1,
        "cases": [
            {"title": "without masks", "rows": {"a": row}},
            {"title": "with masks", "rows": {"a": {**row, "mean_iou": 0.99, "min_iou": 0.9}}},
        ],
        "ranges": {"256": {"scores": 11.25, "stem": 3.0}, "1024": {"scores": 12.0, "stem": 4.0}},
    }
    lines = load_benchmark("proof").markdown(found).splitlines()
    assert "cpu some, memory 8 GB; 1 threads" in lines
    assert "| a | 2.5e-01 | 1.0e-01 | 1.0e-09 |" in lines
    assert "| a | 2.5e-01 | 1.0e-01 | 1.0e-09 | 0.9900 | 0.9000 |" in lines
    assert lines[-2:] == ["| stem | 3.0 | 4.0 |", "| scores | 11.2 | 12.0 |"]


def test_ranges_see_every_kind_of_value(load_benchmark, make_tiny_vit):
    ranges = load_benchmark("ranges")
    model = make_tiny_vit()
    seen = {}
    model.neck[0].register_forward_hook(lambda _, __, out: seen.update(reduced=out))
    found = ranges.largest_values(model, [torch.ones(1, 3, 33, 48)])
    assert set(found) >= {
        "stem",
        "MBConv hidden",
        "query, key, value",
        "scores",
        "neck before a norm",
    }
    assert all(0 < value < ranges.FLOAT16_MAX for value in found.values())
    centred = seen["reduced"] - seen["reduced"].mean(1, keepdim=True)
    squares = float(centred.square().sum(1).max())
    assert found["sum of squares in a neck's LayerNorm"] >= squares > 0
    assert found["neck before a norm"] >= float(seen["reduced"].abs().max())


def test_masks_of_the_same_embedding_agree(load_benchmark):
    proof = load_benchmark("proof")
    sam = proof.build_sam(proof.CHECKPOINT)
    batch, placement = proof.example_images(sam.image_encoder.image_spec)[0]
    with torch.inference_mode():
        embedding = sam.image_encoder(batch)
    found = proof.masks(sam, embedding, placement)
    assert found.shape == (proof.CLICKS**2, *placement.original_size)
    assert 0 < found.mean() < 1
    assert proof.iou(found, proof.masks(sam, embedding + 1e-7, placement)).min() > 0.99
