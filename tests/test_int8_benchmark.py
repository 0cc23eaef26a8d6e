"""What benchmarks/int8.py is made of: the split, prompts, chosen nodes, agreement, the table."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvit.image_spec import ImageSpec
from tinyvit.inference.graph_backend import trace


@pytest.fixture
def int8(load_benchmark):
    return load_benchmark("int8")


def test_photographs_are_split_and_prompted_by_their_masks(int8, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "CALIBRATION", 2)
    monkeypatch.setattr(int8, "EVALUATION", 3)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    rows = []
    for number in range(6):
        mask = np.zeros((40, 80), np.uint8)
        mask[10:31, 20:41] = 255
        pixels = np.full((40, 80, 3), number * 40, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        rows.append({"image": f"{number}.png", "mask": f"{number}.png"})
    with open(tmp_path / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "mask"])
        writer.writeheader()
        writer.writerows(rows)
    calibration, samples = int8.photographs(tmp_path, ImageSpec.sam(160))
    tones = [float(x[0, 0, 0]) for x in calibration] + [float(one.x[0, 0, 0]) for one in samples]
    assert len(calibration) == 2 and len(samples) == 3 and len(set(tones)) == 5
    np.testing.assert_allclose(samples[0].click, [[61, 41]])  # the middle, twice as large
    np.testing.assert_allclose(samples[0].box, [[40, 20], [82, 62]])


def test_layers_with_weights_are_told_from_products_of_activations(int8, tmp_path):
    pytest.importorskip("onnx")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.neck, self.linear = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(5, 5)

        def forward(self, x):
            x = self.linear(self.neck(x))
            return x @ x.transpose(-1, -2)

    path = tmp_path / "net.onnx"
    path.write_bytes(trace(Net().eval(), [torch.zeros(1, 3, 5, 5)], ["images"], ["y"], {}, 17))
    assert len(int8.linear_layers(path)) == 1
    assert len(int8.linear_layers(path, ["Conv"])) == 2
    assert int8.linear_layers(path, ["Conv"], but=["neck"]) == int8.linear_layers(path)


def test_agreement_and_the_table(int8):
    masks = np.zeros((1, 4, 8, 8), np.float32)
    masks[0, 2, :4] = 1  # the best for a click
    masks[0, 0, :, :4] = 1  # of a box
    scores = np.array([[0.9, 0.1, 0.8, 0.2]])
    sample = int8.Sample(np.zeros((3, 8, 8)), np.zeros((1, 2)), np.zeros((2, 2)), (8, 8))
    encode, right = (lambda x: np.zeros((1, 2, 2, 2))), []
    first = int8.agreement(encode, lambda *given: (masks, scores, None), [sample], right)
    assert first == {"click_mean": 1, "click_least": 1, "box_mean": 1, "box_least": 1}
    half = masks.copy()
    half[0, 2, 2:] = 0
    found = int8.agreement(encode, lambda *given: (half, scores, None), [sample], right)
    assert (found["click_mean"], found["box_mean"]) == (0.5, 1)
    row = int8.Row("bf16", "openvino", 13.6, 0.99, 0.9, 0.98, 0.8, 2.0, 1.9, 2.1)
    assert int8.table([row]).splitlines()[-1] == (
        "| bf16 | OpenVINO | 13.6 | 0.9900 / 0.900 | 0.9800 / 0.800 | 2.00 |"
    )


def test_speed_is_the_cpu_time_of_the_baseline_by_that_of_a_row(int8, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(int8.time, "process_time", lambda: clock[0])

    def takes(seconds):
        def run(x):
            clock[0] += seconds

        return run

    spread = int8.speed(takes(0.1), takes(0.2), None, 4)
    np.testing.assert_allclose([*spread.values()], [2, 2, 2])
