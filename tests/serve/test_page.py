"""The page in Debian's Chromium: what a person does, and what they see."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from tiny import even_odd
from tinyvit.images import mask_ops
from tinyvit.images.mask_ops import outlines
from tinyvit.serve import ServeSettings

CHROMIUM = shutil.which("chromium")
PAGE = Path(__file__).parents[2] / "src" / "tinyvit" / "serve" / "page"

if CHROMIUM is None and os.environ.get("CI"):
    pytest.fail("CI needs Chromium: apt-get install chromium", pytrace=False)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM: the page was not tested")
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as own:
        found = own.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield found
        found.close()


@pytest.fixture
def open_page(browser, server):
    """``open_page(image=None, client=server, **context)``: a page that has taken an image in."""
    contexts, faults = [], []

    def make(image=None, client=server, hash_="", **context):
        own = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **context})
        contexts.append(own)
        page = own.new_page()
        base = f"http://127.0.0.1:{client.port}/"
        page.on("pageerror", lambda err: faults.append(str(err)))
        page.on(
            "console", lambda m: faults.append(m.text) if "Content Security" in m.text else None
        )
        page.on("request", lambda r: faults.append(r.url) if not is_own(r.url, base) else None)
        page.goto(base + hash_)
        wait(page, "document.body.dataset.state === 'empty'")
        if image is not None:
            page.set_input_files("#file", image)
            ready(page)
        return page

    yield make
    for own in contexts:
        own.close()
    assert faults == []


def wait(page, expression, seconds=60):
    """Until an expression is true; by polling, since the page's policy forbids ``eval``."""
    until = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < until, expression
        page.wait_for_timeout(20)


def is_own(url, base):
    return url.startswith((base, "blob:", "data:"))


def ready(page):
    wait(page, "document.body.dataset.state === 'ready'")


def state(page):
    return page.evaluate("tinyvit.history.state")


def screen(page, x, y):
    """Where a pixel of the image is on the screen."""
    return page.evaluate(
        "([x, y]) => { const p = tinyvit.view.toScreen(x, y);"
        "const b = document.getElementById('canvas').getBoundingClientRect();"
        "return [p.x + b.left, p.y + b.top]; }",
        [x, y],
    )


def click(page, x, y, **more):
    page.mouse.click(*screen(page, x, y), **more)
    answered(page)


def answered(page):
    wait(
        page,
        "() => { const s = tinyvit.history.state; const o = s.objects.find(o => o.id === s.current)"
        " ?? s.objects.at(-1); return !o || (!o.points.length && !o.box)"
        " || tinyvit.asker.isFresh(o); }",
    )


def shown_mask(page, size):
    """The current object's mask as the page enlarges it, at the image's own size."""
    height, width = size
    found = page.evaluate(
        """async ([width, height]) => {
          const { enlarge } = await import('/page/masks.js'), state = tinyvit.history.state;
          const object = state.objects.find((o) => o.id === state.current);
          const window_ = { x: 0, y: 0, step: 1, width, height };
          const mask = enlarge(tinyvit.asker.entryOf(object).logits, { width, height }, window_);
          let text = '';
          for (let i = 0; i < mask.length; i += 8192)
            text += String.fromCharCode(...mask.subarray(i, i + 8192));
          return btoa(text);
        }""",
        [width, height],
    )
    return np.frombuffer(base64.b64decode(found), np.uint8).reshape(height, width).astype(bool)


def exact_mask(segmenter, image, prompt, index=None):
    (masks,) = segmenter.segment([image], [[prompt]])
    return masks.mask(0) if index is None else masks.mask(0, index)


