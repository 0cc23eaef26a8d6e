"""Measure ``tinyvit serve`` beside a direct loop, a bare FastAPI handler and osam's server.

All have the same weights and take turns, so that a busy machine does not matter; their clients run
on the same cores. Every line that has a bound says whether it holds. Writes ``serve.md`` and
``serve.json``.
"""

import argparse
import base64
import io
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sam_weights import write_weights
from serve_tools import (
    BARE,
    BASELINE,
    JSON,
    OSAM,
    Asker,
    Sampler,
    free_port,
    health,
    image_of,
    meanwhile,
    p95,
    png_of,
    process,
    requests_of,
    resident,
    seconds_of,
    together,
)

from tinyvit import Segmenter
from tinyvit.bench import machine_facts

HERE = Path(__file__).parent
IMAGES = [
    HERE.parent / "examples" / "pictures" / name
    for name in ("chelsea.png", "coffee.png", "rocket.jpg")
]
BOUND = 512 + 16 * 32 + 1100
"""MB over the process at rest: embeddings, bodies, one image of 50 million pixels being read."""


class Report:
    """Lines of the table, with what must hold."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, measured: str, must: str = "", holds: bool | None = None) -> None:
        """Say one thing."""
        row = {"what": what, "measured": measured, "must": must, "holds": holds}
        self.rows.append(row)
        print(f"{what}: {measured}  {must} {'' if holds is None else holds}", flush=True)


class Bench:
    """All measurements with one kind of weights."""

    def __init__(
        self, name: str, weights: str | None, osam: str | None, quick: bool, report: Report
    ) -> None:
        self.name, self.weights, self.osam, self.quick = name, weights, osam, quick
        self.report, self.segmenter = report, Segmenter(weights)
        self.rounds, self.clicks = (2, 8) if quick else (5, 30)
        self.seed = 0

    def say(self, what: str, measured: str, must: str = "", holds: bool | None = None) -> None:
        """A line of this kind of weights."""
        self.report.add(f"{self.name}: {what}", measured, must, holds)

    def new_image(self) -> bytes:
        """One that the server has not seen."""
        self.seed += 1
        return image_of(self.seed)

    def run(self, folder: Path) -> None:
        """Everything.

        Args:
            folder: For what osam's server is given.
        """
        port, bare_port = free_port(), free_port()
        serve = [sys.executable, "-m", "tinyvit", "serve", "--port", str(port), "--log", "text"]
        serve += ["--trust-proxy", "127.0.0.1"]
        if self.weights:
            serve += ["--checkpoint", self.weights]
        bare = [sys.executable, "-c", BARE, str(bare_port), self.weights or ""]
        self.start(serve, port)
        with ExitStack() as running:
            server = running.enter_context(process(serve, port))
            self.rest, sampler = resident(server), Sampler(server)
            self.one_client(port)
            self.throughput(port)
            self.beside_an_encoding(port)
            self.many_images(port)
            self.hundred(port)
            self.busy(port)
            self.hang_up(port, server)
            self.cut_off(port)
            self.memory(port, server)
            if self.name == "starter":
                self.page(port)
            most = sampler.close()
            shown = f"{self.rest:.0f} MB at rest, at most {most:.0f} MB"
            must = f"<= at rest + {BOUND} MB"
            self.say(
                "memory, ten times a second, all the above", shown, must, most <= self.rest + BOUND
            )
            self.peer("tinyvit serve", port, server)
            other = running.enter_context(process(bare, bare_port))
            self.peer("bare FastAPI handler", bare_port, other)
        if self.osam is not None:
            self.beside_osam(folder)

    def beside_osam(self, folder: Path) -> None:
        """The same weights in osam's server."""
        exported, port = folder / f"osam-{self.name}", free_port()
        argv = [sys.executable, "-m", "tinyvit", "export", self.weights or "tinyvit_sam_2m"]
        argv += ["-o", str(exported), "--for", "osam", "--keep-failed"]  # only its speed counts
        subprocess.run(argv, stdout=subprocess.DEVNULL, check=False)
        environment = {"HOME": str(folder), "PATH": os.environ["PATH"]}
        with process([self.osam, "-c", OSAM, str(port), str(exported)], port, environment) as own:
            self.peer("osam 0.8.1", port, own)

    def peer(self, name: str, port: int, own: Any) -> None:
        """A server with one client that clicks, alone and beside one that sends new images."""
        asker, other, data = Asker(port), Asker(port), png_of(self.seed)
        text = base64.b64encode(data).decode()
        asked, path = {"image": text, "points": [[100, 90]]}, "/predict"
        if name == "tinyvit serve":
            image_id = asker.upload(data)
            asked, path = {"prompts": [{"points": [[100, 90]]}]}, f"/v1/images/{image_id}/segment"
        elif name != "bare FastAPI handler":
            prompt = {"points": [[100, 90]], "point_labels": [1]}
            asked, path = {"model": "tinyvit", "image": text, "prompt": prompt}, "/api/generate"
        body, count = json.dumps(asked), max(3, self.clicks // 3)
        click = lambda: asker("POST", path, body, **JSON)  # noqa: E731
        encode = lambda: other("POST", path, body, **JSON)  # noqa: E731
        if name == "tinyvit serve":
            encode = lambda: other.upload(self.new_image())  # noqa: E731
        size = len(click())  # the first one is for warming up
        alone = [seconds_of(click) for _ in range(count)]
        with meanwhile(encode):
            beside, healthy = [seconds_of(click) for _ in range(count)], health(port, 4 * count)
        self.say(
            name,
            f"{1 / statistics.median(alone):.1f} clicks/s, p95 {1000 * p95(alone):.0f} ms, "
            f"{1000 * p95(beside):.0f} ms beside another client's images, /healthz then "
            f"{p95(healthy):.0f} ms; {len(body) / 1e3:.1f} + {size / 1e3:.1f} kB a click, "
            f"{resident(own):.0f} MB",
        )

    def start(self, serve: Sequence[str], port: int) -> None:
        """From nothing to ready, against a process with a bare Segmenter."""
        ratios, spent = [], []
        for _ in range(self.rounds):
            argv = [sys.executable, "-c", BASELINE, self.weights or ""]
            direct = seconds_of(lambda argv=argv: subprocess.run(argv, check=True))
            start = time.perf_counter()
            with process(serve, port):
                spent.append(time.perf_counter() - start)
            ratios.append(spent[-1] / direct)
        ratio = statistics.median(ratios)
        shown = f"{statistics.median(spent):.2f} s, {ratio:.2f}x of a bare Segmenter"
        self.say("start to ready", shown, "<= 1.3x", ratio <= 1.3)

    def direct(self, count: int) -> tuple[list[Any], list[Any]]:
        """Embeddings, and what their prompts share."""
        images = [np.asarray(Image.open(io.BytesIO(self.new_image()))) for _ in range(count)]
        embeddings = list(self.segmenter.embed(images))
        return embeddings, [self.segmenter.prepare(one) for one in embeddings]

    def one_client(self, port: int) -> None:
        """A click through HTTP against ``Segmenter.segment``."""
        asker, data = Asker(port), self.new_image()
        image_id = asker.upload(data)
        (embedding,) = self.segmenter.embed([np.asarray(Image.open(io.BytesIO(data)))])
        rng, more, ratios, served = np.random.default_rng(0), [], [], []
        for _ in range(self.rounds):
            http_, loop = [], []
            for _ in range(self.clicks):
                x, y = rng.uniform(0, 300, 2)
                http_.append(seconds_of(lambda x=x, y=y: asker.click(image_id, x, y)))
                prompts = [[{"points": [[x, y]]}]]
                loop.append(
                    seconds_of(lambda p=prompts: list(self.segmenter.segment(embedding, p)))
                )
            a, b = statistics.median(http_), statistics.median(loop)
            more.append(1000 * (a - b))
            ratios.append(a / b)
            served.append(1000 * a)
        added, ratio = statistics.median(more), statistics.median(ratios)
        shown = f"{statistics.median(served):.1f} ms, {added:+.1f} ms, {ratio:.2f}x"
        holds = added <= 3 and ratio <= 1.25
        self.say(
            "one client: a click against Segmenter.segment", shown, "<= +3 ms, <= 1.25x", holds
        )

    def throughput(self, port: int) -> None:
        """Eight clients against the direct loop over the same number of images."""
        askers = [Asker(port) for _ in range(8)]
        ids = [asker.upload(self.new_image()) for asker in askers]
        embeddings, prepared = self.direct(8)
        ratios = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            together(8, lambda n: [askers[n].click(ids[n], 100, 90) for _ in range(self.clicks)])
            served = 8 * self.clicks / (time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(self.clicks):
                for embedding, shared in zip(embeddings, prepared, strict=True):
                    self.segmenter.predict(embedding, [{"points": [[100, 90]]}], prepared=shared)
            ratios.append(served * (time.perf_counter() - start) / (8 * self.clicks))
        ratio = statistics.median(ratios)
        shown = f"{served:.0f} clicks/s, {ratio:.2f}x"
        self.say("throughput, 8 clients, against the direct loop", shown, ">= 0.85x", ratio >= 0.85)

    def beside_an_encoding(self, port: int) -> None:
        """p95 of clicks while another client encodes without pause, against idle."""
        asker, encoder = Asker(port), Asker(port)
        image_id = asker.upload(self.new_image())
        click = lambda: seconds_of(lambda: asker.click(image_id, 100, 90))  # noqa: E731
        idle, busy = [], []
        for _ in range(self.rounds):
            idle += [click() for _ in range(2 * self.clicks)]
            with meanwhile(lambda: encoder.upload(self.new_image())):
                busy += [click() for _ in range(2 * self.clicks)]
        ratio = p95(busy) / p95(idle)
        shown = f"{1000 * p95(idle):.0f} -> {1000 * p95(busy):.0f} ms, {ratio:.1f}x"
        self.say("p95 of clicks beside an encoding client", shown, "<= 3x", ratio <= 3)

    def many_images(self, port: int) -> None:
        """Eight clients on eight images against eight on one."""
        askers = [Asker(port) for _ in range(8)]
        ids = [asker.upload(self.new_image()) for asker in askers]
        ratios = []
        for _ in range(self.rounds):
            one, own = (
                sum(
                    together(
                        8,
                        lambda n, w=which: [
                            askers[n].click(w[n], 100, 90) for _ in range(self.clicks)
                        ],
                    )
                )
                for which in ([ids[0]] * 8, ids)
            )
            ratios.append(own / one)
        ratio = statistics.median(ratios)
        must, holds = ("<= 1.1x", ratio <= 1.1) if self.name == "5m" else ("", None)
        self.say("8 clients on 8 images against 8 on one", f"{ratio:.2f}x a click", must, holds)

    def hundred(self, port: int) -> None:
        """A hundred clients, an image and five clicks each."""
        askers = [Asker(port) for _ in range(100)]
        images = [self.new_image() for _ in askers]

        def work(number: int) -> None:
            image_id = askers[number].upload(images[number])
            for _ in range(5):
                askers[number].click(image_id, 100, 90)

        spent = together(100, work)
        refused = sum(asker.refused for asker in askers) / 600
        statuses = set.union(*(asker.statuses for asker in askers))
        fair = max(spent) / statistics.median(spent)
        shown = f"all answered in {max(spent):.0f} s, {refused:.2f} refusals an answer, slowest "
        shown += f"{fair:.1f}x the median, statuses {sorted(statuses)}"
        holds = refused <= 3 and fair <= 2 and not {s for s in statuses if s >= 500} - {503}
        must = "<= 3 refusals, slowest <= 2x, no 5xx but 503"
        self.say("100 clients, an image and 5 clicks each", shown, must, holds)

    def busy(self, port: int) -> None:
        """``/healthz`` while three clients encode and click."""
        stop = threading.Event()

        def work(number: int) -> None:
            asker = Asker(port)
            while not stop.is_set():
                asker.click(asker.upload(self.new_image()), 100, 90)

        load = threading.Thread(target=together, args=(3, work))
        load.start()
        spent = health(port, 60 if self.quick else 500)
        stop.set()
        load.join()
        shown = f"p95 {p95(spent):.0f} ms, most {max(spent):.0f} ms"
        holds = p95(spent) <= 50 and max(spent) < 1000
        self.say("/healthz while three clients encode", shown, "p95 <= 50 ms, < 1 s", holds)

    def hang_up(self, port: int, server: Any) -> None:
        """Five hundred clients, each with an address of its own, that do not wait for answers."""
        asker = Asker(port)
        image_id = asker.upload(self.new_image())
        body = json.dumps({"prompts": [{"points": [[100, 90]]}]}).encode()
        head = f"POST /v1/images/{image_id}/segment HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        job = max(seconds_of(lambda: asker.click(image_id, 100, 90)) for _ in range(10))
        look = max(seconds_of(lambda: asker("GET", "/metrics")) for _ in range(10))
        before = requests_of(asker)
        for number in range(500):
            address = f"X-Forwarded-For: 10.9.{number // 250}.{number % 250}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port)) as own:
                own.sendall((head + address).encode() + body)
        name, count = 'tinyvit_lane_waiting{lane="decode"} 0.0', 0.0
        while count < 500:  # until the server has looked at all of them
            count = requests_of(asker) - before
        start = time.perf_counter()
        while name not in asker("GET", "/metrics").decode():
            pass
        seconds = time.perf_counter() - start
        server.log.seek(0)
        longest = max(map(len, server.log.read().decode().splitlines()))
        shown = f"the lane is empty after {1000 * seconds:.0f} ms (a job {1000 * job:.0f}, a look "
        shown += f"{1000 * look:.0f}), longest line of the log {longest}"
        holds = seconds <= job + 2 * look and longest <= 300
        self.say("500 clients hang up", shown, "one job and a look, <= 300", holds)

    def cut_off(self, port: int) -> None:
        """Thirty-two clients; three of ten requests are cut off, nobody waits as long as told."""
        statuses: set[int] = set()
        until = time.monotonic() + (3 if self.quick else 20)

        def work(number: int) -> None:
            rng, asker = np.random.default_rng(number), Asker(port, patient=False)
            while time.monotonic() < until:
                if rng.random() < 0.3:
                    with socket.create_connection(("127.0.0.1", port)) as own:
                        data = self.new_image()
                        head = "POST /v1/images HTTP/1.1\r\nHost: localhost\r\n"
                        head += f"X-Forwarded-For: 10.8.0.{number}\r\n"
                        head += f"Content-Length: {len(data)}\r\n\r\n"
                        own.sendall(head.encode() + data[: rng.integers(1, len(data))])
                        time.sleep(rng.uniform(0, 0.1))
                else:
                    asker.click(asker.upload(self.new_image()), 100, 90)
            statuses.update(asker.statuses)

        together(32, work)
        shown = f"statuses {sorted(statuses)}; the next click is answered"
        Asker(port).click(Asker(port).upload(self.new_image()), 100, 90)
        holds = not {status for status in statuses if status >= 500} - {503}
        self.say("32 clients, 30 % cut off, none waits as told", shown, "no 5xx but 503", holds)

    def memory(self, port: int, server: Any) -> None:
        """More requests: the process must not grow."""
        count = 500 if self.quick else 10_000
        askers = [Asker(port) for _ in range(4)]
        image_id = askers[0].upload(self.new_image())
        for _ in range(50):
            askers[0].click(image_id, 100, 90)
        before = resident(server)
        limit = time.monotonic() + (20 if self.quick else 240 if self.name == "starter" else 60)
        done = [0] * 4

        def work(number: int) -> None:
            while done[number] < count // 4 and time.monotonic() < limit:
                askers[number].click(image_id, 100, 90)
                done[number] += 1

        together(4, work)
        grown = resident(server) - before
        shown = f"{before:.0f} MB, {grown:+.0f} MB after {sum(done)} requests more"
        self.say("memory after many requests", shown, "<= +30 MB", grown <= 30)

    def page(self, port: int) -> None:
        """From the pointer's release to the mask on the screen, over the server's own time."""
        chromium = shutil.which("chromium")
        if chromium is None:
            self.say("page", "not measured: no Chromium")
            return
        from playwright.sync_api import sync_playwright

        with sync_playwright() as own:
            browser = own.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1450, "height": 900})
            page.goto(f"http://127.0.0.1:{port}/")
            page.set_input_files("#file", IMAGES[0])
            page.wait_for_selector("body[data-state=ready]")
            page.on("dialog", lambda dialog: dialog.accept())  # leave what is not saved
            page.locator("#preview").uncheck()
            over = page.evaluate(PAGE, self.clicks)
            ratios = [self.large(page, number) for number in range(2 if self.quick else 3)]
            browser.close()
        added, ratio = statistics.median(over), statistics.median(ratios)
        what = "page: pointer up to mask drawn, over the server's time"
        self.say(what, f"{added:.0f} ms", "<= 25 ms", added <= 25)
        what = (
            "page: a 30 MP image, file given to mask drawn, over the server's reading and encoding"
        )
        self.say(what, f"{ratio:.1f}x", "< 3x", ratio < 3)

    def large(self, page: Any, number: int) -> float:
        """How long until a click on a large image is drawn, over the time of encoding it."""
        rows, columns = np.mgrid[:5000, :6000]
        pixels = np.stack([columns + number, rows, columns + rows], -1).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=60)
        file = {"name": f"{number}.jpg", "mimeType": "image/jpeg", "buffer": stream.getvalue()}
        with page.expect_response("**/v1/images") as answered:
            start = time.perf_counter()
            page.set_input_files("#file", file)
        timing = answered.value.json()["timing"]
        page.wait_for_selector("body[data-state=ready]")
        page.evaluate(PAGE, 1)
        seconds = time.perf_counter() - start - 0.5  # which PAGE rests after a click
        return 1000 * seconds / (timing["read_ms"] + timing["encode_ms"])


