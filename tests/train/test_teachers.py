import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tinyvit
from tinyvit.checkpoints.files import weights_sha256
from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_input
from tinyvit.inference.graph_backend import export_onnx
from tinyvit.modules import TinyViT
from tinyvit.train.data.augment import View, augmentation
from tinyvit.train.data.images import open_part
from tinyvit.train.store import Store, StoreMismatchError
from tinyvit.train.tasks.classify import save_classifier
from tinyvit.train.tasks.teachers import (
    Teacher,
    module_teacher,
    open_teacher,
    store_features,
    write_logits,
)

from .tiny_images import tiny_classifier, write_folder

SPEC = ImageSpec.sam(32)


def tiny(**more):
    torch.manual_seed(0)
    model = TinyViT(
        32, embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 1), window_sizes=(7, 7),
        strides=(2,), neck_dim=6, head=False, **more,
    ).eval()  # fmt: skip
    model.image_spec = SPEC
    return model


def write_images(folder, *names, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / name)


class Plain(nn.Module):
    """Averages of 8 x 8 pixels, counted."""

    def __init__(self, size=8):
        super().__init__()
        self.pool = nn.AvgPool2d(size)
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return self.pool(x)


def test_a_tiny_vit_teaches_its_embedding():
    model = tiny()
    teacher = open_teacher(model, device="cpu")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # the folded form computes in another order
        assert torch.allclose(teacher(x), model(x), atol=1e-4)
    assert teacher.image_spec == SPEC
    assert teacher.sha256 == weights_sha256(model.state_dict())


def test_a_model_that_cannot_teach_is_refused():
    model = tiny()
    model.image_spec = None
    with pytest.raises(ValueError, match="no image_spec"):
        open_teacher(model, device="cpu")
    model.neck = None
    with pytest.raises(ValueError, match="no neck"):
        open_teacher(model, device="cpu")


def test_a_checkpoint_s_name_is_a_teacher():
    teacher = open_teacher("tinyvit_sam_2m", device="cpu")
    assert teacher.name == "tinyvit_sam_2m" and teacher.image_spec == ImageSpec.sam(256)
    assert teacher(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 4, 4)
    smaller = open_teacher("tinyvit_sam_2m", ImageSpec.sam(128), device="cpu")
    assert smaller.image_spec.size == (128, 128) and smaller.sha256 == teacher.sha256


def test_an_onnx_file_teaches_what_its_model_does(tmp_path):
    pytest.importorskip("onnxruntime")
    model = tiny()
    path = tmp_path / "teacher.onnx"
    path.write_bytes(export_onnx(model))
    teacher = open_teacher(path, SPEC)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(teacher(x), model(x), atol=1e-4)  # another library's order
    assert teacher.name == "teacher.onnx" and len(teacher.sha256) == 64
    with pytest.raises(ValueError, match=r"give image_spec, for example ImageSpec\.sam\(1024\)"):
        open_teacher(path)
    with pytest.raises(CheckpointError, match="there is no ONNX file"):
        open_teacher(tmp_path / "none.onnx", SPEC)


def test_tokens_become_maps():
    tokens = torch.randn(2, 4 + 16, 7)
    spec = ImageSpec.sam(16)

    class Tokens(nn.Module):
        def forward(self, x):
            return SimpleNamespace(last_hidden_state=tokens)

    found = module_teacher(Tokens(), spec)(torch.zeros(2, 3, 16, 16))
    assert found.shape == (2, 7, 4, 4)
    assert torch.equal(found[1, :, 2, 3], tokens[1, 4 + 2 * 4 + 3])
    last = module_teacher(nn.Identity(), spec, channels_last=True)(torch.randn(1, 2, 3, 5))
    assert last.shape == (1, 5, 2, 3)
    with pytest.raises(ValueError, match=r"Identity gave \[1, 30\]; wanted a map"):
        module_teacher(nn.Identity(), spec)(torch.randn(1, 30))
    with pytest.raises(ValueError, match=r"wanted a map .* or tokens"):
        module_teacher(nn.Identity(), spec)(torch.randn(1, 24, 3))


def test_other_libraries_are_asked_for_only_when_wanted(monkeypatch):
    for source, package in (("timm:vit", "timm"), ("hf:facebook/sam", "transformers")):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        with pytest.raises(MissingExtraError, match=f"pip install {package}"):
            open_teacher(source, SPEC, device="cpu")