def test_01_open_click_and_see_the_server_s_mask(open_page, segmenter, images):
    page = open_page(images / "chelsea.png")
    differences = []
    rng = np.random.default_rng(5)
    for x, y in [(172, 118), *rng.uniform((9, 9), (440, 290), (14, 2)).tolist()]:
        page.evaluate("tinyvit.history.apply('begin')")
        click(page, x, y)
        point = state(page)["objects"][-1]["points"][0]
        assert abs(point["x"] - x) <= 0.5 and abs(point["y"] - y) <= 0.5
        prompt = {"points": [[point["x"], point["y"]]]}
        exact = exact_mask(segmenter, images / "chelsea.png", prompt)
        shown = shown_mask(page, exact.shape)
        differences.append((shown != exact).mean())
        if exact.any():
            assert (shown & exact).sum() / (shown | exact).sum() >= 0.99
    assert np.median(differences) <= 0.0005 and max(differences) <= 0.002
    pixels = page.evaluate(
        """() => { const c = document.getElementById('canvas'), own = c.getContext('2d');
          return Array.from(own.getImageData(c.width / 2, c.height / 2, 1, 1).data); }"""
    )
    assert pixels[3] == 255


def test_02_take_away_by_right_click_shift_and_long_press(open_page, images):
    page = open_page(images / "chelsea.png", has_touch=True)
    click(page, 172, 118)
    click(page, 100, 60, button="right")
    page.keyboard.down("Shift")
    click(page, 50, 200)
    page.keyboard.up("Shift")
    x, y = screen(page, 300, 220)
    client = page.context.new_cdp_session(page)
    touch = {"touchPoints": [{"x": x, "y": y}]}
    client.send("Input.dispatchTouchEvent", {"type": "touchStart", **touch})
    page.wait_for_timeout(600)
    client.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    wait(page, "tinyvit.history.state.objects[0].points.length === 4")
    assert [p["label"] for p in state(page)["objects"][0]["points"]] == [1, 0, 0, 0]


def drag(page, a, b, steps=6):
    page.mouse.move(*a)
    page.mouse.down()
    page.mouse.move(*b, steps=steps)
    page.mouse.up()


def test_03_a_box_by_drag_and_four_pixels_decide(open_page, images):
    page = open_page(images / "coffee.png")
    drag(page, screen(page, 100, 80), screen(page, 400, 300))
    answered(page)
    box = state(page)["objects"][0]["box"]
    assert np.abs(np.array(box) - [100, 80, 400, 300]).max() <= 1
    x, y = screen(page, 200, 200)
    drag(page, (x, y), (x + 3, y), steps=1)
    assert len(state(page)["objects"][0]["points"]) == 1
    drag(page, screen(page, 400, 200), screen(page, 450, 210))  # an edge, then a point
    drag(page, (x, y), screen(page, 220, 230))
    answered(page)
    own = state(page)["objects"][0]
    assert np.abs(np.array(own["box"]) - [100, 80, 450, 300]).max() <= 1
    assert np.abs(np.array([own["points"][0]["x"], own["points"][0]["y"]]) - [220, 230]).max() <= 1


def test_04_three_candidates(open_page, segmenter, images):
    page = open_page(images / "chelsea.png")
    click(page, 172, 118)
    assert page.locator("#choices button").count() == 3
    for index in range(3):
        page.keyboard.press(str(index + 1))
        assert state(page)["objects"][0]["chosen"] == index
        point = state(page)["objects"][0]["points"][0]
        prompt = {"points": [[point["x"], point["y"]]]}
        exact = exact_mask(segmenter, images / "chelsea.png", prompt, index)
        assert (shown_mask(page, exact.shape) != exact).mean() < 0.005
    click(page, 200, 130)
    assert not page.locator("#candidates").is_visible()


def test_05_two_objects_finish_rename_delete(open_page, images):
    page = open_page(images / "chelsea.png")
    click(page, 172, 118)
    page.wait_for_timeout(400)
    page.mouse.dblclick(*screen(page, 190, 125))
    assert [len(o["points"]) for o in state(page)["objects"]] == [2]
    assert state(page)["objects"][0]["finished"]
    click(page, 300, 80)
    assert len(state(page)["objects"]) >= 2
    page.locator("#objects input").first.fill("left eye")
    page.keyboard.press("Enter")
    page.locator("#objects input").first.blur()
    assert state(page)["objects"][0]["name"] == "left eye"
    before = len(state(page)["objects"])
    page.get_by_label("Delete left eye").click()
    assert len(state(page)["objects"]) == before - 1


