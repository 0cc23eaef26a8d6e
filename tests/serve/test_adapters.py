"""The adapters, asked as their clients ask (requests written from the protocols' descriptions)."""

import base64
import importlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from conftest import read_brush
from tinyvit.images.mask_ops import is_outer, outlines
from tinyvit.serve.adapters.label_studio import Config, Fetcher
from tinyvit.serve.problems import Problem

UNPACKED = os.environ.get("TINYVIT_X_ANYLABELING")  # a folder
CLIENT = UNPACKED and Path(UNPACKED) / "anylabeling" / "services" / "auto_labeling"
CONFIG = """<View><Image name="img" value="$image"/>
<{tag} name="tag" toName="img"><Label value="Cat"/></{tag}>
<KeyPointLabels name="kp" toName="img" smart="true"><Label value="Cat"/></KeyPointLabels></View>"""


def context(kind="keypointlabels", **value):
    value = {"x": 38.1, "y": 39.3, "width": 0.4, kind: ["Cat"], **value}
    return {
        "result": [
            {
                "original_width": 451,
                "original_height": 300,
                "image_rotation": 0,
                "value": value,
                "is_positive": True,
                "id": "a",
                "from_name": "kp",
                "to_name": "img",
                "type": kind,
                "origin": "manual",
            }
        ]
    }


@pytest.fixture(scope="module")
def url(images):
    return (
        "data:image/png;base64," + base64.b64encode((images / "chelsea.png").read_bytes()).decode()
    )


def predict(server, url, tag, given):
    asked = {
        "tasks": [{"id": 1, "data": {"image": url}}],
        "project": "1.1", "label_config": CONFIG.format(tag=tag), "params": {"context": given},
    }  # fmt: skip
    return server("POST", "/label-studio/predict", asked)


def test_label_studio_s_small_talk(server):
    assert server("GET", "/label-studio/health").json["status"] == "UP"
    assert server("GET", "/label-studio/").status == 200
    assert server("POST", "/label-studio/setup", {"project": "1"}).json["model_version"]
    assert server("POST", "/label-studio/webhook", {"action": "X"}).status == 200


def test_a_smart_key_point_becomes_a_brush(server, segmenter, images, url):
    answer = predict(server, url, "BrushLabels", context())
    assert answer.status == 200, answer.body
    (result,) = answer.json["results"][0]["result"]
    assert (result["from_name"], result["to_name"], result["type"]) == ("tag", "img", "brushlabels")
    assert (result["value"]["brushlabels"], result["value"]["format"]) == (["Cat"], "rle")
    mask = read_brush(result["value"]["rle"], (300, 451))
    point = [[38.1 * 451 / 100, 39.3 * 300 / 100]]
    (masks,) = segmenter.segment([images / "chelsea.png"], [[{"points": point}]])
    assert (mask == masks.mask(0)).all()


def test_polygons_and_rectangles(server, url):
    (first, *_) = predict(server, url, "PolygonLabels", context()).json["results"][0]["result"]
    points = np.array(first["value"]["points"])
    assert points.min() >= 0 and points.max() <= 100
    box = context("rectanglelabels", x=10, y=10, width=50, height=60)
    (result,) = predict(server, url, "RectangleLabels", box).json["results"][0]["result"]
    assert 0 <= result["value"]["x"] <= 100


def test_the_configuration_of_the_docs_is_understood():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    found = Config.read(page.partition("```xml\n")[2].partition("```")[0])
    assert (found.image, found.from_name, found.kind) == ("image", "tag", "brushlabels")


def test_label_studio_s_odd_requests(server, url):
    assert predict(server, url, "BrushLabels", {}).json["results"] == []
    assert predict(server, url, "Choices", context()).status == 400
    assert predict(server, 5, "BrushLabels", context()).status == 400
    assert predict(server, "http://127.0.0.1/x.png", "BrushLabels", context()).status == 422
    assert server("POST", "/label-studio/predict", {"tasks": 1}).status == 400
    assert server("POST", "/label-studio/predict", {"tasks": [], "params": 5}).status < 500
    evil = '<!DOCTYPE x [<!ENTITY a "b">]><View/>'
    asked = {
        "tasks": [{"data": {"image": url}}],
        "label_config": evil,
        "params": {"context": context()},
    }
    assert server("POST", "/label-studio/predict", asked).status == 400


def test_images_of_other_hosts_are_not_fetched():
    fetcher = Fetcher("http://127.0.0.1:9", 1000)
    for url in (
        "http://169.254.169.254/latest",
        "http://127.0.0.1:10/x",
        "file:///etc/passwd",
        "ftp://x/y",
    ):
        with pytest.raises(Problem):
            fetcher.fetch(url)
    with pytest.raises(Problem, match="label-studio-url"):
        Fetcher(None, 1000).fetch("/data/x.png")