def test_a_model_of_timm_says_how_its_images_go_in(monkeypatch):
    class Swin(nn.Module):
        output_fmt = "NHWC"
        pretrained_cfg = {  # noqa: RUF012 (as timm has it)
            "input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0),
            "crop_pct": 0.8,
        }  # fmt: skip

        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward_features(self, x):
            return x.permute(0, 2, 3, 1)

    fake = SimpleNamespace(create_model=lambda name, pretrained, num_classes: Swin())
    monkeypatch.setitem(sys.modules, "timm", fake)
    teacher = open_teacher("timm:swin", device="cpu")
    assert teacher.image_spec.size == (8, 8) and teacher.image_spec.shorter_side == 10
    assert teacher.image_spec.std == (63.75, 127.5, 255.0)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(teacher(x), x)
    named = {f"model.{key}": value for key, value in Swin().state_dict().items()}
    assert teacher.sha256 == weights_sha256(named)  # as of stores of earlier versions


def test_a_sam_of_transformers_teaches_by_its_vision_encoder(monkeypatch):
    model = SimpleNamespace(vision_encoder=nn.Identity())
    fake = SimpleNamespace(AutoModel=SimpleNamespace(from_pretrained=lambda name: model))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    teacher = open_teacher("hf:facebook/sam-vit-base", ImageSpec.sam(16), device="cpu")
    assert teacher(torch.ones(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="give image_spec"):
        open_teacher("hf:facebook/sam-vit-base", device="cpu")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="no images in"):
        store_features(module_teacher(Plain(), SPEC), tmp_path, tmp_path / "out")


def test_features_are_stored_once_and_are_the_teacher_s(tmp_path):
    write_images(tmp_path / "in", "a.png", "b.png", "c.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    module, told = Plain(), []
    teacher = module_teacher(module, SPEC)
    store = store_features(
        teacher, tmp_path / "in", tmp_path / "out", flips=True, batch_size=2, shard_size=3,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert store.good == ["a.png", "b.png", "c.png"]
    assert "bad.png" in store.unreadable["bad.png"]
    assert told == [(2, 4), (3, 4), (4, 4)]
    assert module.seen == [2, 2, 1, 1]  # each batch as it is and mirrored; the broken one not
    image = np.array(Image.open(tmp_path / "in" / "b.png"))
    for flipped in (False, True):
        shown = np.ascontiguousarray(image[:, ::-1]) if flipped else image
        wanted = module.pool(torch.from_numpy(to_input(shown, SPEC)[0]))
        assert np.array_equal(
            store.read("b.png", "flipped" if flipped else "features"), wanted.half().numpy()
        )
    module.seen.clear()
    again = store_features(teacher, tmp_path / "in", tmp_path / "out", flips=True)
    assert module.seen == [] and again.good == store.good


def test_a_job_that_was_killed_goes_on(tmp_path):
    write_images(tmp_path / "in", *(f"{n}.png" for n in range(6)))

    class Killed(Plain):
        def forward(self, x):
            if len(self.seen) == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        store_features(
            module_teacher(Killed(), SPEC), tmp_path / "in", tmp_path / "out",
            batch_size=1, shard_size=2,
        )  # fmt: skip
    assert Store(tmp_path / "out").good == ["0.png", "1.png"]
    module = Plain()
    store = store_features(
        module_teacher(module, SPEC, "Killed"), tmp_path / "in", tmp_path / "out", batch_size=4
    )
    assert module.seen == [4]  # the four that were missing
    whole = store_features(module_teacher(Plain(), SPEC), tmp_path / "in", tmp_path / "whole")
    assert store.good == whole.good
    assert all(
        np.array_equal(store.read(name, "features"), whole.read(name, "features"))
        for name in whole.good
    )


def test_features_that_fp16_cannot_hold_are_entries_with_a_reason(tmp_path):
    write_images(tmp_path / "in", "a.png")

    class Large(nn.Module):
        def forward(self, x):
            return x * 1e6

    store = store_features(module_teacher(Large(), SPEC), tmp_path / "in", tmp_path / "out")
    assert store.good == []
    assert "Large gave features that are not finite in fp16" in store.unreadable["a.png"]


def test_maps_must_have_one_shape(tmp_path):
    write_images(tmp_path / "in", "a.png")
    with pytest.raises(ValueError, match="image_spec has pad=False"):
        store_features(
            module_teacher(Plain(), ImageSpec.sam(32, pad=False)), tmp_path / "in", tmp_path / "out"
        )


LABELLED = ImageSpec.timm(16)
WEIGHT = torch.randn(3, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)) / 20


def answer(images):
    return images.flatten(1) @ WEIGHT.T


KEYS = ("seed", "probabilities", "classes")
LINEAR = Teacher(answer, LABELLED, "linear", "0" * 64)


@pytest.fixture
def images(tmp_path):
    return open_part(write_folder(tmp_path / "data", count=3))


def test_answers_are_those_of_the_view_that_the_seed_makes(tmp_path, images):
    store, broken = write_logits(tmp_path / "s", images, LINEAR, views=2, k=2, batch_size=4)
    assert not broken
    seen = set()
    for view in range(2):
        assert not store.missing(map(str, range(9)))
        for index in range(9):
            seed, probabilities, classes = (store.read(str(index), key)[view] for key in KEYS)
            seen.add(seed)
            image = decode(images.source(index))
            pixels = View(augmentation("light"), LABELLED)(image, np.random.default_rng(seed))
            wanted = answer(torch.from_numpy(pixels)[None]).softmax(1)[0]
            best = wanted.topk(2)
            assert classes.tolist() == best.indices.tolist()
            # kept in half precision
            np.testing.assert_allclose(probabilities, best.values.numpy(), rtol=1e-3, atol=1e-6)
    assert len(seen) == 18


def test_a_stopped_writing_goes_on_to_the_same_rows(tmp_path, images):
    whole, _ = write_logits(tmp_path / "whole", images, LINEAR, views=2, k=2, batch_size=2)
    calls = []

    def killed(images):
        calls.append(len(images))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return answer(images)

    teacher = Teacher(killed, LABELLED, "linear", "0" * 64)
    with pytest.raises(KeyboardInterrupt):
        write_logits(tmp_path / "parts", images, teacher, views=2, k=2, batch_size=2, shard_size=3)
    assert Store(tmp_path / "parts").good == [str(number) for number in range(6)]
    told = []
    parts, _ = write_logits(
        tmp_path / "parts", images, LINEAR, views=2, k=2, batch_size=4,
        progress=lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert told == [(16, 18), (18, 18)]
    for name in whole.good:
        for key in KEYS:
            np.testing.assert_array_equal(parts.read(name, key), whole.read(name, key))
    calls.clear()
    write_logits(tmp_path / "parts", images, teacher, views=2, k=2)
    assert calls == []  # nothing was left to do


@pytest.mark.parametrize("wrong", [{"views": 0}, {"k": 0}])
def test_wrong_numbers(tmp_path, images, wrong):
    with pytest.raises(ValueError, match=r"wants images and views|number of classes, 3"):
        write_logits(tmp_path / "s", images, LINEAR, **wrong)


def test_another_teacher_does_not_write_on(tmp_path, images):
    write_logits(tmp_path / "s", images, LINEAR, views=1)
    other = Teacher(answer, LABELLED, "linear", "1" * 64)
    with pytest.raises(StoreMismatchError, match=r"teacher_sha256 is '000.* there and '111"):
        write_logits(tmp_path / "s", images, other, views=1)


def test_broken_images_are_named_and_have_no_answer(tmp_path, images):
    (tmp_path / "data" / images.name(4)).write_bytes(b"")
    store, broken = write_logits(tmp_path / "s", images, LINEAR, views=1)
    assert list(broken) == [images.name(4)]
    assert store.missing(map(str, range(9))) == ["4"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: answer(x)[:, :2], r"linear gave \[9, 2\], wanted \[9, 3\]"),
        (lambda x: answer(x) * float("nan"), "not finite"),
    ],
)
def test_a_teacher_that_answers_wrongly(tmp_path, images, wrong, words):
    with pytest.raises(ValueError, match=words):
        write_logits(tmp_path / "s", images, Teacher(wrong, LABELLED, "linear", ""), views=1)


