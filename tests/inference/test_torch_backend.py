"""The torch backend against the model, whatever its state; frozen and folded copies."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FunctionType, ModuleType

import pytest
import torch
from torch import Tensor, nn

from tinyvit.inference import TorchBackend, torch_backend
from tinyvit.inference.fast_encoder import DeployedTinyViT
from tinyvit.inference.torch_backend import folded_copy, frozen_copy
from tinyvit.modules import Attention, Conv2d_BN, TinyViT

MakeModel = Callable[..., TinyViT]
MakeImage = Callable[..., Tensor]

# fp32: norms folded into products and other orders of summing change some ulps per layer;
# bf16 keeps 8 bits: each of some dozen layers errs by 2**-9 of values near 1 to 4
TOLERANCE = {"fp32": {"rtol": 1e-4, "atol": 1e-4}, "bf16": {"rtol": 0.05, "atol": 0.15}}


@pytest.fixture
def batch(image: MakeImage) -> Tensor:
    return image(2, 48, 64)


def plain(model: TinyViT, batch: Tensor) -> Tensor:
    """What the model itself gives in eval mode and float32, found without changing it."""
    twin = copy.deepcopy(model).float().eval()
    with torch.inference_mode():
        return twin(batch)


def assert_close(out: Tensor, wanted: Tensor, precision: str = "fp32") -> None:
    torch.testing.assert_close(out, wanted, **TOLERANCE[precision])


def traits(model: TinyViT) -> list[object]:
    """Everything a backend might spoil in a model."""
    tensors = (*model.parameters(), *model.buffers())
    return [
        [module.training for module in model.modules()],
        [(t.data_ptr(), t._version, t.dtype, t.device, t.requires_grad) for t in tensors],
        [p.grad for p in model.parameters()],
        [getattr(p, "lr_scale", None) for p in model.parameters()],
        sorted(vars(model)),
    ]


# --- one result, whatever the model's state -------------------------------------------------------


def test_it_gives_what_the_model_gives(make_tiny_vit: MakeModel, batch: Tensor) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model)
    assert (backend.name, backend.device, backend.precision) == ("torch", "cpu", "fp32")
    out = backend(batch)
    assert_close(out, plain(model, batch))
    assert torch.equal(backend(batch), out)
    assert torch.equal(TorchBackend(model)(batch), out)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model,
        lambda model: model.train(),
        lambda model: model.requires_grad_(False),
        lambda model: model.double(),
        lambda model: model.half().train(),
    ],
    ids=["eval", "training", "frozen", "double", "half in training"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_source_is_never_changed(
    prepare: Callable[[TinyViT], TinyViT],
    precision: str,
    make_tiny_vit: MakeModel,
    batch: Tensor,
) -> None:
    model = prepare(make_tiny_vit(drop_path_rate=0.5, drop_rate=0.5))
    before = traits(model)
    values = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted = plain(model, batch)
    backend = TorchBackend(model, "cpu", precision)
    for _ in range(2):
        out = backend(batch)
        assert (out.dtype, out.device.type) == (torch.float32, "cpu")
        assert not out.requires_grad
        assert_close(out, wanted, precision)
        assert torch.allclose(out, wanted, atol=1e-4) == (precision == "fp32")
    backend.logits(batch)
    backend.stages(batch)
    backend.close()
    assert traits(model) == before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in values.items())


def test_one_module_in_training_is_enough(make_tiny_vit: MakeModel, batch: Tensor) -> None:
    model = make_tiny_vit()
    wanted = plain(model, batch)
    model.layers[2].blocks[0].local_conv.bn.train()
    assert_close(TorchBackend(model)(batch), wanted)
    assert model.layers[2].blocks[0].local_conv.bn.training


def test_it_serves_a_model_that_is_being_trained(make_tiny_vit: MakeModel, batch: Tensor) -> None:
    model = make_tiny_vit(drop_path_rate=0.3).train()
    backend = TorchBackend(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    last = backend(batch)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        assert not torch.allclose(
            backend(batch), last, atol=1e-3
        )  # the batch norms' statistics have moved
        optimizer.step()
        out = backend(batch)
        assert_close(out, plain(model, batch))
        assert not torch.allclose(out, last, atol=1e-3)
        last = out
    assert all(module.training for module in model.modules())


def test_logits_and_stages(make_tiny_vit: MakeModel, batch: Tensor) -> None:
    model = make_tiny_vit()
    with torch.inference_mode():
        logits, maps = model.classify(batch), model.forward_intermediates(batch)[1]
    backend = TorchBackend(model)
    assert_close(backend.logits(batch), logits)
    stages = backend.stages(batch)
    assert [tuple(stage.shape) for stage in stages] == [
        (2, 8, 12, 16),
        (2, 12, 6, 8),
        (2, 16, 3, 4),
        (2, 24, 3, 4),
    ]
    for stage, wanted in zip(stages, maps, strict=True):
        assert_close(stage, wanted)
    half = TorchBackend(model, "cpu", "bf16")
    assert_close(half.logits(batch), logits, "bf16")
    for stage, wanted in zip(half.stages(batch), maps, strict=True):
        assert stage.dtype == torch.float32
        torch.testing.assert_close(stage, wanted, rtol=0.05, atol=0.05 * float(wanted.std()) + 0.1)
    assert_close(backend(batch), plain(model, batch))


def test_a_classifier_gives_logits(make_tiny_vit: MakeModel, batch: Tensor) -> None:
    model = make_tiny_vit(neck_dim=None, strides=(2, 2, 2))
    backend = TorchBackend(model)
    assert_close(backend(batch), plain(model, batch))
    assert torch.equal(backend(batch), backend.logits(batch))
    for changes, shape in (({"head": False}, (2, 24, 3, 4)), ({"num_classes": 0}, (2, 24))):
        other = make_tiny_vit(neck_dim=None, **changes)
        out = TorchBackend(other)(batch)
        assert out.shape == shape
        assert_close(out, plain(other, batch))


def test_logits_of_a_model_without_a_head(make_tiny_vit: MakeModel, batch: Tensor) -> None:
    with pytest.raises(ValueError, match="built without a classification head"):
        TorchBackend(make_tiny_vit(head=False)).logits(batch)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 33), (1, 64, 16)])
def test_any_size_and_batch(
    shape: tuple[int, int, int], make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model)
    assert_close(backend(image(*shape)), plain(model, image(*shape)))


def add_hook(model: TinyViT) -> None:
    model.layers[1].register_forward_hook(lambda module, args, out: out * 2)


def put_in_another_module(model: TinyViT) -> None:
    model.neck = torch.nn.Sequential(model.neck[0], torch.nn.Tanh())


@pytest.mark.parametrize("change", [add_hook, put_in_another_module])
def test_a_model_that_somebody_changed(
    change: Callable[[TinyViT], None], make_tiny_vit: MakeModel, batch: Tensor
) -> None:
    model = make_tiny_vit()
    before = plain(model, batch)
    change(model)
    wanted = plain(model, batch)
    assert not torch.allclose(wanted, before, atol=1e-2)
    backend = TorchBackend(model)
    assert_close(backend(batch), wanted)
    assert backend.stages(batch)[3].shape == (2, 24, 3, 4)
    assert backend.logits(batch).shape == (2, 5)
    assert backend.explain().startswith("the model as it is (")


def test_a_folded_form_that_is_wrong_is_not_used(
    make_tiny_vit: MakeModel, batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model)
    assert backend.explain().startswith("folded, ")
    assert "checked: error" in backend.explain()
    really = DeployedTinyViT.__call__
    monkeypatch.setattr(
        DeployedTinyViT, "__call__", lambda *given, **more: [-m for m in really(*given, **more)]
    )
    wary = TorchBackend(model)
    assert wary.explain().startswith("the model as it is (the folded form differs by ")
    assert_close(wary(batch), plain(model, batch))


# --- what runs follows the model ------------------------------------------------------------------


def sgd(model: TinyViT) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3, 32, 32)).square().mean().backward()
    optimizer.step()


def load(model: TinyViT) -> None:
    model.load_state_dict({k: t * 1.5 for k, t in model.state_dict().items()})


def new_neck(model: TinyViT) -> None:
    model.neck = copy.deepcopy(model.neck)
    with torch.no_grad():
        model.neck[0].weight.neg_()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [sgd, load, new_neck])  # test_derived.py has all others
def test_it_follows_when_the_model_changes(
    change: Callable[[TinyViT], None], precision: str, make_tiny_vit: MakeModel, batch: Tensor
) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model, "cpu", precision)
    before = backend(batch)
    change(model)
    after = backend(batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, TorchBackend(model, "cpu", precision)(batch))


def test_nothing_is_made_anew_while_nothing_changes(
    make_tiny_vit: MakeModel, batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(make_tiny_vit(), "cpu", "bf16")
    first = backend(batch)
    made = []
    really = torch_backend.DeployedTinyViT
    monkeypatch.setattr(
        torch_backend, "DeployedTinyViT", lambda *given: made.append(given) or really(*given)
    )
    assert all(torch.equal(backend(batch), first) for _ in range(3))
    assert made == []
    backend.refresh()
    assert torch.equal(backend(batch), first)
    assert len(made) == 1


def test_the_check_leaves_a_model_in_training_as_it_is(
    make_tiny_vit: MakeModel, batch: Tensor
) -> None:
    model = make_tiny_vit().train()
    before = copy.deepcopy(model.state_dict())
    got = TorchBackend(model)(batch)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(got, TorchBackend(make_tiny_vit())(batch))


def test_writes_that_nothing_shows_need_refresh(make_tiny_vit: MakeModel, batch: Tensor) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model, "cpu", "bf16")
    before = backend(batch)
    model.neck[0].weight.data.view(-1)[101] = 50.0
    backend.refresh()
    after = backend(batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, TorchBackend(model, "cpu", "bf16")(batch))


def tensors_held(backend: TorchBackend, model: TinyViT) -> int:
    """How many tensors can be reached from a backend other than through its model."""
    found, seen, todo = 0, {id(model)}, [vars(backend)]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found += 1
        elif isinstance(item, FunctionType):
            todo.extend(item.__closure__ or ())
        else:
            todo.extend(gc.get_referents(item))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_close_lets_go_of_what_was_made(
    precision: str, make_tiny_vit: MakeModel, batch: Tensor
) -> None:
    model = make_tiny_vit().train()
    backend = TorchBackend(model, "cpu", precision)
    assert tensors_held(backend, model) == 0
    backend(batch)
    assert tensors_held(backend, model) > 0
    backend.close()
    assert tensors_held(backend, model) == 0
    backend.close()


def test_two_threads_give_what_one_gives(make_tiny_vit: MakeModel, image: MakeImage) -> None:
    model = make_tiny_vit().train()
    wanted = [TorchBackend(model)(image(1, 32, 32 + 16 * i)) for i in range(4)]
    backend = TorchBackend(model)
    start = threading.Barrier(4)
    wrong: list[int] = []

    def work(offset: int) -> None:
        start.wait(10)
        for step in range(5):
            i = (step + offset) % 4
            if not torch.equal(backend(image(1, 32, 32 + 16 * i)), wanted[i]):
                wrong.append(i)
            if step == offset:
                backend.refresh()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_made_in_inference_mode(
    precision: str, make_tiny_vit: MakeModel, batch: Tensor
) -> None:
    with torch.inference_mode():
        model = make_tiny_vit()
    backend = TorchBackend(model, "cpu", precision)
    for _ in range(2):
        assert_close(backend(batch), plain(model, batch), precision)


def test_a_model_used_in_inference_mode(make_tiny_vit: MakeModel, batch: Tensor) -> None:
    model = make_tiny_vit()
    with torch.inference_mode():
        TorchBackend(model, "cpu", "bf16")(batch)
    model(batch).sum().backward()  # the model itself was not touched
    assert model.neck[0].weight.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu(precision: str, make_tiny_vit: MakeModel, batch: Tensor) -> None:
    model = make_tiny_vit()
    backend = TorchBackend(model, "cuda", precision)
    out = backend(batch)
    assert (out.device.type, out.dtype) == ("cpu", torch.float32)
    assert next(model.parameters()).device.type == "cpu"
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if precision == "fp32" else TOLERANCE["bf16"]
    torch.testing.assert_close(out, plain(model, batch), **tolerance)
    sgd(model)
    torch.testing.assert_close(backend(batch), plain(model, batch), **tolerance)


# --- memory ---------------------------------------------------------------------------------------

PAGE_FAULTS = """
import resource, torch, tinyvit
engine = tinyvit.Engine(tinyvit.create_model("tiny_vit_5m_sam"))
x = torch.zeros(1, 3, 1024, 1024)
for _ in range(3):
    engine.backend(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
engine.backend(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_a_call_asks_the_system_for_no_memory() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 2000  # the plain model: 250 000


MakeModel = Callable[..., TinyViT]
MakeImage = Callable[..., Tensor]


def test_a_frozen_copy_shares_nothing(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit(drop_path_rate=0.5).double().train()
    twin = frozen_copy(model)
    assert not twin.training
    assert model.training
    for key, tensor in twin.state_dict().items():
        assert tensor.data_ptr() != model.state_dict()[key].data_ptr()
        assert tensor.dtype in (torch.float32, torch.int64)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 48, 64), (1, 75, 58)])
def test_a_folded_copy_gives_what_the_model_gives(
    shape: tuple[int, int, int], make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    model, x = make_tiny_vit(), image(*shape)
    folded = folded_copy(model)
    close = {"rtol": 1e-4, "atol": 1e-4}  # some ulps for each layer
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), model(x), **close)
        torch.testing.assert_close(folded.classify(x), model.classify(x), **close)
        maps, wanted = (it.forward_intermediates(x)[1] for it in (folded, model))
        torch.testing.assert_close(maps, wanted, **close)


def test_what_can_be_folded_is(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit(stem="pointwise", local_conv_size=5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = folded_copy(model)
    assert any(isinstance(module, Attention) for module in model.modules())
    kinds = (Conv2d_BN, Attention, nn.BatchNorm2d)
    assert not any(isinstance(module, kinds) for module in folded.modules())
    for module in folded.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_in_another_precision_all_of_it_is(make_tiny_vit: MakeModel, image: MakeImage) -> None:
    model, x = make_tiny_vit(), image(1, 48, 64)
    with torch.inference_mode():
        out = folded_copy(model).to(torch.bfloat16)(x.bfloat16())
        assert out.dtype == torch.bfloat16
        # bf16 keeps 8 bits, see test_torch_backend.py
        torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.15)