def test_06_fifty_random_steps_undone_and_done_again(open_page, images):
    page = open_page(images / "chelsea.png")
    same = page.evaluate(
        """async () => {
          const { History } = await import('/page/state.js');
          const h = new History(); h.apply('open', {id: 'x', width: 9, height: 9, name: 'a'});
          let seed = 7; const r = (n) => (seed = (seed * 16807) % 2147483647) % n;
          const states = [JSON.stringify(h.state)];
          for (let i = 0; i < 50; i++) {
            const ids = h.state.objects.map((o) => o.id);
            const id = ids[r(Math.max(ids.length, 1))] ?? 0;
            const steps = [
              ['point', r(9), r(9), r(2)], ['box', [0, 0, 1 + r(8), 5]], ['begin'], ['finish'],
              ['remove', id], ['rename', id, 'n' + i], ['removePoint', 0],
              ['movePoint', 0, r(9), r(9)], ['choose', r(3)],
            ];
            h.apply(...steps[r(steps.length)]); states.push(JSON.stringify(h.state));
          }
          const is = (i) => JSON.stringify(h.state) === states[i];
          for (let i = 49; i >= 0; i--) { h.undo(); if (!is(i)) return `undo ${i}`; }
          if (h.undo()) return 'one undo too many';
          for (let i = 1; i <= 50; i++) { h.redo(); if (!is(i)) return `redo ${i}`; }
          return h.redo() ? 'one redo too many' : 'same';
        }"""
    )
    assert same == "same"
    click(page, 172, 118)
    click(page, 190, 120)
    page.keyboard.press("Control+z")
    assert len(state(page)["objects"][0]["points"]) == 1
    page.keyboard.press("Control+Shift+z")
    assert len(state(page)["objects"][0]["points"]) == 2


@pytest.mark.parametrize("ratio", [1, 1.5, 2])
def test_07_a_click_lands_on_the_pixel_that_is_seen(open_page, images, ratio):
    page = open_page(images / "rocket.jpg", device_scale_factor=ratio)
    rng = np.random.default_rng(3)
    for number in range(12):
        page.evaluate(
            "([f, x, y]) => { tinyvit.view.fit(); tinyvit.view.zoom(f, x, y); }",
            [float(np.exp(rng.uniform(-0.5, 2.5))), *map(float, rng.uniform(100, 700, 2))],
        )
        if number % 4 == 3:
            page.set_viewport_size({"width": 900 + 20 * number, "height": 600 + 10 * number})
            page.wait_for_timeout(200)
        x, y = page.evaluate(
            "() => { const v = tinyvit.view;"
            "const x0 = Math.max(v.x, 0) + 3, y0 = Math.max(v.y, 0) + 3;"
            "const x1 = Math.min(v.x + v.width * v.scale, v.boxWidth) - 3;"
            "const y1 = Math.min(v.y + v.height * v.scale, v.boxHeight) - 3;"
            "const p = v.toImage((x0 + x1) / 2, (y0 + y1) / 2); return [p.x, p.y]; }"
        )
        place = screen(page, x, y)
        page.evaluate("tinyvit.history.apply('begin')")
        page.mouse.click(*place)
        point = state(page)["objects"][-1]["points"][-1]
        assert abs(point["x"] - x) <= 0.5 + 0.5 / page.evaluate("tinyvit.view.scale"), number
        assert abs(point["y"] - y) <= 0.5 + 0.5 / page.evaluate("tinyvit.view.scale"), number


def turned(orientation, kind="JPEG"):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:30, :50] = (250, 20, 20)
    pixels[30:, 50:] = (20, 20, 250)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif)
    return stream.getvalue()


