"""Every block of docs/serving.md runs; keys and deployment files are as they should be."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = [(part.partition("\n")[0], part.partition("\n")[2]) for part in PAGE.split("\n```")[1::2]]


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture
def folder(tmp_path, images):
    from PIL import Image

    Image.open(images / "chelsea.png").resize((640, 480)).save(tmp_path / "cat.jpg")
    return tmp_path


def test_no_block_is_forgotten():
    counts = {name: sum(one == name for one, _ in BLOCKS) for name, _ in BLOCKS}
    assert counts == {"bash": 2, "python": 2, "javascript": 1, "xml": 1, "dockerfile": 1}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_shell_blocks(server, folder):
    start, api = (text.replace(":8765", f":{server.port}") for text in blocks("bash"))
    curl = start.splitlines()[-1]
    assert "/v1/segment?point=" in curl
    for text in (f"{curl} -sf", api.replace("curl -s", "curl -sf")):
        done = subprocess.run(["bash", "-euc", text], cwd=folder, capture_output=True)
        assert done.returncode == 0, done
    assert (folder / "mask.png").stat().st_size and (folder / "cat.safetensors").stat().st_size


def test_the_python_client(server, folder):
    code = blocks("python")[0].replace("8765", str(server.port))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=os.environ
    )
    assert re.fullmatch(r"eye \d+\n", done.stdout), done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="NO CHROMIUM")
def test_the_javascript(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as own:
        browser = own.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        code = f"async () => {{ {blocks('javascript')[0]}; return objects[0].masks[0].area; }}"
        assert page.evaluate(code) > 0
        browser.close()


@pytest.mark.slow
def test_ray_serve(images, tmp_path):
    """Two minutes on two busy cores, with ray[serve]."""
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    import time
    import urllib.error
    import urllib.request

    try:
        exec(blocks("python")[1], {})
        data = (images / "chelsea.png").read_bytes()
        url = "http://127.0.0.1:8000/v1/segment?point=172,118"
        answered, deadline = 0, time.monotonic() + 120
        while answered < 20:
            assert time.monotonic() < deadline
            asked = urllib.request.Request(url, data, {"Content-Type": "image/png"}, method="PUT")
            try:
                with urllib.request.urlopen(asked) as answer:
                    answered += answer.status == 200
            except urllib.error.HTTPError as err:  # a replica that still loads its model
                assert (err.code, json.load(err)["type"]) == (503, "/problems/loading")
                time.sleep(int(err.headers["Retry-After"]))
    finally:
        serve.shutdown()
        ray.shutdown()


def test_the_keyboard_table_is_that_of_the_page():
    script = (ROOT / "src" / "tinyvit" / "serve" / "page" / "keys.js").read_text(encoding="utf-8")
    keys = re.findall(r'^  \["(.*?)", "(.*?)"\],$', script, re.MULTILINE)
    guide = (ROOT / "docs" / "guides" / "click.md").read_text(encoding="utf-8")
    assert len(keys) > 10
    table = guide.partition("| key | does |\n|---|---|\n")[2].splitlines()
    assert table == [f"| {key} | {words} |" for key, words in keys]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_is_valid(tmp_path):
    text = (ROOT / "deploy" / "tinyvit@.service").read_text(encoding="utf-8")
    unit = tmp_path / "tinyvit@.service"
    unit.write_text(text.replace("/opt/tinyvit/bin/tinyvit", "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "tinyvit@8765.service")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "tinyvit@" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
