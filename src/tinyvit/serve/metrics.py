"""Counters and histograms of a server, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from .cache import Cache
from .lanes import Job, Lane
from .schema import Model

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


class Metrics:
    """The numbers of one server.

    Args:
        cache: Read when the numbers are asked for.
    """

    def __init__(self, cache: Cache) -> None:
        own = self.registry = CollectorRegistry()
        ProcessCollector(namespace="tinyvit", registry=own)
        self._requests = Counter(
            "tinyvit_requests", "Requests answered", ["route", "status"], registry=own
        )
        self._seconds = Histogram(
            "tinyvit_request_seconds",
            "Seconds of a request",
            ["route"],
            buckets=SECONDS,
            registry=own,
        )
        self._jobs = Counter(
            "tinyvit_lane_jobs", "Jobs of a lane", ["lane", "outcome"], registry=own
        )
        self._dropped = Gauge(
            "tinyvit_lane_dropped", "Jobs whose client had gone", ["lane"], registry=own
        )
        self._wait = Histogram(
            "tinyvit_lane_wait_seconds",
            "Seconds a job waited",
            ["lane"],
            buckets=SECONDS,
            registry=own,
        )
        self._run = Histogram(
            "tinyvit_lane_run_seconds",
            "Seconds a job ran",
            ["lane"],
            buckets=SECONDS,
            registry=own,
        )
        self.pixels = Histogram(
            "tinyvit_image_pixels",
            "Pixels of an image",
            buckets=[10.0**power for power in range(3, 10)],
            registry=own,
        )
        self._waiting = Gauge("tinyvit_lane_waiting", "Jobs that wait", ["lane"], registry=own)
        size = Gauge("tinyvit_cache_bytes", "Bytes of kept embeddings", registry=own)
        size.set_function(lambda: cache.nbytes)
        count = Gauge("tinyvit_cache_images", "Images with a kept embedding", registry=own)
        count.set_function(lambda: len(cache))
        self._events = Counter("tinyvit_cache", "What the cache did", ["event"], registry=own)
        cache.on_event = lambda event: self._events.labels(event).inc()
        self._model = Gauge(
            "tinyvit_model_info", "The model", ["name", "sha256", "precision"], registry=own
        )

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
