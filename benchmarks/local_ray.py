"""Ray on this machine alone, and encoders that take a fixed time for an image, asleep.

With them many actors fit on few cores: what is left to measure is what leading them costs.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tinyvit.embed.actors import load_ray


@contextmanager
def ray_of(cpus: int, begin: Callable[[], None] | None = None) -> Iterator[None]:
    """Ray on this machine, with so many CPUs as it thinks; ``begin`` runs in each process."""
    ray = load_ray()
    more = {} if begin is None else {"runtime_env": {"worker_process_setup_hook": begin}}
    with warnings.catch_warnings():  # Ray's forks become other programs at once
        warnings.filterwarnings("ignore", "lance is not fork-safe")
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, **more
        )
    try:
        yield
    finally:
        ray.shutdown()


def of_fixed_cost(seconds: float, notes: str) -> Callable[[], None]:
    """Makes torch's encoder take so long for an image, asleep; notes when each began."""

    def begin() -> None:
        from tinyvit.inference.torch_backend import TorchBackend

        call = TorchBackend.__call__

        def slow(self: TorchBackend, batch: Any) -> Any:
            start = time.monotonic()
            found = call(self, batch)
            with open(f"{notes}/{os.getpid()}", "a") as file:
                file.write(f"{start}\n")
            time.sleep(max(0.0, start + seconds * len(batch) - time.monotonic()))
            return found

        TorchBackend.__call__ = slow  # type: ignore[method-assign]

    return begin
