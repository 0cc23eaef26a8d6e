"""Measure ``tinyvit serve`` beside a direct loop over ``Segmenter`` and a bare FastAPI handler.

Server, bare handler and loop have the same weights and threads and take turns, so that a busy
machine does not matter; clients run in this process, on the same cores. The bare handler is what
people write: one route, the image in every request, decoding in the event loop, masks as lists.

Every line that has a bound says whether it holds. Writes ``serve.md`` and ``serve.json``.
"""

import argparse
import http.client
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sam_weights import write_weights

from tinyvit import Segmenter
from tinyvit.bench import machine_facts

HERE = Path(__file__).parent
IMAGES = [
    HERE.parent / "examples" / "pictures" / name
    for name in ("chelsea.png", "coffee.png", "rocket.jpg")
]
JSON = {"Content-Type": "application/json"}
BARE = """
import base64, io, sys
import numpy as np, uvicorn
from fastapi import FastAPI
from PIL import Image
from tinyvit import Segmenter
segmenter = Segmenter(sys.argv[2] or None)
app = FastAPI()
@app.get("/healthz")
async def health(): return "ok"
@app.post("/predict")
async def predict(body: dict):
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["image"]))).convert("RGB"))
    for masks in segmenter.segment([image], [[{"points": body["points"]}]]):
        return {"mask": masks.mask(0).tolist(), "score": float(masks.scores[0].max())}
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""
BASELINE = """
import sys, time
import numpy as np
from tinyvit import Segmenter
image = np.full((64, 64, 3), 128, np.uint8)
for masks in Segmenter(sys.argv[1] or None).segment([image], [[{"points": [[32, 32]]}]]):
    masks.mask(0)
"""


class Asker:
    """One client with a connection and an address of its own."""

    count = 0

    def __init__(self, port: int) -> None:
        Asker.count += 1
        self.address = {"X-Forwarded-For": f"10.0.{Asker.count // 250}.{Asker.count % 250}"}
        self.refused, self.statuses = 0, set()
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """The answer's body; waits as long as a refusal says."""
        while True:
            self.connection.request(method, path, body, headers | self.address)
            answer = self.connection.getresponse()
            found = answer.read()
            self.statuses.add(answer.status)
            if answer.status not in (429, 503):
                if answer.status >= 400:
                    raise RuntimeError(found.decode())
                return found
            self.refused += 1
            time.sleep(int(answer.headers["Retry-After"]) * np.random.uniform(0.8, 1.2))

    def upload(self, data: bytes) -> str:
        """The id of an image that is sent."""
        return str(
            json.loads(self("POST", "/v1/images", data, **{"Content-Type": "image/png"}))["id"]
        )

    def click(self, image_id: str, x: float, y: float) -> bytes:
        """A click, answered by low-res logits."""
        asked = {"prompts": [{"points": [[x, y]]}], "include": ["low_res"]}
        return self("POST", f"/v1/images/{image_id}/segment", json.dumps(asked), **JSON)


