"""What runs in a worker: a TinyViT by an engine, or a matrix product that stands for the machine.

Nothing here is timed; see ``workers.py``. Work is counted as useful multiply-accumulates, two
operations each: padding that a window needs is no work.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from tinyvit.catalog import get_checkpoint, get_variant, list_checkpoints

if TYPE_CHECKING:
    from torch import Tensor

    from tinyvit.modules import TinyViT

__all__ = ["count_gflop", "fill_randomly", "make"]


def make(spec: Mapping[str, object]) -> tuple[Callable[[], Tensor], dict[str, object]]:
    """From a spec to a call and facts about it.

    Args:
        spec: {"matmul": side, "precision", "device", "threads"}, or the fields of a ``Contestant``.

    Returns:
        (call, facts: precision, device, threads and, for a TinyViT, chose, backend, size,
        gflop, invented_s).
    """
    _limit_threads(cast("int | None", spec["threads"]))
    if "matmul" in spec:
        return _make_matmul(cast(Any, spec["matmul"]), str(spec["precision"]), str(spec["device"]))
    return _make_tiny_vit(spec)


def fill_randomly(model: TinyViT, seed: int = 0) -> None:
    """Make every tensor of a model random, its batch statistics too; nothing is at a neutral start.

    Args:
        model: Changed in place; stays finite and of order one.
        seed: Of torch's generator.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif name.endswith(("running_mean", "bias")):
            noise = 0.2 * noise
        elif tensor.ndim == 1:  # weight of a norm
            noise = 1 + 0.2 * noise
        elif not name.endswith("attention_biases"):
            noise = noise * tensor[0].numel() ** -0.5
        tensor.copy_(noise)


def count_gflop(model: TinyViT, size: tuple[int, int], name: str | None = None) -> float:
    """Useful operations for one picture, in 1e9.

    Args:
        model: The model.
        size: Height and width of the picture.
        name: Its variant, whose count is scaled by the pixels; None counts the model's own.
    """
    if name is not None:
        row = get_variant(name)
        return 2 * row.gmacs * size[0] * size[1] / row.img_size**2
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(1, model.in_chans, *size, device="meta"))
    return float(counter.get_total_flops()) / 1e9


def _make_tiny_vit(spec: Mapping[str, object]) -> tuple[Callable[[], Tensor], dict[str, object]]:
    import torch

    from tinyvit.factory import create_model
    from tinyvit.inference.engine import Engine

    model_name, checkpoint = cast("tuple[Any, Any]", (spec["model"], spec["checkpoint"]))
    model = create_model(model_name, checkpoint, img_size=cast(Any, spec["size"]))
    start = time.perf_counter()
    if checkpoint is None:
        fill_randomly(model)
    elif checkpoint in list_checkpoints() and model_name is None:
        model_name = get_checkpoint(checkpoint).variant
    size = _size_of(model)
    gflop = count_gflop(model, size, model_name)
    batch = torch.randn(int(cast(Any, spec["batch"])), model.in_chans, *size)
    invented = time.perf_counter() - start
    engine = Engine(
        model,
        backend=cast(Any, spec["backend"]),
        precision=str(spec["precision"]),
        device=str(spec["device"]),
        threads=None if spec["backend"] in ("auto", "torch") else cast(Any, spec["threads"]),
    )
    facts = {
        "chose": engine.explain(),
        "backend": engine.backend.name,
        "precision": str(getattr(engine.backend, "precision", spec["precision"])),
        "device": engine.backend.device,
        "size": size,
        "threads": torch.get_num_threads(),
        "gflop": gflop,
        "invented_s": invented,
    }
    return lambda: engine.backend(batch), facts


def _size_of(model: TinyViT) -> tuple[int, int]:
    """Height and width of the pictures that the model is given."""
    if model.image_spec is not None:
        return model.image_spec.size
    raise ValueError("this model does not say how its pictures are prepared; give --size")


def _make_matmul(
    side: int, precision: str, device: str
) -> tuple[Callable[[], Tensor], dict[str, object]]:
    """The quicker of two ways to a product of square matrices: torch's own and a 1x1 convolution.

    They go by different libraries on a CPU, and which one is better depends on the precision.
    """
    import torch

    from tinyvit.inference.backend import DTYPES

    place = device if device.startswith("cuda") else "cpu"
    dtype = DTYPES[precision]
    a, b = (torch.randn(side, side, device=place).to(dtype) for _ in range(2))
    # [side, side] as [1, side, side, 1], channels-last: the same product
    image = a.reshape(1, side, 1, side).permute(0, 3, 1, 2)
    kernel = b[:, :, None, None].contiguous(memory_format=torch.channels_last)

    def finish(call: Callable[[], Tensor]) -> Tensor:
        product = call()
        if place != "cpu":
            torch.cuda.synchronize()
        return product

    ways = (lambda: a @ b, lambda: torch.nn.functional.conv2d(image, kernel))
    with torch.inference_mode():
        seconds = []
        for way in ways:
            finish(way)
            start = time.perf_counter()
            finish(way)
            finish(way)
            seconds.append(time.perf_counter() - start)
    quicker = ways[seconds.index(min(seconds))]

    def call() -> Tensor:
        with torch.inference_mode():
            return finish(quicker)

    return call, {"precision": precision, "device": device, "threads": torch.get_num_threads()}


def _limit_threads(threads: int | None) -> None:
    """Let torch compute with so many threads; other backends are told by the engine.

    Raises:
        ValueError: Less than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)
