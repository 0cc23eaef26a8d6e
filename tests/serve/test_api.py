"""API v1 over a socket: equal to the library, and polite about everything else."""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load

from tinyvit import ImageEmbedding, Prompt
from tinyvit.images import mask_ops
from tinyvit.serve import ServeSettings
from tinyvit.serve.schema import LowRes, unpack_logits

NOBODY = f"/v1/images/{'0' * 64}/segment"
CLICK = {"points": [[172, 118]]}


def prompts_on(width, height, count, seed=0):
    """Points, boxes, both and masks, as JSON."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        prompt = {}
        if number % 3 != 1:
            prompt |= {"points": [[x, y], [width - x, y]][: 1 + number % 2]}
            prompt |= {"labels": [1, 0][: 1 + number % 2]}
        if number % 3 == 1 or number % 4 == 3:
            prompt["box"] = [x / 2, y / 2, (x + width) / 2, (y + height) / 2]
        found.append(prompt)
    return found


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png", "rocket.jpg"])
def test_answers_equal_the_library(server, segmenter, images, name):
    data = (images / name).read_bytes()
    image_id = server.upload(name)
    assert image_id == hashlib.sha256(data).hexdigest()
    size = server("GET", f"/v1/images/{image_id}").json
    prompts = prompts_on(size["width"], size["height"], 40)
    request = {"prompts": prompts, "include": ["rle", "counts", "png", "low_res"], "which": "all"}
    answer = server("POST", f"/v1/images/{image_id}/segment", request)
    assert answer.status == 200, answer.body
    (masks,) = segmenter.segment([images / name], [[Prompt(**prompt) for prompt in prompts]])
    rows = masks.to_coco(1)
    for number, found in enumerate(answer.json["objects"]):
        best = found["masks"][found["best"]]
        row = rows[number]
        assert best["score"] == pytest.approx(row["score"], abs=1e-6)
        assert (best["area"], best["box"]) == (row["area"], row["bbox"])
        assert best["rle"] == row["segmentation"]
        assert (mask_ops.decode(best["counts"]) == masks.mask(number)).all()
        png = np.asarray(Image.open(io.BytesIO(base64.b64decode(best["png"]))))
        assert (png == masks.mask(number)).all()
        logits = unpack_logits(LowRes(**best["low_res"]))
        exact = np.asarray(masks.low_res_logits[number][found["best"]])
        assert ((logits > 0) == (exact >= 0)).mean() > 0.999


def test_masks_of_earlier_answers_are_prompts(server):
    image_id = server.upload()
    path = f"/v1/images/{image_id}/segment"
    first = server("POST", path, {"prompts": [CLICK], "include": ["rle", "low_res"]}).json
    (mask,) = first["objects"][0]["masks"]
    for given in (mask["rle"], mask["low_res"]):
        answer = server("POST", path, {"prompts": [{**CLICK, "mask": given}]})
        assert answer.status == 200, answer.body
        assert answer.json["objects"][0]["masks"][0]["area"] > 0


def test_polygons_png_and_tensors(server):
    image_id = server.upload()
    path = f"/v1/images/{image_id}/segment"
    request = {"prompts": [CLICK], "include": ["polygons"], "tolerance": 1.0}
    mask = server("POST", path, request).json["objects"][0]["masks"][0]
    assert len(mask["polygons"][0]) >= 3
    png = server("POST", path, {"prompts": [CLICK]}, Accept="image/png")
    assert np.asarray(Image.open(io.BytesIO(png.body))).sum() == mask["area"]
    assert float(png.headers["X-Tinyvit-Score"]) == pytest.approx(mask["score"], abs=1e-6)
    raw = server("POST", path, {"prompts": [CLICK, CLICK]}, Accept="application/octet-stream")
    assert load(raw.body)["low_res_logits"].shape[:2] == (2, 3)
    refused = server("POST", path, {"prompts": [CLICK, CLICK]}, Accept="image/png")
    assert (refused.status, refused.json["type"]) == (406, "/problems/not-acceptable")


def test_encode_and_segment_in_one_go(server, images):
    data = (images / "chelsea.png").read_bytes()
    answer = server("PUT", "/v1/segment?point=172,118&multimask=false", data)
    assert answer.status == 200, answer.body
    assert answer.json["objects"][0]["masks"][0]["rle"]["size"] == [300, 451]
    each = server("POST", "/v1/segment?point=9,9&point=40,40,0&box=1,1,90,90&each=true", data)
    assert len(each.json["objects"]) == 3
    for query in ("point=1", "point=1,b", "dot=1,2", "box=1,2,3", ""):
        assert server("POST", f"/v1/segment?{query}", data).status == 422


def test_an_image_s_life(server, images, tmp_path):
    data = (images / "coffee.png").read_bytes()
    image_id = hashlib.sha256(data).hexdigest()
    server("DELETE", f"/v1/images/{image_id}")
    assert server("GET", f"/v1/images/{image_id}").json["type"] == "/problems/unknown-image"
    assert server("PUT", f"/v1/images/{'0' * 64}", data).status == 409
    put = server("PUT", f"/v1/images/{image_id}", data)
    assert (put.status, put.json["cached"], put.json["width"]) == (201, False, 600)
    assert server("PUT", f"/v1/images/{image_id}", b"").json["cached"] is True
    assert server("HEAD", f"/v1/images/{image_id}").status == 200
    raw = server("GET", f"/v1/images/{image_id}/embedding?dtype=fp16")
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw.body)
    assert ImageEmbedding.load(file).original_size == (400, 600)
    assert server("DELETE", f"/v1/images/{image_id}").status == 204
    assert server("GET", f"/v1/images/{image_id}").status == 404


def test_an_upright_view_for_what_a_browser_cannot_show(server):
    stream = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (40, 60, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(stream, "TIFF", exif=exif)
    answer = server("POST", "/v1/images?view=32", stream.getvalue()).json
    view = Image.open(io.BytesIO(base64.b64decode(answer["view"])))
    assert max(view.size) == 32
    assert (answer["width"] > answer["height"]) == (view.size[0] > view.size[1])


def test_everything_with_progress(server):
    image_id = server.upload("rocket.jpg")
    path = f"/v1/images/{image_id}/everything"
    request = {"points_per_side": 4, "pred_iou_thresh": 0.1, "stability_score_thresh": 0.1}
    plain = server("POST", path, request)
    assert plain.status == 200, plain.body
    stream = server("POST", path, request, Accept="text/event-stream").body.decode()
    events = [part for part in stream.replace("\r", "").split("\n\n") if "event:" in part]
    assert "event: progress" in events[0]
    assert "event: result" in events[-1]
    result = json.loads(events[-1].partition("data: ")[2])
    assert [one["rle"] for one in result["masks"]] == [one["rle"] for one in plain.json["masks"]]
    assert server("POST", path, {"points_per_side": 65}).status == 422


def test_about_health_metrics_and_documents(server):
    assert server("GET", "/healthz").body == b"ok"
    assert server("GET", "/readyz").status == 200
    about = server("GET", "/v1").json
    assert about["model"]["precision"] == "fp32"
    assert about["adapters"] == ["label-studio", "x-anylabeling"]
    document = server("GET", "/v1/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert "/v1/images/{image_id}/segment" in document["paths"]
    families = {
        one.name for one in text_string_to_metric_families(server("GET", "/metrics").body.decode())
    }
    assert {"tinyvit_requests", "tinyvit_lane_jobs", "tinyvit_cache_bytes"} <= families
    assert server("GET", "/problems/busy").status == 200
    assert server("GET", "/problems/none").status == 404


@pytest.mark.parametrize(
    "method, path, body, kind, status, name",
    [
        ("POST", "/v1/images", b"hello", "image/jpeg", 422, "not-an-image"),
        ("POST", "/v1/images", b"a=b", "application/x-www-form-urlencoded", 415, "media-type"),
        ("POST", "/v1/images", b"x", "multipart/form-data; boundary=x", 415, "media-type"),
        ("GET", "/v1/images", None, None, 405, "method"),
        ("GET", "/v1/images/../../etc/passwd", None, None, 404, "no-such-path"),
        ("GET", f"/v1/images/{'g' * 64}", None, None, 404, "no-such-path"),
        ("GET", f"/v1/images/{'0' * 64}", None, None, 404, "unknown-image"),
        ("POST", NOBODY, b"{", "application/json", 400, "bad-request"),
        ("POST", NOBODY, b"{}", "text/plain", 415, "media-type"),
        ("POST", NOBODY, b"[" * 100_000, "application/json", 400, "bad-request"),
        ("POST", NOBODY, b'{"a": NaN}', "application/json", 400, "bad-request"),
        ("GET", "/nothing", None, None, 404, "no-such-path"),
        ("GET", "/page/..%2fapp.py", None, None, 404, "no-such-path"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(server, method, path, body, kind, status, name):
    answer = server(method, path, body, kind)
    assert (answer.status, answer.json["type"]) == (status, f"/problems/{name}")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize(
    "change, where",
    [
        ({"prompts": []}, "/prompts"),
        ({"prompts": [{"points": [[1, 2], [3]]}]}, "/prompts/0/points/1"),
        ({"prompts": [{"points": [["1", 2]]}]}, "/prompts/0/points/0/0"),
        ({"prompts": [{"points": [[True, 2]]}]}, "/prompts/0/points/0/0"),
        ({"prompts": [{"points": [[1e999, 2]]}]}, "/prompts/0/points/0/0"),
        ({"prompts": [{"box": [9, 9, 1, 1]}]}, "/prompts/0"),
        ({"prompts": [CLICK, {}]}, "/prompts/1"),
        ({"prompts": [{"points": [[900, 2]]}]}, "/prompts/0"),
        ({"prompts": [{**CLICK, "mask": {"size": [1, 1], "counts": "0"}}]}, "/prompts/0"),
        ({"which": "worst"}, "/which"),
        ({"surprise": 1}, "/surprise"),
        ({"tolerance": -1}, "/tolerance"),
    ],
)
def test_wrong_prompts_say_where(server, change, where):
    image_id = server.upload()
    body = json.dumps({"prompts": [CLICK], **change}).encode()
    body = body.replace(b"Infinity", b"1e999")
    answer = server("POST", f"/v1/images/{image_id}/segment", body, "application/json")
    assert answer.status == 422, answer.body
    assert answer.json.get("where") == where
    assert len(answer.body) < 1500


def test_input_is_not_repeated(server):
    image_id = server.upload()
    body = {"prompts": [CLICK], "x" * 100_000: "\udc80"}
    answer = server("POST", f"/v1/images/{image_id}/segment", body)
    assert answer.status == 422
    assert len(answer.body) < 1500


def test_limits_of_uploads(serving, segmenter):
    with serving(ServeSettings(port=0, max_image_mb=1, max_pixels=1000), segmenter) as (client, _):
        assert client("POST", "/v1/images", b"x" * (2**20 + 1)).status == 413
        stream = io.BytesIO()
        Image.new("RGB", (100, 100)).save(stream, "PNG")
        answer = client("POST", "/v1/images", stream.getvalue())
        assert (answer.status, answer.json["type"]) == (422, "/problems/too-many-pixels")


def test_embeddings_are_kept_in_a_folder(serving, segmenter, images, tmp_path):
    data = (images / "coffee.png").read_bytes()
    with serving(ServeSettings(port=0, keep=tmp_path), segmenter) as (client, _):
        image_id = client("POST", "/v1/images", data).json["id"]
    assert [path.stem for path in tmp_path.rglob("*.safetensors")] == [image_id]
    with serving(ServeSettings(port=0, keep=tmp_path), segmenter) as (client, _):
        path = f"/v1/images/{image_id}/segment"
        assert client("POST", path, {"prompts": [CLICK]}).status == 200
        client("DELETE", f"/v1/images/{image_id}")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_cache_forgets_what_was_used_longest_ago(serving, segmenter):
    with serving(ServeSettings(port=0, cache_mb=1), segmenter) as (client, service):
        ids = []
        for seed in range(6):
            stream = io.BytesIO()
            rng = np.random.default_rng(seed)
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(stream, "PNG")
            ids.append(client("POST", "/v1/images", stream.getvalue()).json["id"])
            client("POST", f"/v1/images/{ids[-1]}/segment", {"prompts": [{"points": [[9, 9]]}]})
        assert service.cache.nbytes <= 2**21  # what the last one needs is kept
        assert client("GET", f"/v1/images/{ids[0]}").status == 404
        assert client("GET", f"/v1/images/{ids[-1]}").status == 200


DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_document_is_what_the_app_says(server, serving, segmenter):
    with serving(ServeSettings(port=0), segmenter) as (client, _):
        said = client("GET", "/v1/openapi.json").json
    wanted = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    assert said == wanted, "write it anew with scripts/openapi"


def test_every_example_of_the_document_is_answered(server):
    schemas = server("GET", "/v1/openapi.json").json["components"]["schemas"]
    image_id, sent = server.upload(), 0
    for name, path in (("SegmentRequest", "segment"), ("EverythingRequest", "everything")):
        for example in schemas[name]["examples"]:
            answer = server("POST", f"/v1/images/{image_id}/{path}", example)
            assert answer.status == 200, (example, answer.body)
            sent += 1
    assert sent == 4


def test_request_ids_tags_and_what_is_not_sent_twice(server):
    image_id = server.upload()
    path = f"/v1/images/{image_id}/embedding"
    assert server("GET", "/healthz", X_Request_Id="my-1.a").headers["X-Request-Id"] == "my-1.a"
    assert server("GET", "/healthz", X_Request_Id="a b").headers["X-Request-Id"] != "a b"
    for where in (path, "/page/app.js"):
        tag = server("GET", where).headers["ETag"]
        again = server("GET", where, If_None_Match=tag)
        assert (again.status, again.body) == (304, b"")


def test_each_lane_computes_with_its_own_number_of_threads(serving, segmenter):
    import torch

    with serving(ServeSettings(port=0, threads=6), segmenter) as (_, service):
        service.encode_lane._run = lambda works: [work() for work in works]
        counts = [lane.submit("a", torch.get_num_threads).done.result(5) for lane in service.lanes]
        assert counts == [6, 3, 3]


def test_no_lane_loads_torch_for_another_engine():
    """Importing it takes seconds and 200 MB."""
    program = """