@contextmanager
def process(argv: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server, ready."""
    with tempfile.TemporaryFile() as log:
        own = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=log)
        own.log = log  # type: ignore[attr-defined]
        try:
            while True:
                with suppress(OSError):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                    connection.request("GET", "/readyz" if "serve" in argv else "/healthz")
                    if connection.getresponse().status == 200:
                        break
                if own.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode()[-2000:])
                time.sleep(0.02)
            yield own
        finally:
            own.send_signal(signal.SIGTERM)
            own.wait(30)


def free_port() -> int:
    """A port nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as own:
        return int(own.getsockname()[1])


def resident(own: subprocess.Popen[bytes]) -> float:
    """MB of a process."""
    pages = int(Path(f"/proc/{own.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def requests_of(asker: Asker) -> float:
    """How many requests a server has answered."""
    rows = asker("GET", "/metrics").decode().splitlines()
    counts = [row for row in rows if row.startswith("tinyvit_requests_total{")]
    return sum(float(row.split()[-1]) for row in counts)


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def together(count: int, work: Callable[[int], Any]) -> list[float]:
    """Seconds of each of so many threads."""
    spent = [0.0] * count

    def run(number: int) -> None:
        spent[number] = seconds_of(lambda: work(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return spent


@contextmanager
def meanwhile(work: Callable[[], Any]) -> Iterator[None]:
    """Does something again and again."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def image_of(seed: int, size: tuple[int, int] = (300, 450)) -> bytes:
    """A PNG of an image that no other seed gives."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (12, 18, 3), np.uint8))
    stream = io.BytesIO()
    small.resize(size[::-1], Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def p95(numbers: Sequence[float]) -> float:
    """The 95th percentile."""
    return float(np.percentile(numbers, 95))


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

    def __init__(self, name: str, weights: str | None, quick: bool, report: Report) -> None:
        self.name, self.weights, self.quick, self.report = name, weights, quick, report
        self.segmenter = Segmenter(weights)
        self.rounds, self.clicks = (2, 8) if quick else (5, 30)
        self.seed = 0

    def say(self, what: str, measured: str, must: str = "", holds: bool | None = None) -> None:
        """A line of this kind of weights."""
        self.report.add(f"{self.name}: {what}", measured, must, holds)

    def new_image(self) -> bytes:
        """One that the server has not seen."""
        self.seed += 1
        return image_of(self.seed)

    def run(self) -> None:
        """Everything."""
        port, bare_port = free_port(), free_port()
        serve = [sys.executable, "-m", "tinyvit", "serve", "--port", str(port), "--log", "text"]
        serve += ["--trust-proxy", "127.0.0.1"]
        if self.weights:
            serve += ["--checkpoint", self.weights]
        bare = [sys.executable, "-c", BARE, str(bare_port), self.weights or ""]
        self.start(serve, port)
        with process(serve, port) as server, process(bare, bare_port) as other:
            self.rest = resident(server)
            self.one_client(port)
            self.throughput(port)
            self.beside_an_encoding(port, bare_port)
            self.many_images(port)
            self.bare(bare_port, port, other, server)
            self.hundred(port)
            self.busy(port)
            self.hang_up(port, server)
            self.memory(port, server)
            if self.name == "starter":
                self.page(port)

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

    def beside_an_encoding(self, port: int, bare_port: int) -> None:
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

    def bare(self, bare_port: int, port: int, other: Any, server: Any) -> None:
        """The common way, for comparison."""
        import base64

        asker, data = Asker(bare_port), self.new_image()
        asked = json.dumps({"image": base64.b64encode(data).decode(), "points": [[100, 90]]})
        ask = lambda: asker("POST", "/predict", asked, **JSON)  # noqa: E731
        count = max(2, self.clicks // 4)
        spent = [seconds_of(ask) for _ in range(count)]
        second = Asker(bare_port)
        with meanwhile(lambda: second("POST", "/predict", asked, **JSON)):
            beside = [seconds_of(ask) for _ in range(count)]
        own = Asker(port)
        image_id = own.upload(data)
        mine = [seconds_of(lambda: own.click(image_id, 100, 90)) for _ in range(self.clicks)]
        sizes = f"{len(asked) / 1e3:.0f} + {len(ask()) / 1e3:.0f} kB"
        self.say(
            "bare FastAPI handler",
            f"{1 / statistics.median(spent):.1f} clicks/s, p95 {1000 * p95(beside):.0f} ms beside "
            f"another client, {sizes} a click, {resident(other):.0f} MB",
        )
        size = f"0.1 + {len(own.click(image_id, 100, 90)) / 1e3:.0f} kB"
        shown = (
            f"{1 / statistics.median(mine):.1f} clicks/s, {size} a click, {resident(server):.0f} MB"
        )
        self.say("tinyvit serve", shown)

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
        askers = [Asker(port) for _ in range(3)]

        def load() -> None:
            def work(number: int) -> None:
                image_id = askers[number].upload(self.new_image())
                askers[number].click(image_id, 100, 90)

            together(3, work)

        spent, asker = [], Asker(port)
        with meanwhile(load):
            for _ in range(40 if self.quick else 300):
                spent.append(1000 * seconds_of(lambda: asker("GET", "/healthz")))
                time.sleep(0.01)
        shown = f"p95 {p95(spent):.0f} ms, most {max(spent):.0f} ms"
        holds = p95(spent) <= 50 and max(spent) < 1000
        self.say("/healthz while three clients encode", shown, "p95 <= 50 ms, < 1 s", holds)

    def hang_up(self, port: int, server: Any) -> None:
        """Five hundred clients that do not wait for their answers."""
        image_id = Asker(port).upload(self.new_image())
        body = json.dumps({"prompts": [{"points": [[100, 90]]}]}).encode()
        head = f"POST /v1/images/{image_id}/segment HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        before = requests_of(Asker(port))
        for _ in range(500):
            with socket.create_connection(("127.0.0.1", port)) as own:
                own.sendall(head.encode() + body)
        asker, name, seen = Asker(port), 'tinyvit_lane_waiting{lane="decode"} 0.0', 0.0
        while seen < 500:  # until the server has looked at all of them
            seen = requests_of(asker) - before
            start = time.perf_counter()
        while name not in asker("GET", "/metrics").decode():
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        server.log.seek(0)
        longest = max(map(len, server.log.read().decode().splitlines()))
        shown = (
            f"the lane is empty after {1000 * seconds:.0f} ms, longest line of the log {longest}"
        )
        must = "within one job, <= 300"
        self.say("500 clients hang up", shown, must, seconds < 0.3 and longest <= 300)

    def memory(self, port: int, server: Any) -> None:
        """More requests: the process must not grow."""
        count = 500 if self.quick else 10_000
        asker = Asker(port)
        image_id = asker.upload(self.new_image())
        for _ in range(50):
            asker.click(image_id, 100, 90)
        before = resident(server)
        askers = [Asker(port) for _ in range(4)]
        limit = time.monotonic() + (20 if self.quick else 150)

        def work(number: int) -> int:
            for done in range(count // 4):
                if time.monotonic() > limit:
                    return done
                askers[number].click(image_id, 100, 90)
            return count // 4

        done = [0] * 4

        def note(number: int) -> None:
            done[number] = work(number)

        together(4, note)
        grown = resident(server) - before
        shown = f"{self.rest:.0f} MB at rest, {before:.0f} after the above, {grown:+.0f} MB after "
        shown += f"{sum(done)} requests more"
        must = "<= +30 MB, and the bound of docs/serving.md"
        self.say("memory", shown, must, grown <= 30 and before <= self.rest + 512 + 1600)

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
            page.wait_for_timeout(1500)
            page.locator("#preview").uncheck()
            over = page.evaluate(PAGE, self.clicks)
            browser.close()
        added = statistics.median(over)
        self.say(
            "page: pointer up to mask drawn, over the server's time",
            f"{added:.0f} ms",
            "<= 25 ms",
            added <= 25,
        )


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
    canvas.dispatchEvent(at('pointerup'));
    const { history, asker } = tinyvit;
    const own = () => history.state.objects.find((o) => o.id === history.state.current);
    const after = (ms) => new Promise((done) => setTimeout(done, ms));
    while (!own() || !asker.isFresh(own())) await after(1);
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
    const { wait_ms: wait, decode_ms: decode } = asker.answers.get(own().id).times;
    over.push(performance.now() - start - wait - decode);
    await after(500);
  }
  return over;
}"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds; does everything run?")
    parser.add_argument("--weights", action="append", choices=("starter", "5m"))
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
            Bench(name, weights, options.quick, report).run()
    facts = machine_facts("fastapi", "uvicorn")
    load = os.getloadavg()[0]
    (options.output / "serve.json").write_text(
        json.dumps({"machine": facts, "load": load, "rows": report.rows}, indent=1) + "\n"
    )
    words = " ".join(f"--weights {one}" for one in options.weights or ())
    lines = [
        "# tinyvit serve",
        "",
        "Written by `benchmarks/serve.py`: the server, a direct loop over `Segmenter` and a bare",
        "FastAPI handler in turn, on the same cores as their clients. *starter* are the embedded",
        "weights (256 px), *5m* is MobileSAM's network at 1024 px (a random encoder: its speed",
        "counts, see `sam_weights.py`).",
        "",
        "osam's HTTP server (0.8.1) installs, but fetches each of its models from the network at",
        "the first request; without one it answers nothing that could be timed.",
        "",
        f"    python benchmarks/serve.py {'--quick ' if options.quick else ''}{words}".rstrip(),
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