def test_08_turned_images_are_shown_upright(open_page):
    page = open_page()
    for orientation in range(1, 9):
        data, name = turned(orientation), f"{orientation}.jpg"
        page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": data})
        wait(page, f"tinyvit.history.state.image?.name === '{name}'")
        ready(page)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        image = state(page)["image"]
        assert (image["width"], image["height"]) == upright.size, orientation
        page.wait_for_timeout(100)
        for fx, fy in ((0.2, 0.2), (0.8, 0.8), (0.2, 0.8)):
            x, y = image["width"] * fx, image["height"] * fy
            seen = page.evaluate(
                "([x, y]) => { const p = tinyvit.view.toScreen(x, y);"
                "const c = document.getElementById('canvas');"
                "const r = devicePixelRatio; return Array.from("
                "c.getContext('2d').getImageData(p.x * r, p.y * r, 1, 1).data).slice(0, 3); }",
                [x, y],
            )
            wanted = upright.getpixel((int(x), int(y)))
            assert np.abs(np.subtract(seen, wanted)).max() < 40, orientation


def test_08_a_tiff_is_shown_by_the_server_s_view(open_page):
    file = {"name": "a.tif", "mimeType": "image/tiff", "buffer": turned(6, "TIFF")}
    page = open_page(file)
    assert (state(page)["image"]["width"], state(page)["image"]["height"]) == (60, 100)
    click(page, 30, 50)
    assert len(state(page)["objects"]) == 1


def test_09_previews_are_never_two_in_flight_and_stop(open_page, images):
    page = open_page(images / "chelsea.png")
    flying, most = set(), [0]

    def sent(request):
        if request.post_data and '"preview":true' in request.post_data:
            flying.add(request)
            most[0] = max(most[0], len(flying))

    page.on("request", sent)
    page.on("requestfinished", lambda request: flying.discard(request))
    page.on("requestfailed", lambda request: flying.discard(request))
    for number in range(6):
        page.mouse.move(*screen(page, 100 + 20 * number, 100))
        page.wait_for_timeout(200)
    assert most[0] == 1
    page.route(
        "**/segment",
        lambda route: route.fulfill(status=503, body="{}", headers={"Retry-After": "1"}),
    )
    page.mouse.move(*screen(page, 300, 200))
    wait(page, "!document.getElementById('preview').checked")
    assert "Preview is off" in page.locator("#status").inner_text()


def test_10_paste_drop_open_and_a_text_file(open_page, images):
    page = open_page()
    data = base64.b64encode((images / "rocket.jpg").read_bytes()).decode()
    give = """([data, kind, name]) => {
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
      const type = name.endsWith('txt') ? 'text/plain' : 'image/jpeg', given = new DataTransfer();
      given.items.add(new File([bytes], name, { type }));
      document.dispatchEvent(kind === 'paste'
        ? new ClipboardEvent('paste', { clipboardData: given, bubbles: true })
        : new DragEvent('drop', { dataTransfer: given, bubbles: true })); }"""
    page.evaluate(give, [data, "drop", "note.txt"])
    assert "no image file" in page.locator("#status").inner_text()
    page.evaluate(give, [data, "paste", "pasted.jpg"])
    ready(page)
    assert state(page)["image"]["name"] == "pasted.jpg"
    page.evaluate(give, [data, "drop", "dropped.jpg"])
    wait(page, "tinyvit.history.state.image.name === 'dropped.jpg'")
    broken = {"name": "b.png", "mimeType": "image/png", "buffer": b"nothing"}
    page.set_input_files("#file", broken)
    wait(page, "document.getElementById('status').textContent.includes('not an image')")


def export(page, name, only=False):
    page.keyboard.press("Control+s")
    page.locator(f"[name=format][value={name}]").check()
    page.locator("#only").set_checked(only)
    with page.expect_download() as found:
        page.locator("#save").click()
    return found.value.suggested_filename, Path(found.value.path()).read_bytes()


