"""``tinyvit serve``: options -> ``ServeSettings``; opens a browser where that is asked for."""

from __future__ import annotations

import json
import logging
import os
import sys
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli import console
from tinyvit.serve.settings import ServeSettings

from .console import Console


def serve(
    own: Console,
    settings: ServeSettings,
    *,
    open_page: bool = False,
    token_file: Path | None = None,
    log_format: str | None = None,
    as_json: bool = False,
) -> None:
    """Serve an HTTP API, and a page that segments by clicks.

    Nothing leaves the machine: images stay in memory, and no address is asked. On an address that
    others reach clients must show a token: that of --token-file or TINYVIT_TOKEN, or a new one,
    which the ready line shows. The line on stdout says when the model is ready; the log goes to
    stderr.

    Options:
        backend: What runs the encoder: auto, native, torch, onnx, openvino.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        open_page (--open): Open the page in a browser.
        token_file: File with the token that clients must show.
        no_token: Ask for no token, on any address.
        allow_hosts (--allow-host): Further name accepted in Host; may be repeated.
        allow_origins (--allow-origin): Page elsewhere that may call; may be repeated.
        proxy_prefix: Path under which a proxy publishes it.
        trust_proxy: Proxy whose X-Forwarded-For names the client.
        threads: For encoding; decoding takes half of them.
        cache_mb: MB of embeddings kept in memory.
        keep: Folder in which embeddings are kept, too.
        store: Embedding store of 'tinyvit embed', whose images are not encoded again.
        max_image_mb: MB of one upload, at most.
        max_pixels: Pixels of one image, at most.
        max_wait: Seconds; what would wait longer is refused at once.
        adapters (--adapter): label-studio or x-anylabeling; may be repeated.
        label_studio_url: The one address from which images are fetched.
        no_page: Leave the page out.
        no_metrics: Leave /metrics out.
        log_format (--log): text or json; text on a terminal, else json.
        log_clients: Write addresses of clients into the log.
        as_json (--json): Print the ready line as JSON.

    Examples:
        tinyvit serve --open
        tinyvit serve --checkpoint mobile_sam --port 9000
        tinyvit serve --checkpoint mobile_sam --store photos.lance
        tinyvit serve --host 0.0.0.0 --token-file token.txt --allow-host images.example.org
        tinyvit serve --adapter label-studio --label-studio-url http://127.0.0.1:8080
    """
    from tinyvit.serve.server import run

    token = os.environ.get("TINYVIT_TOKEN")
    if token_file is not None:
        token = token_file.read_text(encoding="utf-8").strip()
    log: Any = log_format or ("text" if sys.stderr.isatty() else "json")
    try:
        settings = replace(settings, token=token, log=log)
    except ValueError as err:
        raise typer.BadParameter(str(err)) from err
    _log_to_stderr()
    if settings.no_token and not settings.is_loopback:
        own.say("warning: no token is asked for on an address that others can reach")

    def ready(url: str, final: ServeSettings) -> None:
        if as_json:
            facts = {"url": url.partition("#")[0], "token": final.token, "pid": os.getpid()}
            console.write(json.dumps(facts))
        else:
            threads = console.counted(final.threads or os.cpu_count() or 1, "thread")
            facts_ = f"{threads}, {final.precision}, {final.cache_mb} MB of embeddings"
            checkpoint = final.checkpoint or DEFAULT_CHECKPOINT
            console.write(f"serving {checkpoint} on {url} ({facts_})")
        sys.stdout.flush()
        if open_page:
            webbrowser.open(url)

    run(settings, ready)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("tinyvit.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "tinyvit.serve" else logging.WARNING)
