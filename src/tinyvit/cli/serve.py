"""``tinyvit serve``: options -> ``ServeSettings``; opens a browser where that is asked for."""

from __future__ import annotations

import json
import logging
import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import OptionInfo

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli import console

from .arguments import Device, NoPad, Precision, checkpoint_option

if TYPE_CHECKING:
    from tinyvit.serve import ServeSettings

EXAMPLES = (
    "tinyvit serve --open",
    "tinyvit serve --checkpoint mobile_sam --port 9000",
    "tinyvit serve --host 0.0.0.0 --token-file token.txt --allow-host images.example.org",
    "tinyvit serve --adapter label-studio --label-studio-url http://127.0.0.1:8080",
)


def _option(flag: str, text: str, **more: Any) -> OptionInfo:
    option: OptionInfo = typer.Option(flag, help=text, **more)
    return option


Checkpoint = Annotated[
    str | None,
    checkpoint_option(
        "A name of 'tinyvit models', or a file that holds a whole SAM. By default "
        f"{DEFAULT_CHECKPOINT}, which is small, weak, and needs no download."
    ),
]
Engine = Annotated[str, _option("--backend", "What runs the encoder: auto, torch, openvino, onnx.")]
Host = Annotated[str, _option("--host", "Address to listen on.")]
Port = Annotated[int, _option("--port", "Port; 0 takes a free one.", min=0, max=65_535)]
Open = Annotated[bool, _option("--open", "Open the page in a browser.")]
TokenFile = Annotated[
    Path | None, _option("--token-file", "File with the token that clients must show.")
]
NoToken = Annotated[bool, _option("--no-token", "Ask for no token, on any address.")]
AllowHost = Annotated[
    list[str] | None, _option("--allow-host", "Further name accepted in Host; may be repeated.")
]
AllowOrigin = Annotated[
    list[str] | None, _option("--allow-origin", "Page elsewhere that may call; may be repeated.")
]
ProxyPrefix = Annotated[str, _option("--proxy-prefix", "Path under which a proxy publishes it.")]
TrustProxy = Annotated[
    str | None, _option("--trust-proxy", "Proxy whose X-Forwarded-For names the client.")
]
Threads = Annotated[
    int | None, _option("--threads", "For encoding; decoding takes half of them.", min=1)
]
CacheMb = Annotated[int, _option("--cache-mb", "MB of embeddings kept in memory.", min=1)]
Keep = Annotated[Path | None, _option("--keep", "Folder in which embeddings are kept, too.")]
MaxImageMb = Annotated[int, _option("--max-image-mb", "MB of one upload, at most.", min=1)]
MaxPixels = Annotated[int, _option("--max-pixels", "Pixels of one image, at most.", min=1)]
MaxWait = Annotated[
    float, _option("--max-wait", "Seconds; what would wait longer is refused at once.")
]
Adapters = Annotated[
    list[str] | None, _option("--adapter", "label-studio or x-anylabeling; may be repeated.")
]
LabelStudio = Annotated[
    str | None, _option("--label-studio-url", "The one address from which images are fetched.")
]
NoPage = Annotated[bool, _option("--no-page", "Leave the page out.")]
NoMetrics = Annotated[bool, _option("--no-metrics", "Leave /metrics out.")]
Log = Annotated[str | None, _option("--log", "text or json; text on a terminal, else json.")]
LogClients = Annotated[
    bool, _option("--log-clients/--no-log-clients", "Write addresses of clients into the log.")
]
ReadyJson = Annotated[bool, _option("--json", "Print the ready line as JSON.")]


def serve(
    ctx: typer.Context,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    backend: Engine = "auto",
    no_pad: NoPad = False,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    open_page: Open = False,
    token_file: TokenFile = None,
    no_token: NoToken = False,
    allow_hosts: AllowHost = None,
    allow_origins: AllowOrigin = None,
    proxy_prefix: ProxyPrefix = "",
    trust_proxy: TrustProxy = None,
    threads: Threads = None,
    cache_mb: CacheMb = 512,
    keep: Keep = None,
    max_image_mb: MaxImageMb = 32,
    max_pixels: MaxPixels = 50_000_000,
    max_wait: MaxWait = 20.0,
    adapters: Adapters = None,
    label_studio_url: LabelStudio = None,
    no_page: NoPage = False,
    no_metrics: NoMetrics = False,
    log: Log = None,
    log_clients: LogClients = True,
    as_json: ReadyJson = False,
) -> None:
    """Serve an HTTP API, and a page that segments by clicks.

    Nothing leaves the machine: images stay in memory, and no address is asked. On an address that
    others reach clients must show a token: that of --token-file or TINYVIT_TOKEN, or a new one,
    which the ready line shows. The line on stdout says when the model is ready; the log goes to
    stderr.
    """
    from tinyvit.serve.server import run

    own = console.of(ctx)
    settings = _settings(ctx.params)
    _log_to_stderr()
    if no_token and not settings.is_loopback:
        own.say("warning: no token is asked for on an address that others can reach")

    def ready(url: str, final: ServeSettings) -> None:
        if as_json:
            facts = {"url": url.partition("#")[0], "token": final.token, "pid": os.getpid()}
            console.write(json.dumps(facts))
        else:
            count = counted_threads(threads)
            facts_ = f"{count}, {precision}, {cache_mb} MB of embeddings"
            console.write(f"serving {checkpoint or DEFAULT_CHECKPOINT} on {url} ({facts_})")
        sys.stdout.flush()
        if open_page:
            webbrowser.open(url)

    run(settings, ready)


def counted_threads(threads: int | None) -> str:
    """``2 threads``."""
    return console.counted(threads or os.cpu_count() or 1, "thread")


def _settings(given: dict[str, Any]) -> ServeSettings:
    """The options as settings; what does not go together is wrong usage."""
    from tinyvit.serve import ServeSettings

    values = dict(given)
    for name in ("open_page", "as_json"):
        del values[name]
    for name in ("pad", "page", "metrics"):
        values[name] = not values.pop(f"no_{name}")
    for name in ("allow_hosts", "allow_origins", "adapters"):
        values[name] = tuple(values[name] or ())
    file = values.pop("token_file")
    token = os.environ.get("TINYVIT_TOKEN")
    values["token"] = file.read_text(encoding="utf-8").strip() if file is not None else token
    values["log"] = values["log"] or ("text" if sys.stderr.isatty() else "json")
    try:
        return ServeSettings(**values)
    except ValueError as err:
        raise typer.BadParameter(str(err)) from err


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("tinyvit.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "tinyvit.serve" else logging.WARNING)
