"""What of benchmarks/ needs no peers: its options, its weights, its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyvit.catalog import get_variant
from tinyvit.checkpoints import from_canonical
from tinyvit.factory import create_model

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_the_default_cases_are_those_of_the_readme(load_benchmark):
    peers = load_benchmark("against_peers")
    cases = peers.cases_of(peers.parse([]))
    assert [(case.model, case.size, case.batch) for case in cases] == [
        ("tiny_vit_5m_sam", 1024, 1),
        *((f"tiny_vit_{n}m_224", 224, batch) for n in (5, 11, 21) for batch in (1, 32)),
    ]
    assert peers.parse([]).output == FOLDER


def test_quick_is_small_and_writes_nothing(load_benchmark):
    peers = load_benchmark("against_peers")
    options = peers.parse(["--quick"])
    assert [case.size for case in peers.cases_of(options)] == [256, 224]
    assert (options.rounds, options.starts, options.output) == (2, 1, None)


def test_options_choose_cases(load_benchmark):
    peers = load_benchmark("against_peers")
    words = ["--model", "tiny_vit_21m_sam", "--size", "512", "--size", "64", "--batch", "2"]
    cases = peers.cases_of(peers.parse(words))
    assert cases == [
        peers.Case("tiny_vit_21m_sam", 512, 2),
        peers.Case("tiny_vit_21m_sam", 64, 2),
    ]
    assert cases[0].gflop == 2 * get_variant("tiny_vit_21m_sam").gmacs / 4
    with pytest.raises(ValueError, match="unknown model 'vit'"):
        peers.cases_of(peers.parse(["--model", "vit"]))


def test_contestants_fit_the_model(load_benchmark):
    peers = load_benchmark("against_peers")
    sam, classifier = peers.Case("tiny_vit_5m_sam", 64, 1), peers.Case("tiny_vit_5m_224", 64, 1)
    assert peers.contestants_of(sam, None)[:3] == [
        *("ultralytics", "ultralytics+mallopt", "mobile_sam")
    ]
    assert peers.contestants_of(classifier, None)[:3] == ["timm", "timm+mallopt", "onnxruntime"]
    asked = ["timm", "ultralytics+mallopt", "tinyvit-torch-fp32+mallopt"]
    assert peers.contestants_of(sam, asked) == asked[1:]
    assert peers.contestants_of(classifier, asked) == [asked[0], asked[2]]
    known = load_benchmark("contestants").MAKERS
    for name in [*peers.contestants_of(sam, None), *peers.contestants_of(classifier, None)]:
        assert name.partition("+")[0].partition("-")[0] in known


def test_ratios_are_taken_round_by_round(load_benchmark):
    peers = load_benchmark("against_peers")
    rows = [{"name": "old", "rounds": [2.0, 8.0, 4.0]}, {"name": "new", "rounds": [1.0, 2.0, 4.0]}]
    peers.compare(rows, ["old"])
    assert rows[0]["times_as_fast"]["old"]["median"] == 1.0
    assert rows[1]["times_as_fast"]["old"]["median"] == 2.0  # of 2, 4 and 1


def test_weights_depend_on_the_name_alone(load_benchmark):
    weights = load_benchmark("weights").weights
    a = weights({"x.weight": (4, 3), "y.bias": (5,)})
    b = weights({"y.bias": (5,), "z.weight": (4, 3), "x.weight": (4, 3)})
    assert np.array_equal(a["x.weight"], b["x.weight"])
    assert np.array_equal(a["y.bias"], b["y.bias"])
    assert not np.array_equal(b["x.weight"], b["z.weight"])


def test_every_tensor_is_random_and_reaches_every_family(load_benchmark):
    model = create_model("tiny_vit_5m_sam", img_size=64)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    state = load_benchmark("weights").weights(shapes)
    for key, value in state.items():
        if value.dtype == np.float32 and value.size > 1:
            assert value.std() > 0, key
        if key.endswith("running_var"):
            assert value.min() > 0, key
    for family, prefix in (("mobile_sam", "image_encoder."), ("ultralytics", "image_encoder.")):
        renamed = from_canonical(state, family)
        for key, value in state.items():
            assert renamed[prefix + key] is value
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    with torch.inference_mode():
        output = model(torch.from_numpy(load_benchmark("weights").images(1, 64)))
    assert 0.5 < output.abs().max() < 50


def test_the_first_images_do_not_depend_on_the_batch(load_benchmark):
    images = load_benchmark("weights").images
    assert images(3, 8).shape == (3, 3, 8, 8)
    assert np.array_equal(images(3, 8)[:1], images(1, 8))


def a_case(model="tiny_vit_5m_sam", date="today"):
    row = {
        "name": "ultralytics", "seconds": {"median": 1.5, "lower": 1.25, "upper": 2.0},
        "rounds": [1.5], "images_per_s": 0.67, "gflops": 51.7, "max_abs_error": 1.2e-5,
        "page_faults": 500000.0, "peak_memory": 670_000_000, "first_result_s": 2.5,
        "times_as_fast": {"ultralytics": {"median": 1.0, "lower": 1.0, "upper": 1.0}},
    }  # fmt: skip
    return {
        "model": model, "size": 1024, "batch": 1, "gflop": 77.54, "rounds": 7, "starts": 3,
        "threads": None, "largest_output": 5.6, "command": "python benchmarks/against_peers.py",
        "machine": {"cpu": "A", "cores": 2, "memory": 8e9, "torch": "2.13.0", "date": date},
        "baselines": ["ultralytics"], "contestants": [row],
        "left_out": [{"name": "timm", "reason": "not here"}],
    }  # fmt: skip


def test_a_case_becomes_a_table(load_benchmark):
    text = load_benchmark("report").markdown(a_case())
    assert text.startswith("## tiny_vit_5m_sam, 1024x1024, batch 1\n")
    for words in (
        "77.5 GFLOP an image; 7 rounds; outputs up to 5.6; today",
        "    python benchmarks/against_peers.py",
        "processor: A, cores: 2, memory: 8 GB; threads: each library's choice",
        "- torch 2.13.0\n",
        "| ultralytics | 1500.0 | 1250.0-2000.0 | 0.67 | 52 | 1.00 | 1.2e-05 | 670 | 500000 |",
        "Left out timm: not here",
    ):
        assert words in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


def test_earlier_cases_stay_until_measured_again(load_benchmark, tmp_path):
    report = load_benchmark("report")
    assert report.read(tmp_path / "results.json") == []
    report.write(tmp_path / "deep", [a_case(), a_case("tiny_vit_5m_224")])
    old = report.read(tmp_path / "deep" / "results.json")
    cases = report.merge(old, [a_case(date="tomorrow")])
    assert [case["model"] for case in cases] == ["tiny_vit_5m_sam", "tiny_vit_5m_224"]
    assert [case["machine"]["date"] for case in cases] == ["tomorrow", "today"]
    report.write(tmp_path / "deep", cases)
    written = sorted(path.name for path in (tmp_path / "deep").iterdir())
    assert written == ["results.json", "results.md"]
    assert json.loads((tmp_path / "deep" / "results.json").read_text())["cases"] == cases
    assert (tmp_path / "deep" / "results.md").read_text().count("\n## ") == 2


def test_the_stub_s_signatures_are_what_torch_reads(load_benchmark):
    stub = load_benchmark("torchvision_stub")
    assert stub.schema("nms").startswith("nms(Tensor dets, Tensor scores, float iou_threshold)")
    for name in stub.OPERATORS:
        parsed = torch._C.parse_schema(stub.schema(name))
        assert parsed.name == name
        assert len(parsed.returns) == stub.OPERATORS[name][1]
        assert hasattr(torch.ops.torchvision, name)