def test_11_every_export_is_read_back(open_page, segmenter, images):
    page = open_page(images / "chelsea.png")
    prompts = []
    for x, y in ((172, 118), (300, 80)):
        click(page, x, y)
        point = state(page)["objects"][-1]["points"][0]
        prompts.append({"points": [[point["x"], point["y"]]]})
        page.keyboard.press("n")
    wanted = [exact_mask(segmenter, images / "chelsea.png", prompt) for prompt in prompts]
    name, data = export(page, "png")
    assert name == "chelsea.zip"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        files = archive.namelist()
        for file, mask in zip(files, wanted, strict=True):
            found = np.asarray(Image.open(io.BytesIO(archive.read(file))).convert("L")) > 127
            assert (found == mask).all()
    _, data = export(page, "labels")
    labels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert ((labels == 2) == wanted[1]).all()
    _, data = export(page, "coco")
    for row, mask in zip(json.loads(data)["annotations"], wanted, strict=True):
        assert (mask_ops.decode(row["segmentation"]) == mask).all()
        assert row["area"] == mask.sum() == coco_mask.area(row["segmentation"])
    _, data = export(page, "svg")
    assert data.count(b'<path fill-rule="evenodd"') == 2
    for path, mask in zip(re.findall(r' d="(.*?)"', data.decode()), wanted, strict=True):
        rings = [ring[1:].split("L") for ring in path.split("Z") if ring]
        rings = [np.array([point.split() for point in ring], float) for ring in rings]
        assert (even_odd(rings, mask.shape) == mask).all()
        assert [ring.tolist() for ring in rings] == [ring.tolist() for ring in outlines(mask)]
    _, data = export(page, "labelme")
    shapes = json.loads(data)["shapes"]
    assert {shape["label"] for shape in shapes} == {"object 1", "object 2"}
    page.keyboard.press("Control+s")
    points = []
    for tolerance in ("0", "2"):
        page.locator("#simplify").fill(tolerance)
        wait(page, "document.getElementById('simplified').textContent.includes(' points')")
        page.wait_for_timeout(300)
        points.append(int(page.locator("#simplified").inner_text().split()[-2]))
    assert points[1] < points[0] / 3
    page.get_by_role("button", name="Cancel").click()
    name, data = export(page, "all")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert name == "chelsea.zip" and archive.testzip() is None
        assert {Path(file).suffix for file in archive.namelist()} == {".png", ".json", ".svg"}
    _, data = export(page, "cutout")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        rgba = np.asarray(Image.open(io.BytesIO(archive.read(archive.namelist()[0]))))
    assert ((rgba[..., 3] > 0) == wanted[0]).all()


def test_12_a_project_comes_back(open_page, images, tmp_path):
    page = open_page(images / "chelsea.png")
    click(page, 172, 118)
    click(page, 200, 140)
    name, data = export(page, "project")
    assert name == "chelsea.tinyvit.json"
    file = tmp_path / name
    file.write_bytes(data)
    other = open_page()
    other.set_input_files("#file", file)
    other.set_input_files("#file", images / "chelsea.png")
    ready(other)
    assert state(other)["objects"][0]["points"] == state(page)["objects"][0]["points"]