def test_a_checkpoint_as_a_teacher(tmp_path, make_tiny_vit, images):
    model = tiny_classifier(make_tiny_vit)
    path = save_classifier(model, tmp_path / "t.safetensors", images.classes)
    teacher = open_teacher(path, device="cpu", gives="logits")
    assert teacher.image_spec == model.image_spec
    x = torch.randn(2, 3, 16, 16)
    # with and without gradients other kernels may run
    torch.testing.assert_close(teacher(x), model(x))
    model.head.bias.data += 1
    other = save_classifier(model, tmp_path / "u.safetensors", images.classes)
    assert teacher.sha256 != open_teacher(other, gives="logits").sha256
    folder = tinyvit.save_pretrained(model, tmp_path / "folder")
    assert len(open_teacher(folder, gives="logits").sha256) == 64
    with pytest.raises(CheckpointError, match="no classification head"):
        open_teacher("tinyvit_sam_2m", gives="logits")


def test_onnx_wants_to_be_told_the_preparation(tmp_path):
    with pytest.raises(ValueError, match="give image_spec"):
        open_teacher(tmp_path / "t.onnx", gives="logits")


def test_an_onnx_file_as_a_teacher(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, numbers = onnx.helper, onnx.numpy_helper
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["f"], axis=1),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])],
        [numbers.from_array(np.ascontiguousarray(WEIGHT.T.numpy()), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "t.onnx"
    path.write_bytes(model.SerializeToString())
    teacher = open_teacher(path, LABELLED, gives="logits")
    x = torch.randn(2, 3, 16, 16)
    # the same product, summed in another order
    torch.testing.assert_close(teacher(x), answer(x), rtol=1e-4, atol=1e-4)
