"""What a server is told at its start: every limit, its default, its range."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ADAPTERS = ("label-studio", "x-anylabeling")

_RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "threads": (1, 1_024),
    "cache_mb": (1, 1_000_000),
    "max_image_mb": (1, 1_024),
    "max_pixels": (1, 1_000_000_000),
    "max_wait": (0.1, 3_600),
    "receive_seconds": (0.1, 3_600),
    "drain_seconds": (0, 3_600),
}


@dataclass(frozen=True)
class ServeSettings:
    """Settings of ``tinyvit serve``.

    Attributes:
        checkpoint: Name, file or folder of the one model; None takes the embedded weights.
        device: A torch device, or "auto".
        precision: "fp32", "bf16" or "auto", of the image encoder.
        backend: As for ``tinyvit.Engine``.
        pad: False spends no work on padding.
        host: Address to listen on.
        port: 0 takes a free one.
        token: What clients must show; None asks for none on a loopback address, and makes one
            on any other.
        no_token: Ask for no token on an address that others reach, too.
        allow_hosts: Further names accepted in ``Host``.
        allow_origins: Pages elsewhere that may call the API (CORS).
        proxy_prefix: The path under which a proxy publishes the server.
        trust_proxy: Address of a proxy whose ``X-Forwarded-For`` names the client.
        threads: For encoding; None takes the number of cores.
        cache_mb: Embeddings kept in memory, with what their prompts share.
        keep: Folder in which embeddings are kept, too.
        store: Where an embedding store is, whose images are not encoded again; it is only read.
        max_image_mb: Of one upload.
        max_pixels: Of one image.
        max_wait: Seconds; what would wait longer is refused at once.
        receive_seconds: Within which a request must have arrived.
        drain_seconds: For what runs when the server is told to end.
        adapters: Foreign protocols to speak, among ``ADAPTERS``.
        label_studio_url: Where Label Studio's images are fetched from, with its adapter.
        page: Offer the page.
        metrics: Offer ``/metrics``.
        log: "text" or "json" lines on stderr.
        log_clients: Write addresses of clients into the log.
    """

    checkpoint: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    backend: str = "auto"
    pad: bool = True
    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = None
    no_token: bool = False
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    proxy_prefix: str = ""
    trust_proxy: str | None = None
    threads: int | None = None
    cache_mb: int = 512
    keep: Path | None = None
    store: str | None = None
    max_image_mb: int = 32
    max_pixels: int = 50_000_000
    max_wait: float = 20.0
    receive_seconds: float = 30.0
    drain_seconds: float = 10.0
    adapters: tuple[str, ...] = ()
    label_studio_url: str | None = None
    page: bool = True
    metrics: bool = True
    log: Literal["text", "json"] = "text"
    log_clients: bool = True

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must be from {least:g} to {most:g}, came {value!r}")
        if "*" in self.allow_origins:
            raise ValueError(
                "allow_origins must name origins such as https://example.org; '*' would let any "
                "page on the web use this server"
            )
        for origin in self.allow_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError(
                    f"an origin is a scheme and a host such as https://example.org; came {origin!r}"
                )
        if self.proxy_prefix and not self.proxy_prefix.startswith("/"):
            raise ValueError(f"proxy_prefix must begin with '/', came {self.proxy_prefix!r}")
        if self.token is not None and (len(self.token) < 16 or not self.token.isascii()):
            raise ValueError("a token must have at least 16 characters, ASCII alone")
        if self.token is not None and self.no_token:
            raise ValueError("give either a token or no_token")
        unknown = sorted(set(self.adapters) - set(ADAPTERS))
        if unknown:
            raise ValueError(f"unknown adapter {unknown[0]!r}; known are {', '.join(ADAPTERS)}")
        if self.log not in ("text", "json"):
            raise ValueError(f"log must be 'text' or 'json', came {self.log!r}")

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:  # a name
            return False

    def with_token(self) -> ServeSettings:
        """The same with a new token where one is needed and none is given."""
        if self.token is not None or self.no_token or self.is_loopback:
            return self
        return replace(self, token=secrets.token_urlsafe(32))
