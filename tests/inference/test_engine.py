"""``Engine`` on every kind of image: values, order, errors, choices, the hash of the weights."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tiny import noise
from tinyvit.catalog import get_checkpoint
from tinyvit.checkpoints import cached_path
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.hub import save_pretrained
from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import prepare, to_input
from tinyvit.inference import Backend, Encoded, Engine, TorchBackend
from tinyvit.inference.read_ahead import each, preparations
from tinyvit.modules import TinyViT

RGB = NDArray[np.uint8]
MakeModel = Callable[..., TinyViT]

SPEC = ImageSpec.sam(64)
LOOSE = ImageSpec.sam(64, pad=False)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # other orders of summing and folded norms: ulps per layer
PLAIN = ImageSpec((4, 4), "squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Mean:
    """A backend in ten lines: the mean of each channel."""

    name, device = "mean", "paper"

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.is_closed = False

    def __call__(self, batch: Tensor) -> Tensor:
        self.batches.append(tuple(batch.shape))
        return batch.mean((2, 3))

    def close(self) -> None:
        self.is_closed = True


def as_batch(image: RGB, spec: ImageSpec) -> Tensor:
    return torch.from_numpy(to_input(image, spec)[0])[None]


def plain(*colours: int) -> list[RGB]:
    """Images of one colour each: their features tell them apart."""
    return [np.full((6, 6, 3), colour, np.uint8) for colour in colours]


def colours(features: Tensor) -> list[int]:
    return features[:, 0].int().tolist()


@pytest.fixture
def model(make_tiny_vit: MakeModel) -> TinyViT:
    model = make_tiny_vit()
    model.image_spec = SPEC
    return model


# --- every kind of image ------------------------------------------------------------------------


def encoded_bytes(image: RGB) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def as_tensor(image: RGB) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


KINDS: dict[str, Callable[[RGB, Path], Any]] = {
    "path": lambda image, path: path,
    "path as text": lambda image, path: str(path),
    "bytes": lambda image, path: encoded_bytes(image),
    "PIL": lambda image, path: Image.fromarray(image),
    "array": lambda image, path: image,
    "array of floats": lambda image, path: image.astype(np.float32) / 255,
    "tensor": lambda image, path: as_tensor(image),
    "stack of one": lambda image, path: image[None],
    "tensor stack of one": lambda image, path: as_tensor(image)[None],
    "list": lambda image, path: [image],
    "tuple": lambda image, path: (path,),
    "generator": lambda image, path: (item for item in [image]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_gives_the_same(kind: str, model: TinyViT, tmp_path: Path) -> None:
    image = noise(40, 56)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded_bytes(image))
    given = KINDS[kind](image, path)
    pixels, placement = to_input(image, SPEC)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(pixels)[None])
    engine = Engine(model, device="cpu")
    out = engine.embed(given)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, wanted, **CLOSE)
    assert torch.equal(out, engine.embed(image))  # the very same tensor came to the network
    given = KINDS[kind](image, path)
    encoded = next(engine.stream(given))
    assert isinstance(encoded, Encoded)
    assert encoded.features.shape == out.shape[1:]
    assert encoded.placement == placement == Placement((40, 56), (46, 64), (0, 0), (64, 64))


def test_stacks_are_many() -> None:
    stack = np.stack(plain(10, 20, 30))
    engine = Engine(backend=Mean(), image_spec=PLAIN)
    assert colours(engine.embed(stack)) == [10, 20, 30]
    assert colours(engine.embed(torch.from_numpy(stack).permute(0, 3, 1, 2))) == [10, 20, 30]


def test_greys_and_mixed_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded_bytes(plain(40)[0]))
    engine = Engine(backend=Mean(), image_spec=PLAIN)
    images = [np.full((6, 6), 10, np.uint8), plain(20)[0], Image.new("L", (3, 5), 30), path]
    assert colours(engine.embed(images)) == [10, 20, 30, 40]
    assert colours(engine.embed(images[0])) == [10]


def test_prepare_is_decode_and_to_input(model: TinyViT) -> None:
    image = Image.fromarray(noise(30, 20)).convert("RGBA")
    pixels, placement = Engine(model).prepare(image)
    wanted, place = to_input(decode(image), SPEC)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, wanted)
    assert placement == place


# --- order, batches, memory -----------------------------------------------------------------------


def test_order_is_kept_and_shapes_are_put_together() -> None:
    backend = Mean()
    engine = Engine(backend=backend, image_spec=ImageSpec.sam(8, pad=False), batch_size=3)
    wide, tall, square = ((4, 8), (8, 4), (8, 8))
    images = [
        np.full((*size, 3), 10 * i, np.uint8)
        for i, size in enumerate([wide, tall, wide, square, tall, wide, wide])
    ]
    out = [encoded.features for encoded in engine.stream(images)]
    wanted = [to_input(image, engine.image_spec)[0].mean((1, 2)) for image in images]
    np.testing.assert_allclose(out, wanted, rtol=1e-5)  # summed in another order
    # the first six images are read together, then the last one
    assert backend.batches == [(3, 3, 4, 8), (2, 3, 8, 4), (1, 3, 8, 8), (1, 3, 4, 8)]


@pytest.mark.parametrize(
    ("batch_size", "batches"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (8, [7])]
)
def test_batch_size_is_the_most(batch_size: int, batches: list[int]) -> None:
    backend = Mean()
    engine = Engine(backend=backend, image_spec=PLAIN, batch_size=batch_size)
    assert colours(engine.embed(plain(*range(7)))) == list(range(7))
    assert [batch[0] for batch in backend.batches] == batches


@pytest.mark.parametrize(("batch_size", "batches"), [(2, [1] * 7), (3, [3, 3, 1]), (8, [3, 3, 1])])
def test_a_backend_gets_an_image_for_each_thread(batch_size: int, batches: list[int]) -> None:
    backend = Mean()
    backend.device, backend.images_at_once = "cpu", 3
    spec = replace(PLAIN, size=(1024, 1024))  # above what goes together otherwise
    engine = Engine(backend=backend, image_spec=spec, batch_size=batch_size)
    assert colours(engine.embed(plain(*range(7)))) == list(range(7))
    assert [batch[0] for batch in backend.batches] == batches


def test_stream_reads_no_further_than_two_batches_ahead() -> None:
    taken: list[int] = []

    def endless() -> Iterator[RGB]:
        number = 0
        while True:
            taken.append(number % 250)
            yield plain(number % 250)[0]
            number += 1

    stream = Engine(backend=Mean(), image_spec=PLAIN, batch_size=4).stream(endless())
    assert taken == []
    for i in range(20):
        assert next(stream).features[0] == taken[i]
        assert len(taken) <= i + 1 + 2 * 4


def test_stream_of_nothing() -> None:
    backend = Mean()
    assert list(Engine(backend=backend, image_spec=PLAIN).stream([])) == []
    assert backend.batches == []


def test_alone_and_in_a_batch(model: TinyViT) -> None:
    images = [noise(48, 64, seed) for seed in range(5)]
    together = Engine(model, batch_size=5).embed(images)
    alone = Engine(model, batch_size=1).embed(images)
    torch.testing.assert_close(together, alone, **CLOSE)  # products of other sizes
    assert torch.equal(together, Engine(model, batch_size=5).embed(iter(images)))


def test_sizes_without_padding(model: TinyViT) -> None:
    engine = Engine(model, image_spec=LOOSE)
    images = [noise(64, 64), noise(64, 32), noise(16, 64)]
    shapes = [tuple(encoded.features.shape) for encoded in engine.stream(images)]
    assert shapes == [(16, 4, 4), (16, 4, 2), (16, 1, 4)]
    for encoded, image in zip(engine.stream(images), images, strict=True):
        with torch.inference_mode():
            wanted = model(as_batch(image, LOOSE))[0]
        np.testing.assert_allclose(encoded.features, wanted, **CLOSE)


def test_streams_give_arrays_that_are_the_caller_s_own(model: TinyViT) -> None:
    first, second = Engine(model, batch_size=2).stream([noise(40, 56)] * 2, stages=True)
    assert first.stages is not None
    for array in (first.features, *first.stages):
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
    kept = second.features.copy()
    first.features[:] = 0
    np.testing.assert_array_equal(second.features, kept)


def test_stages_can_be_trained_on(model: TinyViT) -> None:
    features = Engine(model).stages(noise(40, 56))[0][-1]
    torch.nn.Conv2d(features.shape[0], 2, 1)(features[None]).sum().backward()
    features.mul_(2)


def test_embeddings_can_be_trained_on(model: TinyViT) -> None:
    features = Engine(model).embed(noise(40, 56))
    torch.nn.Conv2d(16, 2, 1)(features).sum().backward()
    features.mul_(2)
    assert not features.requires_grad


# --- what can go wrong with images --------------------------------------------------------------


@pytest.mark.parametrize("nothing", [[], (), iter([]), np.zeros((0, 4, 4, 3), np.uint8)])
def test_embed_and_classify_want_an_image(nothing: Any, model: TinyViT) -> None:
    engine = Engine(model)
    with pytest.raises(ValueError, match=r"^embed wants at least one image, got none$"):
        engine.embed(nothing)
    with pytest.raises(ValueError, match=r"^classify wants at least one image, got none$"):
        engine.classify(nothing)


def test_embed_cannot_stack_different_shapes(model: TinyViT) -> None:
    with pytest.raises(ValueError) as caught:
        Engine(model, image_spec=LOOSE).embed([noise(64, 64), noise(64, 32), noise(64, 64)])
    assert str(caught.value) == (
        "the features have 2 different shapes, (16, 4, 2) to (16, 4, 4), and cannot be stacked; "
        "take them one by one with engine.stream(images)"
    )


def test_broken_images_say_which(model: TinyViT, tmp_path: Path) -> None:
    engine = Engine(model, batch_size=1)
    missing, broken = tmp_path / "none.png", tmp_path / "broken.png"
    broken.write_bytes(encoded_bytes(noise(40, 40))[:60])
    for path, words in ((missing, "there is no file"), (broken, "cut short")):
        for call in (engine.embed, engine.classify, engine.stages, engine.prepare):
            with pytest.raises(ImageError, match=words) as caught:
                call(path)
            assert path.name in str(caught.value)
    stream = engine.stream([noise(8, 8), noise(8, 8), missing])
    assert [next(stream).features.shape for _ in range(2)] == [(16, 4, 4)] * 2
    with pytest.raises(ImageError, match="there is no file"):
        next(stream)
    with pytest.raises(TypeError, match="wanted a path, bytes, a binary file object"):
        engine.embed(3)  # type: ignore[arg-type]


# --- classes and stages ---------------------------------------------------------------------------


def test_classify(model: TinyViT) -> None:
    images = [noise(40, 56), noise(64, 64), noise(8, 8)]
    logits = Engine(model).classify(iter(images))
    assert (logits.shape, logits.dtype) == ((3, 5), torch.float32)
    with torch.inference_mode():
        for row, image in zip(logits, images, strict=True):
            wanted = model.classify(as_batch(image, SPEC))[0]
            torch.testing.assert_close(row, wanted, **CLOSE)


def test_a_classifier_embeds_its_logits(make_tiny_vit: MakeModel) -> None:
    classifier = make_tiny_vit(neck_dim=None, strides=(2, 2, 2))
    engine = Engine(classifier, image_spec=ImageSpec.timm(64))
    logits = engine.embed(noise(50, 70))
    assert logits.shape == (1, 5)
    assert torch.equal(logits, engine.classify(noise(50, 70)))


def test_stages(model: TinyViT) -> None:
    image = noise(40, 56)
    stages, placement = Engine(model, image_spec=LOOSE).stages(image)
    assert placement == LOOSE.place(40, 56)
    assert [tuple(s.shape) for s in stages] == [(8, 12, 16), (12, 6, 8), (16, 3, 4), (24, 3, 4)]
    with torch.inference_mode():
        maps = model.forward_intermediates(as_batch(image, LOOSE))[1]
    torch.testing.assert_close(stages, [stage[0] for stage in maps], **CLOSE)


def test_models_and_backends_that_cannot(make_tiny_vit: MakeModel) -> None:
    engine = Engine(make_tiny_vit(head=False), image_spec=SPEC)
    with pytest.raises(ValueError, match="built without a classification head"):
        engine.classify(noise(8, 8))
    engine = Engine(backend=Mean(), image_spec=PLAIN)
    with pytest.raises(ValueError, match=r"^the backend 'mean' gives no logits; use 'torch'$"):
        engine.classify(noise(8, 8))
    with pytest.raises(ValueError, match=r"^the backend 'mean' gives no stages; use 'torch'$"):
        engine.stages(noise(8, 8))


# --- what the engine chooses ----------------------------------------------------------------------


def test_explain(
    model: TinyViT, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyvit.inference.backend.takes_native", lambda *arguments: False)
    with caplog.at_level(logging.INFO, "tinyvit"):
        engine = Engine(model, device="cpu")
    text = (
        f"torch {torch.__version__} on cpu, fp32 (exact; the default); auto is torch: measured "
        f"level with openvino, and native is not installed; images longest_side to 64x64"
    )
    assert engine.explain().startswith(f"{text}; runs folded, ")
    assert repr(engine) == f"Engine({text})"
    assert caplog.messages == [text]
    assert "bf16 (asked for)" in Engine(model, device="cpu", precision="bf16").explain()
    spec = ImageSpec((32, 48), "squash")
    fake = Engine(backend=Mean(), image_spec=spec)
    assert fake.explain() == "mean on paper: given; images squash to 32x48"


def test_precision_reaches_the_backend(model: TinyViT, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Engine(model, backend="torch", device="cpu")
    rough = Engine(model, backend="torch", device="cpu", precision="bf16")
    assert isinstance(exact.backend, TorchBackend)
    assert (exact.backend.precision, rough.backend.precision) == ("fp32", "bf16")
    image = noise(40, 56)
    # bf16 keeps 8 bits: each of some dozen layers errs by 2**-9 of values near 1 to 4
    torch.testing.assert_close(rough.embed(image), exact.embed(image), rtol=0.05, atol=0.15)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    auto = Engine(model, backend="torch", device="cpu", precision="auto")
    assert "bf16 (this device computes bf16 natively)" in auto.explain()
    assert torch.equal(auto.embed(image), rough.embed(image))


def test_device_auto_is_a_device(model: TinyViT) -> None:
    assert Engine(model).backend.device in ("cpu", "cuda", "mps")


def test_image_spec_overrides_the_models(model: TinyViT) -> None:
    assert Engine(model).image_spec == SPEC
    other = ImageSpec.sam(32)
    engine = Engine(model, image_spec=other)
    assert engine.image_spec == other
    assert engine.embed(noise(40, 56)).shape == (1, 16, 2, 2)
    assert model.image_spec == SPEC
    fake = Engine(model, backend=Mean())
    assert fake.image_spec == SPEC


def test_the_model_stays_as_it_is(model: TinyViT) -> None:
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    engine = Engine(model, precision="bf16")
    first = engine.embed(noise(40, 56))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with torch.no_grad():
        model.neck[0].weight.neg_()
    assert not torch.equal(engine.embed(noise(40, 56)), first)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "tiny_vit_5m_22"}, CheckpointError, "tiny_vit_5m_22"),
        ({"model": torch.nn.Identity()}, TypeError, "Engine wants a TinyViT, as tinyvit.create_m"),
        ({"model": 3}, TypeError, "or the name, file or folder of one, got int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": -3}, ValueError, "batch_size must be at least 1, got -3"),
        (
            {"backend": "tensorrt"},
            ValueError,
            "backend must be one of ('auto', 'torch', 'native', 'openvino', 'onnx'), "
            "got 'tensorrt'",
        ),
        (
            {"backend": "torch", "threads": 2},
            ValueError,
            "torch has one number for the whole process; call torch.set_num_threads(2)",
        ),
        (
            {"backend": Mean(), "threads": 2},
            ValueError,
            "threads=2 are the backend's own affair where backend is an object; leave them out",
        ),
        (
            {"backend": print},
            TypeError,
            "backend must be one of ('auto', 'torch', 'native', 'openvino', 'onnx') or an object "
            "with name, "
            "device, close() and __call__(batch), got builtin_function_or_method",
        ),
        ({"backend": None}, TypeError, "__call__(batch), got NoneType"),
        ({"device": "gpu"}, ValueError, "device must be 'auto' or a device that torch can use "),
        ({"precision": "int8"}, ValueError, "precision must be one of ('fp32', 'bf16', 'auto')"),
        ({"precision": "fp16"}, ValueError, "precision 'fp16' is refused: it ends at 65504"),
        (
            {"backend": Mean()},
            ValueError,
            "this model does not say how its images are prepared; pass "
            "image_spec=ImageSpec.sam(1024), ImageSpec.timm(224) or another",
        ),
    ],
)
def test_wrong_arguments(
    arguments: dict[str, Any],
    error: type[Exception],
    words: str,
    make_tiny_vit: MakeModel,
) -> None:
    if arguments and "model" not in arguments and not isinstance(arguments.get("backend"), Mean):
        arguments = {**arguments, "model": make_tiny_vit()}
    with pytest.raises(error) as caught:
        Engine(**arguments)
    assert words in str(caught.value)


def test_a_model_built_by_hand_needs_an_image_spec(make_tiny_vit: MakeModel) -> None:
    with pytest.raises(ValueError, match="does not say how its images are prepared"):
        Engine(make_tiny_vit())


def test_names_files_and_folders_are_models(model: TinyViT, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path / "model")
    wanted = Engine(model).embed(noise(40, 56))
    assert torch.equal(Engine(folder).embed(noise(40, 56)), wanted)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Engine(tmp_path)
    starter = Engine("tinyvit_sam_2m")
    file = cached_path(get_checkpoint("tinyvit_sam_2m"))
    for other in (Engine(), Engine(file), Engine(str(file))):
        assert other.weights_sha256() == starter.weights_sha256()
        assert other.image_spec == starter.image_spec
    assert Engine(backend=Mean(), image_spec=PLAIN).embed(plain(3)[0]).tolist() == [[3, 3, 3]]


# --- as others call it ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", ["outside", "inside"])
def test_autocast_changes_nothing(first: str, dtype: torch.dtype, model: TinyViT) -> None:
    """It gave bf16's error of 0.04 while saying fp32."""
    image, wanted = noise(40, 56), Engine(model).embed(noise(40, 56))
    engine = Engine(model)
    if first == "outside":
        engine.embed(image)
    with torch.autocast("cpu", dtype):
        assert torch.equal(engine.embed(image), wanted)
        assert torch.equal(engine.stages(image)[0][0], Engine(model).stages(image)[0][0])
    assert torch.equal(engine.embed(image), wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("is_used", [False, True])
def test_copies_and_pickles_work(
    is_used: bool, copied: Callable[[Engine], Engine], model: TinyViT
) -> None:
    engine, image = Engine(model), noise(40, 56)
    if is_used:
        engine.embed(image)
    twin = copied(engine)
    wanted = engine.embed(image)
    assert torch.equal(twin.embed(image), wanted)
    with torch.no_grad():
        model.neck[0].weight.neg_()
    assert torch.equal(twin.embed(image), wanted)  # it has a model of its own
    assert not torch.equal(engine.embed(image), wanted)


def test_the_fake_is_a_backend() -> None:
    assert isinstance(Mean(), Backend)


def test_the_context_manager_closes(model: TinyViT) -> None:
    backend = Mean()
    with Engine(backend=backend, image_spec=PLAIN) as engine:
        assert isinstance(engine, Engine)
        assert not backend.is_closed
    assert backend.is_closed
    backend = Mean()
    with pytest.raises(KeyError), Engine(backend=backend, image_spec=PLAIN):
        raise KeyError("passes through")
    assert backend.is_closed
    with Engine(model, precision="bf16") as engine:
        assert engine.embed(noise(8, 8)).shape == (1, 16, 4, 4)


# --- which weights --------------------------------------------------------------------------------


def change_weight(model: TinyViT) -> None:
    with torch.no_grad():
        model.neck[0].weight.view(-1)[7] += 1e-6


def change_buffer(model: TinyViT) -> None:
    model.patch_embed.seq[0].bn.num_batches_tracked += 1


def change_sign_of_zero(model: TinyViT) -> None:
    with torch.no_grad():
        model.head.bias[0] = -0.0


@pytest.mark.parametrize("change", [change_weight, change_buffer, change_sign_of_zero])
def test_weights_sha256(change: Callable[[TinyViT], None], make_tiny_vit: MakeModel) -> None:
    one, other = make_tiny_vit(), make_tiny_vit()
    for model in (one, other):
        model.image_spec = SPEC
        with torch.no_grad():
            model.head.bias[0] = 0.0
    digest = Engine(one).weights_sha256()
    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")
    assert Engine(other, precision="bf16", batch_size=1).weights_sha256() == digest
    change(other)
    engine = Engine(other)
    assert engine.weights_sha256() != digest
    assert engine.weights_sha256() == engine.weights_sha256()


def test_weights_sha256_knows_shapes_and_no_precision(make_tiny_vit: MakeModel) -> None:
    models = [make_tiny_vit(), make_tiny_vit(head=False), make_tiny_vit(num_classes=0)]
    digests = {Engine(model, image_spec=SPEC).weights_sha256() for model in models}
    assert len(digests) == len(models)
    assert Engine(make_tiny_vit().double(), image_spec=SPEC).weights_sha256() in digests


def test_weights_sha256_wants_a_model() -> None:
    with pytest.raises(ValueError, match="has a backend of its own and no model to hash"):
        Engine(backend=Mean(), image_spec=PLAIN).weights_sha256()


UNPADDED = ImageSpec.sam(16, pad=False)
IMAGE = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


def test_one_and_many() -> None:
    stream, pil, tensor = io.BytesIO(), Image.fromarray(IMAGE), torch.from_numpy(IMAGE)
    for one in ("a.png", Path("a.png"), b"x", bytearray(b"x"), memoryview(b"x"), stream, pil):
        assert list(each(one)) == [one]  # type: ignore[arg-type]
    assert [image is IMAGE for image in each(IMAGE)] == [True]
    assert [image is tensor for image in each(tensor)] == [True]
    assert [image.shape for image in each(np.stack([IMAGE] * 3))] == [IMAGE.shape] * 3  # type: ignore[union-attr]
    paths = (path for path in ("a", "b"))
    assert each(paths) is paths


def test_files_are_read_when_the_work_is_done_and_the_rest_when_it_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path)
    buffer = IMAGE.copy()
    tensor = torch.from_numpy(IMAGE.copy()).permute(2, 0, 1)
    given = [path, str(path), path.read_bytes(), Image.open(path), path.open("rb"), buffer, tensor]
    work = list(preparations(given, UNPADDED))
    given[4].close()  # type: ignore[union-attr]
    buffer[:], tensor[:] = 0, 0
    wanted, placement = prepare(IMAGE, UNPADDED)
    np.testing.assert_array_equal(wanted, to_input(decode(IMAGE), UNPADDED)[0])
    for job in work:
        np.testing.assert_array_equal(job()[0], wanted)
        assert job()[1] == placement
    Image.fromarray(255 - IMAGE).save(path)
    assert not np.array_equal(work[0]()[0], wanted)


