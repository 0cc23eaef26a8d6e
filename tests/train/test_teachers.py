import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import to_tensor
from tinyvit.inference.graph_backend import export_onnx
from tinyvit.modules import TinyViT
from tinyvit.train.store import FeatureStore
from tinyvit.train.tasks.teachers import (
    ModuleTeacher,
    OnnxTeacher,
    TinyViTTeacher,
    list_images,
    open_teacher,
    store_features,
)
from tinyvit.train.tasks.teachers import tensor_fingerprint as fingerprint

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
    assert teacher.sha256 == fingerprint(model.state_dict())


def test_a_model_that_cannot_teach_is_refused():
    model = tiny()
    model.image_spec = None
    with pytest.raises(ValueError, match="no image_spec"):
        TinyViTTeacher(model)
    model.neck = None
    with pytest.raises(ValueError, match="no neck"):
        TinyViTTeacher(model)


def test_a_checkpoint_s_name_is_a_teacher():
    teacher = open_teacher("tinyvit_starter", device="cpu")
    assert teacher.name == "tinyvit_starter" and teacher.image_spec == ImageSpec.sam(256)
    assert teacher(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 4, 4)
    smaller = open_teacher("tinyvit_starter", ImageSpec.sam(128), device="cpu")
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
        OnnxTeacher(tmp_path / "none.onnx", SPEC)


def test_tokens_become_maps():
    tokens = torch.randn(2, 4 + 16, 7)
    spec = ImageSpec.sam(16)

    class Tokens(nn.Module):
        def forward(self, x):
            return SimpleNamespace(last_hidden_state=tokens)

    found = ModuleTeacher(Tokens(), spec)(torch.zeros(2, 3, 16, 16))
    assert found.shape == (2, 7, 4, 4)
    assert torch.equal(found[1, :, 2, 3], tokens[1, 4 + 2 * 4 + 3])
    last = ModuleTeacher(nn.Identity(), spec, channels_last=True)(torch.randn(1, 2, 3, 5))
    assert last.shape == (1, 5, 2, 3)
    with pytest.raises(ValueError, match=r"Identity gave \[1, 30\]; wanted a map"):
        ModuleTeacher(nn.Identity(), spec)(torch.randn(1, 30))
    with pytest.raises(ValueError, match=r"wanted a map .* or tokens"):
        ModuleTeacher(nn.Identity(), spec)(torch.randn(1, 24, 3))


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

        def forward_features(self, x):
            return x.permute(0, 2, 3, 1)

    fake = SimpleNamespace(create_model=lambda name, pretrained, num_classes: Swin())
    monkeypatch.setitem(sys.modules, "timm", fake)
    teacher = open_teacher("timm:swin", device="cpu")
    assert teacher.image_spec.size == (8, 8) and teacher.image_spec.shorter_side == 10
    assert teacher.image_spec.std == (63.75, 127.5, 255.0)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(teacher(x), x)


def test_a_sam_of_transformers_teaches_by_its_vision_encoder(monkeypatch):
    model = SimpleNamespace(vision_encoder=nn.Identity())
    fake = SimpleNamespace(AutoModel=SimpleNamespace(from_pretrained=lambda name: model))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    teacher = open_teacher("hf:facebook/sam-vit-base", ImageSpec.sam(16), device="cpu")
    assert teacher(torch.ones(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="give image_spec"):
        open_teacher("hf:facebook/sam-vit-base", device="cpu")


def test_images_are_found_below_a_folder(tmp_path):
    write_images(tmp_path, "b.png", "deep/er/a.JPG")
    (tmp_path / "notes.txt").touch()
    assert list_images(tmp_path) == ["b.png", "deep/er/a.JPG"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images below"):
        list_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder"):
        list_images(tmp_path / "b.png")


def test_features_are_stored_once_and_are_the_teacher_s(tmp_path):
    write_images(tmp_path / "in", "a.png", "b.png", "c.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    module, told = Plain(), []
    teacher = ModuleTeacher(module, SPEC)
    store = store_features(
        teacher, tmp_path / "in", tmp_path / "out", flips=True, batch_size=2, shard_size=3,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert store.good == ["a.png", "b.png", "c.png"]
    assert "bad.png" in store.broken["bad.png"]
    assert told == [(2, 4), (3, 4), (4, 4)]
    assert module.seen == [2, 2, 1, 1]  # each batch as it is and mirrored; the broken one not
    image = np.array(Image.open(tmp_path / "in" / "b.png"))
    for flipped in (False, True):
        shown = np.ascontiguousarray(image[:, ::-1]) if flipped else image
        wanted = module.pool(to_tensor(shown, SPEC)[0])
        assert torch.equal(store.read("b.png", flipped), wanted.half())
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
            ModuleTeacher(Killed(), SPEC), tmp_path / "in", tmp_path / "out",
            batch_size=1, shard_size=2,
        )  # fmt: skip
    assert FeatureStore(tmp_path / "out").good == ["0.png", "1.png"]
    module = Plain()
    store = store_features(
        ModuleTeacher(module, SPEC, "Killed"), tmp_path / "in", tmp_path / "out", batch_size=4
    )
    assert module.seen == [4]  # the four that were missing
    whole = store_features(ModuleTeacher(Plain(), SPEC), tmp_path / "in", tmp_path / "whole")
    assert store.good == whole.good
    assert all(torch.equal(store.read(name), whole.read(name)) for name in whole.good)


def test_features_that_fp16_cannot_hold_are_entries_with_a_reason(tmp_path):
    write_images(tmp_path / "in", "a.png")

    class Large(nn.Module):
        def forward(self, x):
            return x * 1e6

    store = store_features(ModuleTeacher(Large(), SPEC), tmp_path / "in", tmp_path / "out")
    assert store.good == []
    assert "Large gave features that are not finite in fp16" in store.broken["a.png"]


def test_maps_must_have_one_shape(tmp_path):
    write_images(tmp_path / "in", "a.png")
    with pytest.raises(ValueError, match="image_spec has pad=False"):
        store_features(
            ModuleTeacher(Plain(), ImageSpec.sam(32, pad=False)), tmp_path / "in", tmp_path / "out"
        )
