"""API v1 over a socket: equal to the library, and polite about everything else."""

import base64
import hashlib
import io
import json
import random
import socket
import time

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load

from tinyvit import ImageEmbedding, Prompt
from tinyvit.sam import mask_ops
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
        ({"prompts": [{"points": [[900, 2]]}]}, None),
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


def test_rebinding_cross_site_pages_and_tokens(server, serving, segmenter):
    wrong = server("GET", "/v1", Host="evil.example")
    assert (wrong.status, wrong.json["type"]) == (421, "/problems/wrong-host")
    data = b"x"
    page = server("POST", "/v1/images", data, Origin="https://evil.example")
    assert page.status == 403
    assert server("POST", "/v1/images", data, Sec_Fetch_Site="cross-site").status == 403
    own = server("GET", "/v1", Origin=f"http://127.0.0.1:{server.port}")
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers
    policy = server("GET", "/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    settings = ServeSettings(port=0, token="t" * 20, allow_origins=("https://tool.example",))
    with serving(settings, segmenter) as (client, _):
        assert client("GET", "/healthz").status == 200
        assert client("GET", "/").status == 200
        missing = client("GET", "/v1")
        assert (missing.status, missing.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert client("GET", "/v1", Authorization="Bearer " + "u" * 20).status == 401
        assert client("GET", "/v1", Authorization="Basic !!").status == 401
        assert client("GET", "/v1", Authorization="Bearer " + "t" * 20).status == 200
        basic = base64.b64encode(b"anybody:" + b"t" * 20).decode()
        assert client("GET", "/v1", Authorization=f"Basic {basic}").status == 200
        allowed = client(
            "OPTIONS", "/v1/images", Origin="https://tool.example",
            Access_Control_Request_Method="POST",
        )  # fmt: skip
        assert allowed.status == 204
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://tool.example"


def test_limits_of_uploads(serving, segmenter):
    with serving(ServeSettings(port=0, max_image_mb=1, max_pixels=1000), segmenter) as (client, _):
        assert client("POST", "/v1/images", b"x" * (2**20 + 1)).status == 413
        stream = io.BytesIO()
        Image.new("RGB", (100, 100)).save(stream, "PNG")
        answer = client("POST", "/v1/images", stream.getvalue())
        assert (answer.status, answer.json["type"]) == (422, "/problems/too-many-pixels")


def test_slow_clients_are_closed_while_others_are_served(serving, segmenter):
    with serving(ServeSettings(port=0, receive_seconds=1.0), segmenter) as (client, _):
        own = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(100)]
        for number, one in enumerate(own):
            one.sendall(b"POST /v1/images HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            if number % 2:
                one.sendall(b"Content-Length: 99999\r\nContent-Type: image/png\r\n\r\nabc")
        assert client("GET", "/healthz").status == 200
        time.sleep(1.5)
        for one in own:
            one.settimeout(5)
            try:
                while one.recv(4096):
                    pass
            except ConnectionResetError:
                pass
            one.close()
        assert client("GET", "/healthz").status == 200


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
        assert service.cache.nbytes <= 2**20 + 2**19
        assert client("GET", f"/v1/images/{ids[0]}").status == 404
        assert client("GET", f"/v1/images/{ids[-1]}").status == 200


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 8)):
        kind = rng.randrange(3)
        place = rng.randrange(len(data))
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 200)]
        else:
            data[place:place] = rng.randbytes(rng.randrange(1, 50))
        if not data:
            return b""
    return bytes(data)


def fuzz(server, count, seed):
    rng = random.Random(seed)
    image_id = server.upload()
    good = json.dumps(
        {"prompts": [CLICK, {"box": [1, 2, 30, 40]}], "include": ["low_res"]}
    ).encode()
    small = {}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"):
        stream = io.BytesIO()
        Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(
            stream, kind
        )
        small[kind] = stream.getvalue()
    odd = [
        *("{}", "[]", "null", "1", '"x"', '{"prompts": 5}', '{"prompts": [' + "[" * 5000),
        '{"prompts": [{"points": [[' + "9" * 5000 + ",1]]}]}",
        '{"prompts": [{"points": [[1e400, 1]]}]}',
        '{"prompts": [{"name": "\\ud800", "points": [[1,1]]}]}',
        *('{"\\ud800": 1}', "\ufeff{}"),
    ]
    paths = [
        "/..",
        "/%2e%2e/%2e%2e",
        "/v1/images/" + "a" * 3000,
        "/page/%00",
        "/v1/images//segment",
        "/v1/./x",
    ]
    for number in range(count):
        what = number % 6
        if what == 0:
            answer = server(
                "POST", f"/v1/images/{image_id}/segment", mutated(rng, good), "application/json"
            )
        elif what == 1:
            answer = server(
                "POST",
                f"/v1/images/{image_id}/segment",
                rng.choice(odd).encode("utf-8", "surrogatepass"),
                "application/json",
            )
        elif what == 2:
            answer = server("POST", "/v1/images", mutated(rng, small[rng.choice(list(small))]))
        elif what == 3:
            answer = server(
                rng.choice(["GET", "PUT", "PATCH", "DELETE", "POST"]), rng.choice(paths)
            )
        elif what == 4:
            answer = server(
                "POST",
                rng.choice(["/v1/images", "/label-studio/predict", "/x-anylabeling/v1/predict"]),
                rng.randbytes(200),
                rng.choice(["application/json", "image/png", "text/html", ""]),
            )
        else:
            answer = server(
                "POST",
                f"/v1/images/{image_id}/everything",
                mutated(rng, b'{"points_per_side": 1}'),
                "application/json",
            )
        assert answer.status < 500 or answer.status == 503, (
            number,
            answer.status,
            answer.body[:300],
        )
        if answer.status >= 400 and answer.body:
            assert answer.json["type"] != "/problems/our-fault"
    assert server("POST", f"/v1/images/{image_id}/segment", {"prompts": [CLICK]}).status == 200


def test_two_thousand_wrong_requests(server):
    fuzz(server, 2000, 1)


@pytest.mark.slow
def test_ten_thousand_wrong_requests(server):
    fuzz(server, 10_000, 2)


LOCAL = b"HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/images " + LOCAL + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabc",
        b"POST /v1/images "
        + LOCAL
        + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"GET /healthz " + LOCAL + b"X: " + b"y" * 20_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"GET /healthz " + LOCAL + b"\r\nGET /healthz " + LOCAL + b"Connection: close\r\n\r\n",
    ],
)
def test_broken_http(server, raw):
    own = socket.create_connection(("127.0.0.1", server.port))
    own.settimeout(5)
    own.sendall(raw)
    own.shutdown(socket.SHUT_WR)
    found = b""
    while chunk := own.recv(4096):
        found += chunk
    own.close()
    assert b" 500 " not in found
    assert server("GET", "/healthz").status == 200
