"""Counters and histograms of a server, in a registry of its own."""

from __future__ import annotations

from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from .cache import Cache
from .lanes import Job, Lane
from .schema import Model

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
PIXELS = tuple(10.0**power for power in range(3, 10))
Kind = TypeVar("Kind", Counter, Gauge, Histogram)


class Metrics:
    """The numbers of one server.

    Args:
        cache: Read when the numbers are asked for.
    """

    def __init__(self, cache: Cache) -> None:
        own = self.registry = CollectorRegistry()
        ProcessCollector(namespace="tinyvit", registry=own)

        def new(kind: type[Kind], name: str, words: str, *labels: str, **more: Any) -> Kind:
            return kind(f"tinyvit_{name}", words, labels, registry=own, **more)

        seconds, pixels = {"buckets": SECONDS}, {"buckets": PIXELS}
        self._requests = new(Counter, "requests", "Requests answered", "route", "status")
        self._seconds = new(Histogram, "request_seconds", "Of a request", "route", **seconds)
        self._jobs = new(Counter, "lane_jobs", "Jobs of a lane", "lane", "outcome")
        self._dropped = new(Gauge, "lane_dropped", "Jobs whose client had gone", "lane")
        self._waiting = new(Gauge, "lane_waiting", "Jobs that wait", "lane")
        self._wait = new(Histogram, "lane_wait_seconds", "A job waited", "lane", **seconds)
        self._run = new(Histogram, "lane_run_seconds", "A job ran", "lane", **seconds)
        self._model = new(Gauge, "model_info", "The model", "name", "sha256", "precision")
        self.pixels = new(Histogram, "image_pixels", "Pixels of an image", **pixels)
        new(Gauge, "cache_bytes", "Of kept embeddings").set_function(lambda: cache.nbytes)
        new(Gauge, "cache_images", "Kept embeddings").set_function(lambda: len(cache))
        events = new(Counter, "cache", "What the cache did", "event")
        cache.on_event = lambda event: events.labels(event).inc()

    def watch_lane(self, lane: Lane) -> None:
        """Show how many jobs wait in a lane, and how many clients went before theirs began."""
        queue = lane.queue
        self._waiting.labels(queue.name).set_function(lambda: len(queue))
        self._dropped.labels(queue.name).set_function(lambda: queue.dropped)

    def set_model(self, model: Model) -> None:
        """Name the model."""
        self._model.labels(model.name, model.sha256 or "", model.precision).set(1)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def observe_job(self, lane: str, job: Job, outcome: str) -> None:
        """Count a job; outcomes are done, failed and refused."""
        self._jobs.labels(lane, outcome).inc()
        if outcome != "refused":
            self._run.labels(lane).observe(job.ran)
            self._wait.labels(lane).observe(job.waited)

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)