def test_13_copied_command_python_and_curl_give_the_mask(open_page, server, images, tmp_path):
    page = open_page(images / "chelsea.png")
    click(page, 172, 118)
    page.locator("#as summary").click()
    texts = {}
    for kind in ("command", "python", "curl"):
        page.evaluate("document.getElementById('copied').textContent = ''")
        page.locator(f"[data-as={kind}]").click()
        wait(page, "document.getElementById('copied').textContent")
        texts[kind] = page.evaluate("document.getElementById('copied').textContent")
    shutil.copy(images / "chelsea.png", tmp_path)
    point = state(page)["objects"][0]["points"][0]
    assert (
        texts["command"]
        == f"tinyvit segment 'chelsea.png' --point {point['x']:g},{point['y']:g},1 -o masks"
    )
    answer = subprocess.run(
        ["bash", "-c", texts["curl"] + " -s"], cwd=tmp_path, capture_output=True
    )
    found = json.loads(answer.stdout)["objects"][0]
    code = texts["python"] + "    print(int(mask.sum()))"
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[2])}
    area = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, env=environment
    )
    assert int(area.stdout) == found["masks"][0]["area"]
    found = subprocess.run(
        ["bash", "-c", texts["command"].replace("tinyvit", f"{sys.executable} -m tinyvit", 1)],
        cwd=tmp_path, capture_output=True, env=environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    mask = np.asarray(Image.open(tmp_path / "masks" / "chelsea.mask-1.png").convert("L")) > 127
    assert mask.sum() == int(area.stdout)
    page.keyboard.press("3")
    page.locator("[data-as=python]").click()
    wait(page, "document.getElementById('copied').textContent.includes('mask(0, 2)')")
    page.locator("[data-as=command]").click()
    wait(page, "document.getElementById('copied').textContent.includes('mask-1-3.png')")


def test_14_keyboard_only_from_open_to_save(open_page):
    page = open_page()
    page.get_by_label("Open the example coffee").focus()
    page.keyboard.press("Enter")
    ready(page)
    for _ in range(5):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("ArrowUp")
    assert "x " in page.locator("#status").inner_text()
    page.keyboard.press("Enter")
    answered(page)
    page.keyboard.press("b")
    for _ in range(4):
        page.keyboard.press("Shift+ArrowDown")
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Enter")
    answered(page)
    assert state(page)["objects"][0]["box"]
    page.keyboard.press("n")
    page.keyboard.press("Control+s")
    page.keyboard.press("Tab")
    with page.expect_download() as found:
        page.locator("#save").focus()
        page.keyboard.press("Enter")
    assert found.value.suggested_filename.endswith(".png")


STATES = ("empty", "ready", "clicked", "two", "keys", "export")


@pytest.mark.parametrize("name", STATES)
def test_15_no_barriers_in_six_states_and_both_themes(open_page, images, name):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(color_scheme="light", bypass_csp=True)
    bring(page, name, images)
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        found = Axe().run(page)
        assert found.violations_count == 0, f"{theme}: {found.generate_report()}"
        if folder := os.environ.get("TINYVIT_SCREENSHOTS"):  # docs/pictures, to write them anew
            page.wait_for_timeout(200)
            shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            shown.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
            shown.save(f"{folder}/page-{name}-{theme}.jpg", quality=82)


def bring(page, name, images):
    """Bring the page into one of six states."""
    if name == "empty":
        return
    page.set_input_files("#file", images / "coffee.png")
    ready(page)
    if name in ("clicked", "two", "export"):
        drag(page, screen(page, 130, 60), screen(page, 470, 330))
        answered(page)
    if name in ("two", "export"):
        page.keyboard.press("n")
        click(page, 540, 60)
        page.mouse.move(5, 5)
    if name == "keys":
        page.keyboard.press("?")
    if name == "export":
        page.keyboard.press("Control+s")
    page.wait_for_timeout(150)


def test_16_what_a_screen_reader_hears(open_page, images):
    page = open_page(images / "chelsea.png")
    status = page.locator("#status")
    assert (status.get_attribute("aria-live"), status.inner_text()) == (
        "polite",
        "Click on something.",
    )
    click(page, 172, 118)
    playwright.expect(status).to_contain_text("object 1, 1 point, score 0.")
    page.keyboard.press("Control+z")
    assert status.inner_text() == "undone"
    page.keyboard.press("Control+y")
    assert status.inner_text() == "done again"
    page.keyboard.press("n")
    playwright.expect(status).to_contain_text("pixels, score")
    page.keyboard.press("ArrowLeft")
    playwright.expect(status).to_contain_text("x 225 y 150")
    page.keyboard.press("b")
    playwright.expect(status).to_contain_text("opposite corner")
    page.keyboard.press("Escape")
    page.get_by_label("Delete object 1").click()
    playwright.expect(status).to_contain_text("deleted")


def test_17_a_server_that_forgot_gets_the_image_again(open_page, server, images):
    page = open_page(images / "chelsea.png")
    click(page, 172, 118)
    server("DELETE", f"/v1/images/{state(page)['image']['id']}")
    click(page, 190, 120)
    assert len(state(page)["objects"][0]["points"]) == 2
    assert page.evaluate("tinyvit.asker.isFresh(tinyvit.history.state.objects[0])")


def test_18_busy_and_offline_are_waited_out(open_page, images):
    page = open_page(images / "chelsea.png")
    answers = ["busy", "cut"]

    def route(own):
        kind = answers.pop(0) if answers else "on"
        if kind == "busy":
            own.fulfill(status=503, headers={"Retry-After": "1"}, body='{"type": "/problems/busy"}')
        elif kind == "cut":
            own.abort()
        else:
            own.continue_()

    page.route("**/segment", route)
    page.locator("#preview").uncheck()
    page.mouse.click(*screen(page, 172, 118))
    playwright.expect(page.locator("#status")).to_contain_text("busy")
    playwright.expect(page.locator("#status")).to_contain_text("kept")
    answered(page)
    assert state(page)["objects"][0]["points"]


def test_19_touch_taps_pinches_and_moves(open_page, images):
    page = open_page(images / "chelsea.png", has_touch=True)
    page.touchscreen.tap(*screen(page, 172, 118))
    answered(page)
    assert state(page)["objects"][0]["points"][0]["label"] == 1
    before = page.evaluate("tinyvit.view.scale")
    client = page.context.new_cdp_session(page)

    def touch(kind, *points):
        points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (300, 300))
    touch("touchStart", (300, 300), (400, 300))
    for step in range(1, 6):
        touch("touchMove", (300 - 10 * step, 300), (400 + 10 * step, 300))
    touch("touchEnd")
    assert page.evaluate("tinyvit.view.scale") > 1.5 * before
    assert len(state(page)["objects"][0]["points"]) == 1


