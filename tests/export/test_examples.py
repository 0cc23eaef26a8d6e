"""What lies in examples/ for consumers of exported folders."""

import base64
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tiny import make_tiny_sam, write_image
from tinyvit.export.verify import open_graph
from tinyvit.sam import SamPredictor

pytest.importorskip("onnx")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def cvat(exported, monkeypatch):
    """The handler's module, and a context that it has opened an exported folder in."""
    spec = importlib.util.spec_from_file_location("cvat_handler", EXAMPLES / "cvat_handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("TINYVIT_FOLDER", str(exported("cvat", side=64)))
    context = SimpleNamespace(user_data=SimpleNamespace(), Response=SimpleNamespace)
    module.init_context(context)
    return module, context


def test_the_handler_for_cvat_and_its_decoder_give_a_predictors_mask(cvat, exported, tmp_path):
    module, context = cvat
    path = write_image(tmp_path / "a.png", 50, 80)
    event = SimpleNamespace(body={"image": base64.b64encode(path.read_bytes()).decode()})
    answer = module.handler(context, event)
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    blob = base64.b64decode(json.loads(answer.body)["blob"])
    scale, click = 64 / 80, (30, 20)
    names = ("masks", "iou_predictions", "low_res_masks", "xtl", "ytl", "xbr", "ybr")
    decoder = open_graph(exported("cvat", side=64) / "decoder.onnx")
    assert decoder.outputs == names
    found = dict(zip(names, decoder({  # as the plugin asks, in the browser
        "image_embeddings": np.frombuffer(blob, np.float32).reshape(1, 32, 4, 4),
        "point_coords": np.array([[[click[0] * scale, click[1] * scale], [0, 0]]], np.float32),
        "point_labels": np.array([[1, -1]], np.float32),
        "orig_im_size": np.array([50, 80], np.float32),
        "mask_input": np.zeros((1, 1, 16, 16), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
    }), strict=True))  # fmt: skip
    left, top, right, bottom = (int(found[name]) for name in names[3:])
    mask = np.zeros((50, 80), bool)
    assert found["masks"].shape == (1, 1, bottom - top + 1, right - left + 1)
    mask[top : bottom + 1, left : right + 1] = found["masks"][0, 0]
    predictor = SamPredictor(make_tiny_sam(), backend="torch")
    predictor.set_image(np.asarray(Image.open(path).convert("RGB")))
    masks, scores, _ = predictor.predict(np.array([click]), np.ones(1, int))
    wanted = masks[scores.argmax()]
    assert 0 < wanted.sum() < wanted.size
    assert (mask != wanted).sum() <= 1


def test_the_handler_says_what_it_cannot_read(cvat):
    module, context = cvat
    event = SimpleNamespace(body={"image": base64.b64encode(b"nothing").decode()})
    answer = module.handler(context, event)
    assert answer.status_code == 400 and "error" in json.loads(answer.body)
