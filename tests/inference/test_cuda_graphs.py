from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tinyvit.inference import TorchBackend, cuda_graphs, torch_backend
from tinyvit.inference.cuda_graphs import (
    EARNED,
    SHAPES,
    CudaCapture,
    GraphedNetwork,
    Output,
    Run,
)
from tinyvit.modules import TinyViT

MakeModel = Callable[..., TinyViT]
MakeImage = Callable[..., Tensor]

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # folding changes some ulps for each layer


class Tape:
    """Captures like a GPU as far as the caller sees: fixed places for the input and the results."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.replays = 0
        self.error: RuntimeError | None = None

    def __call__(self, run: Run, example: Tensor) -> Run:
        if self.error is not None:
            raise self.error
        self.shapes.append(tuple(example.shape))
        given = example.clone()
        results = [result.clone() for result in run(given)]

        def replay(batch: Tensor) -> Sequence[Tensor]:
            self.replays += 1
            assert batch.shape == given.shape
            assert batch.stride() == given.stride()
            given.copy_(batch)
            for place, result in zip(results, run(given), strict=True):
                place.copy_(result)
            return results

        return replay


class Mean:
    """A network in a few lines; it notes its calls and whether cuDNN may round."""

    def __init__(self) -> None:
        self.rounds: list[bool] = []

    def __call__(
        self, batch: Tensor, output: Output | None = "features", stages: bool = False
    ) -> list[Tensor]:
        maps = [batch + 1, batch + 2] if stages else []
        if output == "logits":
            if batch.shape[1] == 3 and not stages:
                raise ValueError("no head")
            return [batch[:, 0, 0], *maps]
        if output is None:
            return maps
        self.rounds.append(torch.backends.cudnn.allow_tf32)
        return [batch.mean(1, keepdim=True), *maps]


@pytest.fixture
def tape() -> Tape:
    return Tape()


def batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- shapes, graphs and what they give ------------------------------------------------------------


def test_a_shape_that_comes_again_is_replayed(tape: Tape) -> None:
    graphed = GraphedNetwork(Mean(), tape)
    for seed in range(EARNED + 3):
        x = batch(2, 3, 4, 5, seed=seed)
        assert torch.equal(graphed(x)[0], x.mean(1, keepdim=True))
    assert tape.shapes == [(2, 3, 4, 5)]
    assert tape.replays == 4
    graphed(batch(1, 3, 4, 5))[0]
    assert tape.shapes == [(2, 3, 4, 5)]  # once is not enough


def test_results_are_the_caller_s_own(tape: Tape) -> None:
    graphed = GraphedNetwork(Mean(), tape)
    inputs = [batch(1, 3, 4, 4, seed=seed) for seed in range(5)]
    results = [graphed(x)[0] for x in inputs]
    assert tape.replays > 1
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, x.mean(1, keepdim=True))


def test_each_kind_of_result_has_its_graph(tape: Tape) -> None:
    graphed = GraphedNetwork(Mean(), tape)
    for seed in range(4):
        x = batch(1, 3, 4, 4, seed=seed)
        assert torch.equal(graphed(x)[0], x.mean(1, keepdim=True))
        maps = graphed(x, None, True)
        assert torch.equal(maps[0], x + 1)
        assert torch.equal(maps[1], x + 2)
        both: list[tuple[Output, Tensor]] = [
            ("features", x.mean(1, keepdim=True)),
            ("logits", x[:, 0, 0]),
        ]
        for output, wanted in both:
            first, *maps = graphed(x, output, True)
            assert torch.equal(first, wanted)
            assert torch.equal(maps[1], x + 2)
            assert len(maps) == 2
    assert tape.shapes == [(1, 3, 4, 4)] * 4


def test_the_shapes_used_last_are_kept(tape: Tape) -> None:
    graphed = GraphedNetwork(Mean(), tape)

    def call(width: int, times: int = 1) -> None:
        for _ in range(times):
            graphed(batch(1, 3, 4, width))[0]

    for width in range(1, SHAPES + 1):
        call(width, EARNED)
    call(1)  # now 2 is the one used longest ago
    call(99, EARNED)
    assert len(tape.shapes) == SHAPES + 1
    assert len(graphed._graphs) == SHAPES
    call(1)
    assert len(tape.shapes) == SHAPES + 1
    call(2)  # must earn it again
    assert len(tape.shapes) == SHAPES + 1
    call(2)
    assert tape.shapes[-1] == (1, 3, 4, 2)
    assert len(graphed._graphs) == SHAPES


def test_counting_shapes_takes_bounded_memory(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_SHAPES_COUNTED", 8)
    graphed = GraphedNetwork(Mean(), tape)
    for width in range(1, 50):
        graphed(batch(1, 3, 1, width))[0]
    assert len(graphed._counts) <= 8
    assert tape.shapes == []


def test_an_evicted_shape_whose_count_is_forgotten(tape: Tape) -> None:
    graphed = GraphedNetwork(Mean(), tape)
    for width in range(1, SHAPES + 3):
        for _ in range(EARNED):
            graphed(batch(1, 3, 1, width))[0]
        if width == SHAPES:
            graphed._counts.clear()  # as many other shapes between do
    assert len(tape.shapes) == SHAPES + 2
    assert len(graphed._graphs) == SHAPES


def test_errors_of_the_network_come_through(tape: Tape) -> None:
    graphed = GraphedNetwork(Mean(), tape)
    for _ in range(EARNED + 1):
        with pytest.raises(ValueError, match="no head"):
            graphed(batch(1, 3, 4, 4), "logits")
    assert graphed.failure is None
    assert torch.equal(graphed(batch(0, 3, 4, 4))[0], torch.zeros(0, 1, 4, 4))


def test_where_capturing_fails_the_network_runs(
    tape: Tape, caplog: pytest.LogCaptureFixture
) -> None:
    graphed, x = GraphedNetwork(Mean(), tape), batch(1, 3, 4, 4)
    for _ in range(3):
        graphed(x)[0]
    tape.error = RuntimeError("CUDA out of memory\nand a long story")
    with caplog.at_level(logging.WARNING, "tinyvit"):
        for width in (5, 5, 5, 6, 6, 6):
            other = batch(1, 3, 4, width)
            assert torch.equal(graphed(other)[0], other.mean(1, keepdim=True))
    assert graphed.failure == "CUDA out of memory"
    words = "no CUDA graph, kernels are started one by one: CUDA out of memory"
    assert caplog.messages == [words]
    assert torch.equal(graphed(x)[0], x.mean(1, keepdim=True))
    assert not graphed._graphs  # their memory is given back, too


@pytest.mark.parametrize(("is_exact", "may_round"), [(True, False), (False, True)])
def test_float32_is_not_rounded(is_exact: bool, may_round: bool, tape: Tape) -> None:
    network = Mean()
    graphed = GraphedNetwork(network, tape, is_exact=is_exact)
    assert torch.backends.cudnn.allow_tf32  # torch's default
    for _ in range(EARNED):
        graphed(batch(1, 3, 4, 4))[0]
    # the first call, and the capture; a real replay runs no code of the network
    assert network.rounds[:EARNED] == [may_round] * EARNED
    assert torch.backends.cudnn.allow_tf32


def test_threads_give_what_one_gives(tape: Tape) -> None:
    graphed, wrong = GraphedNetwork(Mean(), tape), []

    def work(offset: int) -> None:
        for step in range(30):
            x = batch(1, 3, 4, 1 + step % 3, seed=100 * offset + step)
            if not torch.equal(graphed(x)[0], x.mean(1, keepdim=True)):
                wrong.append(step)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(tape.shapes) == 3


# --- the backend with them ------------------------------------------------------------------------


@pytest.fixture
def captured(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> Tape:
    """All devices capture."""
    monkeypatch.setattr(torch_backend, "choose_capture", lambda device: tape)
    return tape


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_backend_that_captures(
    precision: str, captured: Tape, make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model, "cpu", precision)
    # bf16 keeps 8 bits, see test_torch_backend.py
    close = CLOSE if precision == "fp32" else {"rtol": 0.05, "atol": 0.15}
    for seed in range(3):
        x = image(2, 33, 50, seed=seed)
        with torch.inference_mode():
            torch.testing.assert_close(backend(x), model(x), **close)
            torch.testing.assert_close(backend.logits(x), model.classify(x), **close)
            wanted = model.forward_intermediates(x)[1]
        features, maps = backend.with_stages(x)
        torch.testing.assert_close(features, backend(x), **close)
        torch.testing.assert_close(maps, backend.stages(x), **close)
        for stage, own in zip(maps, wanted, strict=True):
            error = float((stage - own).abs().max()) / float(own.abs().max())
            assert error < (1e-5 if precision == "fp32" else 0.05)
    assert captured.replays > 4
    words = backend.explain()
    assert words.startswith("folded, one CUDA graph for each shape that comes again (checked: ")


def test_graphs_of_old_weights_are_not_used(
    captured: Tape, make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    model, x = make_tiny_vit(), image(1, 32, 32)
    backend = TorchBackend(model)
    for step in range(3):
        for _ in range(EARNED + 1):
            with torch.inference_mode():
                torch.testing.assert_close(backend(x), model(x), **CLOSE)
        assert captured.shapes == [(1, 3, 32, 32)] * (step + 1)
        with torch.no_grad():
            model.neck[3].bias.add_(1)
    backend.close()
    assert backend._derived.drop() is None


def test_a_backend_says_when_capturing_failed(
    captured: Tape, make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    captured.error = RuntimeError("operation not permitted when stream is capturing")
    model, x = make_tiny_vit(), image(1, 32, 32)
    backend = TorchBackend(model)
    for _ in range(EARNED):
        with torch.inference_mode():
            torch.testing.assert_close(backend(x), model(x), **CLOSE)
    assert backend.explain().endswith(
        "; without CUDA graphs: operation not permitted when stream is capturing"
    )


def test_a_model_with_a_hook_is_not_captured(
    captured: Tape, make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    model, x, calls = make_tiny_vit(), image(1, 32, 32), []
    model.neck.register_forward_hook(lambda module, args, out: calls.append(1))
    backend = TorchBackend(model)
    for _ in range(4):
        backend(x)
    assert len(calls) == 4  # a graph would not call it
    assert captured.shapes == []
    assert backend.explain() == "the model as it is (neck has a forward hook)"


def test_only_cuda_captures() -> None:
    assert torch_backend.choose_capture("cpu") is None
    assert torch_backend.choose_capture("mps") is None
    assert torch_backend.choose_capture("meta") is None


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_graphs_give_what_the_network_gives() -> None:
    network = Mean()
    graphed = GraphedNetwork(network, CudaCapture("cuda"))
    for step in range(20):
        x = batch(1, 3, 8, 8 + step % (SHAPES + 2), seed=step).cuda()
        assert torch.equal(graphed(x)[0], x.mean(1, keepdim=True))
        assert torch.equal(graphed(x, None, True)[1], x + 2)
    assert graphed.failure is None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_backend_on_a_gpu_captures(
    precision: str, make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model, "cuda", precision)
    # TF32 is off in fp32; bf16 keeps 8 bits, see test_torch_backend.py
    close = {"rtol": 1e-3, "atol": 1e-3} if precision == "fp32" else {"rtol": 0.05, "atol": 0.15}
    for step in range(4):
        for shape in ((1, 64, 64), (2, 33, 50)):
            x = image(*shape, seed=step)
            with torch.inference_mode():
                torch.testing.assert_close(backend(x), model(x), **close)
        if step == 2:
            with torch.no_grad():
                model.neck[3].bias.add_(1)
    assert "CUDA graph" in backend.explain()
    assert "without CUDA graphs" not in backend.explain()


@pytest.mark.gpu
def test_two_threads_on_a_gpu(make_tiny_vit: MakeModel, image: MakeImage) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model, "cuda")
    inputs = [image(1, 32, 32 + 16 * i) for i in range(3)]
    wanted = [backend(x) for x in inputs]
    wrong: list[int] = []

    def work(offset: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(20):
                i = (step + offset) % 3
                if not torch.allclose(backend(inputs[i]), wanted[i], atol=1e-4):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