def test_errors_come_when_the_image_is_read(tmp_path: Path) -> None:
    [job] = preparations([tmp_path / "none.png"], UNPADDED)
    with pytest.raises(ImageError, match="there is no file"):
        job()
    with pytest.raises(ImageError, match="has no pixels"):
        next(preparations([np.zeros((0, 4, 3), np.uint8)], UNPADDED))
    with pytest.raises(TypeError, match="wanted a path, bytes"):
        next(preparations([3], UNPADDED))  # type: ignore[list-item]


def test_without_torch_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['tinyvit_native'] = None\n"
        "from tinyvit.inference.engine import Engine\n"
        "Engine('tinyvit_sam_2m')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no engine is installed here; pip install 'tinyvit[native]'" in done.stderr


@pytest.mark.parametrize("pad", [True, False])
def test_a_pooled_vector_is_the_mean_over_what_covers_the_image(
    make_tiny_vit: MakeModel, pad: bool
) -> None:
    engine = Engine(make_tiny_vit(), backend="torch", image_spec=ImageSpec.sam(64, pad=pad))
    images = [noise(20, 40), noise(64, 33), noise(40, 40)]
    plain = list(engine.stream(images))
    for image, encoded, alone in zip(
        images, engine.stream(images, pooled=True), plain, strict=True
    ):
        height, width = image.shape[:2]
        scale = 64 / max(height, width)
        rows, columns = -(-round(height * scale) // 16), -(-round(width * scale) // 16)
        wanted = encoded.features[:, :rows, :columns].mean((1, 2))
        np.testing.assert_allclose(encoded.pooled, wanted, rtol=1e-5)
        np.testing.assert_array_equal(encoded.features, alone.features)
        assert alone.pooled is None and encoded.stages is None


def test_a_classifiers_pooled_vector_is_what_its_head_sees(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit(neck_dim=None)
    model.image_spec = ImageSpec.timm(64)
    engine = Engine(model, backend="torch")
    (encoded,) = engine.stream(noise(70, 80), pooled=True)
    pixels, _ = engine.prepare(noise(70, 80))
    with torch.no_grad():
        last = model.forward_backbone(torch.from_numpy(pixels[None]))
        seen = model.forward_head(last, pre_logits=True)[0]
    np.testing.assert_allclose(encoded.pooled, seen.numpy(), **CLOSE)
    assert encoded.features.shape == (5,)
    model.norm_head = model.head = None  # a map is given then, and its mean
    (encoded,) = Engine(model, backend="torch").stream(noise(70, 80), pooled=True)
    np.testing.assert_allclose(encoded.pooled, encoded.features.mean((1, 2)), rtol=1e-5)
    assert Engine(model, backend="torch").model is model