def test_x_anylabeling(server, images):
    assert server("GET", "/x-anylabeling/health").status == 200
    models = server("GET", "/x-anylabeling/v1/models").json
    assert models["data"]["tinyvit"]["widgets"]
    image = (
        "data:image/png;base64," + base64.b64encode((images / "chelsea.png").read_bytes()).decode()
    )
    marks = [
        {"type": "point", "data": [172, 118], "label": 1},
        {"type": "rectangle", "data": [210, 150, 130, 80]},
    ]
    asked = {
        "model": "tinyvit",
        "image": image,
        "params": {"marks": marks, "epsilon_factor": 0.001},
    }
    answer = server("POST", "/x-anylabeling/v1/predict", asked)
    assert answer.status == 200, answer.body
    shape = answer.json["data"]["shapes"][0]
    assert (shape["label"], shape["shape_type"]) == ("AUTOLABEL_OBJECT", "polygon")
    assert shape["points"][0] == shape["points"][-1]
    empty = server("POST", "/x-anylabeling/v1/predict", {**asked, "params": {}})
    assert empty.json["data"]["shapes"] == []
    wrong_params = ({"marks": [{"type": "circle"}]}, {"marks": 3}, {"epsilon_factor": "1"})
    for wrong in ({"image": "?"}, *({"params": params} for params in wrong_params)):
        assert 400 <= server("POST", "/x-anylabeling/v1/predict", {**asked, **wrong}).status < 500


@pytest.fixture
def x_anylabeling(monkeypatch):
    """X-AnyLabeling's class that asks remote servers; its window is stood in for."""
    own = "anylabeling.services.auto_labeling"
    stands_in = {"cv2": {}, "PyQt6": {"QtCore": SimpleNamespace(QPointF=lambda x, y: (x, y))}}
    translate = SimpleNamespace(translate=lambda context, text: text)
    stands_in |= {"PyQt6.QtCore": {"QCoreApplication": translate}}
    stands_in |= {"PyQt6.QtWidgets": {"QApplication": None}}
    stands_in |= {"anylabeling": {"__path__": []}, "anylabeling.services": {"__path__": []}}
    stands_in |= {own: {"__path__": [str(CLIENT)]}, f"{own}.model": {"Model": Model}}
    views = "anylabeling.views.labeling"
    stands_in |= {"anylabeling.views": {"__path__": []}, views: {"__path__": []}}
    stands_in |= {f"{views}.utils": {"__path__": []}, f"{views}.shape": {"Shape": Shape}}
    stands_in |= {f"{views}.logger": {"logger": logging.getLogger("x-anylabeling")}}
    stands_in |= {f"{views}.utils.opencv": {"qt_img_to_rgb_cv_img": None}}
    for name, facts in stands_in.items():
        module = ModuleType(name)
        module.__dict__.update(facts)
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module(f"{own}.remote_server").RemoteServer
    for name in [name for name in sys.modules if name.startswith(own)]:
        sys.modules.pop(name)


class Model:
    def __init__(self, config, on_message):
        self.config = self._config = config
        self.on_message = on_message


class Shape:
    def __init__(self, **facts):
        self.facts, self.points = facts, []

    def add_point(self, point):
        self.points.append(point)


@pytest.mark.slow  # a second; wants ``pip download --no-deps x-anylabeling-cvhub==4.2.1``, unpacked
@pytest.mark.skipif(CLIENT is None, reason="TINYVIT_X_ANYLABELING names no folder")
def test_x_anylabeling_s_own_client(server, segmenter, images, x_anylabeling):
    said = []
    base = f"http://127.0.0.1:{server.port}/x-anylabeling"
    config = {"remote_server_settings": {"server_url": base, "api_key": ""}}
    client = x_anylabeling(config, said.append)
    assert list(client.get_available_models()) == ["tinyvit"]
    client.set_model_id("tinyvit")
    assert client.get_batch_processing_mode() is None
    client.set_mask_fineness(0.0)
    client.set_auto_labeling_marks([
        {"type": "point", "data": [172, 118], "label": 1},
        {"type": "rectangle", "data": [130, 80, 210, 150], "label": 1},
    ])  # fmt: skip
    result = client.predict_shapes(object(), str(images / "chelsea.png"))
    assert said == [] and result.replace is False
    prompt = {"points": [[172, 118]], "box": [130, 80, 210, 150]}
    (masks,) = segmenter.segment([images / "chelsea.png"], [[prompt]])
    wanted = [ring for ring in outlines(masks.mask(0)) if is_outer(ring)]
    assert [shape.points[:-1] for shape in result.shapes] == [
        [tuple(point) for point in ring.tolist()] for ring in wanted
    ]
    assert {shape.facts["label"] for shape in result.shapes} == {"AUTOLABEL_OBJECT"}
    client.set_auto_labeling_marks([{"type": "point", "data": [9_000, 1], "label": 1}])
    assert client.predict_shapes(object(), str(images / "chelsea.png")).shapes == []
    assert "422" in said[0]