PAGE = """async (count) => {
  const canvas = document.getElementById('canvas'), box = canvas.getBoundingClientRect(), over = [];
  for (let i = 0; i < count; i++) {
    const x = box.left + box.width * (0.3 + 0.4 * Math.random());
    const y = box.top + box.height * (0.3 + 0.4 * Math.random());
    tinyvit.history.apply('begin');
    const where = { clientX: x, clientY: y, pointerId: 1, bubbles: true };
    const at = (kind) => new PointerEvent(kind, where);
    canvas.dispatchEvent(at('pointerdown'));
    const start = performance.now();
    const { history, asker } = tinyvit;
    const own = () => history.state.objects.find((o) => o.id === history.state.current);
    await new Promise((done) => { // until the frame after the first drawing that has the mask
      const watch = new MutationObserver(() => {
        if (!own() || !asker.isFresh(own())) return;
        watch.disconnect();
        setTimeout(done, 0);
      });
      watch.observe(document.body, { attributeFilter: ['data-drawn'] });
      canvas.dispatchEvent(at('pointerup'));
    });
    const { wait_ms: wait, decode_ms: decode } = asker.answers.get(own().id).times;
    over.push(performance.now() - start - wait - decode);
    await new Promise((done) => setTimeout(done, 500));
  }
  return over;
}"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds; does everything run?")
    parser.add_argument("--weights", action="append", choices=("starter", "5m"))
    parser.add_argument("--osam", help="python of an environment with osam[serve]==0.8.1")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as the lane that decodes
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.weights or ("starter", "5m"):
            weights = None
            if name == "5m":
                write_weights(Path(folder), "5m", [str(path) for path in IMAGES])
                weights = str(Path(folder) / "sam.safetensors")
            Bench(name, weights, options.osam, options.quick, report).run(Path(folder))
    options.output.mkdir(parents=True, exist_ok=True)
    facts = machine_facts("fastapi", "uvicorn")
    load = os.getloadavg()[0]
    (options.output / "serve.json").write_text(
        json.dumps({"machine": facts, "load": load, "rows": report.rows}, indent=1) + "\n"
    )
    words = "".join(f" --weights {one}" for one in options.weights or ())
    words += " --osam PYTHON" * (options.osam is not None) + " --quick" * options.quick
    lines = [
        "# tinyvit serve",
        "",
        "Written by `benchmarks/serve.py`: the server, a direct loop over `Segmenter`, a bare",
        "FastAPI handler and osam's server in turn, on the same cores as their clients.",
        "*starter* are the embedded weights (256 px), *5m* is MobileSAM's network at 1024 px (a",
        "random encoder: its speed counts, see `sam_weights.py`).",
        "",
        "osam's server (0.8.1) fetches its own models from the network at the first request;",
        "here it has the same weights, by `tinyvit export --for osam` (a graph of 1024 px).",
        "Like the bare handler it gets the image with every click, and computes in its event",
        "loop. Its answer holds the embedding as lists of numbers; sent back instead of the",
        "image, that is slower still.",
        "",
        "The bounds that are ratios were set for a click and a start by torch. HTTP's one or two",
        "milliseconds and the half second in which FastAPI loads are what they were; beside the",
        "native library, whose click and start take a third of torch's, they are a larger part.",
        "The page is drawn without a GPU, by a headless Chromium on the cores that serve.",
        "",
        f"    python benchmarks/serve.py{words}",
        "",
        f"- {', '.join(f'{key} {value}' for key, value in facts.items())}",
        f"- load at the end {load:.1f}",
        "",
        "| what | measured | must | holds |",
        "|---|---|---|---|",
    ]
    for row in report.rows:
        holds = {None: "", True: "yes", False: "**no**"}[row["holds"]]
        lines.append(f"| {row['what']} | {row['measured']} | {row['must']} | {holds} |")
    (options.output / "serve.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