import sys, numpy as np
from tinyvit.serve.service import Service
from tinyvit.serve.settings import ServeSettings
service = Service(ServeSettings(backend="native"))
service.load()
for lane in service.lanes:
    lane.submit("a", lambda: None).done.exception(60)
print("torch" in sys.modules)
"""
    pytest.importorskip("tinyvit_native")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


def test_waiting_images_are_encoded_together(serving, segmenter, images):
    """While the lane is held up images wait; then those of one size go into one batch."""
    import threading

    with serving(ServeSettings(port=0), segmenter) as (client, service):
        sizes, held = [], threading.Event()
        run = service.encode_lane._run
        service.encode_lane._run = lambda works: (
            held.wait(10),
            sizes.append(len(works)),
            run(works),
        )[2]
        rng = np.random.default_rng(0)
        files = []
        for _ in range(3):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(stream, "PNG")
            files.append(stream.getvalue())
        files += [files[1], b"broken"]  # known by then, and no image: its own problem
        statuses = [None] * len(files)

        def send(number):
            statuses[number] = client("POST", "/v1/images", files[number]).status

        threads = [threading.Thread(target=send, args=(number,)) for number in range(len(files))]
        threads[0].start()
        while not service.encode_lane.queue.running:
            pass
        for thread in threads[1:]:
            thread.start()
        while len(service.encode_lane.queue) < 3:
            pass
        held.set()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 201, 201, 201, 422]
        assert sizes == [1, 3]


def test_requests_that_would_take_too_long_are_refused(server):
    stream = io.BytesIO()
    Image.new("RGB", (4000, 3000)).save(stream, "JPEG")
    image_id = server("POST", "/v1/images", stream.getvalue()).json["id"]
    path = f"/v1/images/{image_id}/segment"
    answer = server("POST", path, {"prompts": [CLICK] * 200})
    assert (answer.status, answer.json["type"]) == (422, "/problems/bad-parameters")
    assert "at most 41 masks" in answer.json["detail"]
    assert server("POST", path, {"prompts": [CLICK] * 200, "include": ["low_res"]}).status == 200


SCHEMATHESIS = os.environ.get("TINYVIT_SCHEMATHESIS")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance,unsupported_method"
)


@pytest.mark.slow  # two minutes alone
@pytest.mark.skipif(SCHEMATHESIS is None, reason="TINYVIT_SCHEMATHESIS names no program")
def test_what_schemathesis_makes_of_the_document(server):
    """``python -m venv s && s/bin/pip install schemathesis==4.32.5``: s/bin/schemathesis."""
    document = f"http://127.0.0.1:{server.port}/v1/openapi.json"
    words = ["--phases", "coverage,fuzzing", "--max-examples", "150", "--seed", "1"]
    words += ["--checks", CHECKS, "--request-timeout", "300", "--continue-on-failure"]
    done = subprocess.run([SCHEMATHESIS, "run", document, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
