"""Label Studio itself, on loopback with sqlite: a smart key point becomes a mask that it shows.

Slow. Wants the program of a Label Studio installed elsewhere (it pins Django and much more):
``python -m venv ls && ls/bin/pip install label-studio==1.23.2``, then
``TINYVIT_LABEL_STUDIO=ls/bin/label-studio scripts/test -m slow tests/serve/test_label_studio.py``.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from conftest import read_brush
from tinyvit.serve import ServeSettings

PROGRAM = os.environ.get("TINYVIT_LABEL_STUDIO")
CHROMIUM = shutil.which("chromium")
USER, PASSWORD, KEY = (
    "somebody@example.org",
    "a-password-of-mine",
    "0123456789abcdef" * 2 + "01234567",
)
CONFIG = """<View><Image name="img" value="$image"/>
<BrushLabels name="tag" toName="img" smart="false"><Label value="Cat"/></BrushLabels>
<KeyPointLabels name="kp" toName="img" smart="true" smartOnly="true"><Label value="Cat"/>
</KeyPointLabels></View>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="TINYVIT_LABEL_STUDIO names no Label Studio"),
]


class LabelStudio:
    """A running Label Studio."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def __call__(self, method, path, body=None, kind="application/json"):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Token {KEY}", "Content-Type": kind}
        asked = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(asked, timeout=100) as answer:
            return json.loads(answer.read() or b"null")


@pytest.fixture(scope="module")
def label_studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label-studio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "DJANGO_DB": "sqlite",
        "LABEL_STUDIO_USERNAME": USER,
        "LABEL_STUDIO_PASSWORD": PASSWORD,
        "LABEL_STUDIO_USER_TOKEN": KEY,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "ML_BLOCK_LOCAL_IP": "false",  # else it refuses a backend on this machine,
        "SSRF_PROTECTION_ENABLED": "false",  # and the webhook that it makes for it
        "COLLECT_ANALYTICS": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }
    words = [PROGRAM, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    own, deadline = LabelStudio(port), time.monotonic() + 900
    try:
        while True:
            assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
            try:
                own("GET", "/api/version")
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(1)
        yield own
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def backend(label_studio, serving, segmenter):
    os.environ["LABEL_STUDIO_API_KEY"] = KEY
    settings = ServeSettings(port=0, adapters=("label-studio",), label_studio_url=label_studio.url)
    with serving(settings, segmenter) as (client, service):
        yield client, service
    del os.environ["LABEL_STUDIO_API_KEY"]


@pytest.fixture(scope="module")
def task(label_studio, backend, images):
    """(project, task, backend's number): one image, uploaded."""
    project = label_studio("POST", "/api/projects", {"title": "cats", "label_config": CONFIG})["id"]
    mark = "a-boundary-of-mine"
    data = (
        (
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="chelsea.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        ).encode()
        + (images / "chelsea.png").read_bytes()
        + f"\r\n--{mark}--\r\n".encode()
    )
    kind = f"multipart/form-data; boundary={mark}"
    label_studio("POST", f"/api/projects/{project}/import", data, kind)
    found = label_studio("GET", f"/api/tasks?project={project}")
    number = found["tasks"][0]["id"]
    url = f"http://127.0.0.1:{backend[0].port}/label-studio"
    about = {"url": url, "project": project, "title": "tinyvit", "is_interactive": True}
    ml = label_studio("POST", "/api/ml", about)
    return project, number, ml["id"]


def test_label_studio_asks_for_a_mask_and_gets_it(label_studio, backend, task, segmenter, images):
    _, number, ml = task
    value = {"x": 38.1, "y": 39.3, "width": 0.4, "keypointlabels": ["Cat"]}
    size = {"original_width": 451, "original_height": 300, "image_rotation": 0}
    point = {"id": "a", "type": "keypointlabels", "from_name": "kp", "to_name": "img"}
    context = {"result": [{**size, **point, "value": value, "is_positive": True}]}
    for _ in range(2):
        answer = label_studio(
            "POST", f"/api/ml/{ml}/interactive-annotating", {"task": number, "context": context}
        )
    (result,) = answer["data"]["result"]
    mask = read_brush(result["value"]["rle"], (300, 451))
    point = [[38.1 * 451 / 100, 39.3 * 300 / 100]]
    (masks,) = segmenter.segment([images / "chelsea.png"], [[{"points": point}]])
    assert (mask == masks.mask(0)).all()
    assert len(backend[1].cache) == 1  # fetched once


@pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM")
def test_a_smart_key_point_is_shown_as_a_mask(label_studio, task, tmp_path):
    from playwright.sync_api import sync_playwright

    project, number, _ = task
    with sync_playwright() as own:
        browser = own.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{label_studio.url}/user/login")
        page.fill("[name=email]", USER)
        page.fill("[name=password]", PASSWORD)
        page.click("[type=submit]")
        page.wait_for_load_state("networkidle")
        page.goto(f"{label_studio.url}/projects/{project}/data?task={number}")
        canvas = page.locator("canvas").first
        canvas.wait_for(timeout=60_000)
        page.get_by_text("Auto-Annotation").first.click()
        page.get_by_text("Cat", exact=True).nth(1).click()  # that of the key points
        page.locator(".lsf-tool_smart").last.click()
        page.wait_for_timeout(500)
        page.screenshot(path=str(tmp_path / "before.png"))
        box = canvas.bounding_box()
        with page.expect_response("**/interactive-annotating*", timeout=60_000) as answered:
            page.mouse.click(box["x"] + 0.381 * box["width"], box["y"] + 0.393 * box["height"])
        assert answered.value.status == 200
        page.get_by_text("1 suggestions").wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=str(tmp_path / "after.png"))
        browser.close()
    before, after = (np.asarray(_image(tmp_path / f"{n}.png")) for n in ("before", "after"))
    assert (np.abs(before.astype(int) - after).max(-1) > 30).sum() > 2_000


def _image(path):
    from PIL import Image

    return Image.open(path).convert("RGB")