def test_20_nothing_comes_from_elsewhere_and_the_page_is_small(open_page, images):
    page = open_page(images / "rocket.jpg")  # open_page looks at every request and every violation
    click(page, 200, 150)
    code = [path for path in PAGE.iterdir() if path.suffix != ".jpg"]
    assert sum(path.stat().st_size for path in code) <= 100_000
    assert sum(path.stat().st_size for path in PAGE.glob("*.jpg")) <= 60_000
    for path in code:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400
        assert "innerHTML" not in text and "https://" not in text


def test_21_a_large_image(open_page):
    """A megapixel more than the page shows unreduced."""
    stream = io.BytesIO()
    yy, xx = np.mgrid[:4200, :5000]
    pixels = np.stack([xx % 256, yy % 256, (xx + yy) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=60)
    page = open_page({"name": "large.jpg", "mimeType": "image/jpeg", "buffer": stream.getvalue()})
    click(page, 2500, 2100)
    assert state(page)["image"]["width"] == 5000
    point = state(page)["objects"][0]["points"][0]
    assert abs(point["x"] - 2500) < 5


def test_22_every_control_is_reachable_on_a_phone(open_page, images):
    page = open_page(images / "chelsea.png", viewport={"width": 360, "height": 640}, has_touch=True)
    page.touchscreen.tap(*screen(page, 172, 118))
    answered(page)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
    for selector in (
        "#everything",
        "#export",
        "#undo",
        "#fit",
        "[data-tool=box]",
        "#objects button >> nth=0",
    ):
        page.locator(selector).scroll_into_view_if_needed()
        box = page.locator(selector).bounding_box()
        assert box["height"] >= 40 and box["x"] >= 0 and box["x"] + box["width"] <= 361, selector


def test_23_the_token_comes_by_the_address_or_is_asked_for(open_page, serving, segmenter, images):
    token = "t" * 20
    with serving(ServeSettings(port=0, token=token), segmenter) as (client, _):
        page = open_page(images / "chelsea.png", client, f"#token={token}")
        assert page.url == f"http://127.0.0.1:{client.port}/"
        click(page, 172, 118)
        other = open_page(None, client)
        other.locator("#token").fill(token)
        other.get_by_role("button", name="Use it").click()
        other.set_input_files("#file", images / "chelsea.png")
        ready(other)
        click(other, 172, 118)
        assert state(other)["objects"]
