import json

import pytest
import torch

import tinyvit
from tinyvit.checkpoints.files import (
    CLASSES,
    IMAGE_SPEC,
    classes_in,
    read_header,
    read_state_dict,
    write_state_dict,
)
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec
from tinyvit.train.tasks.classify import (
    build_classifier,
    load_classifier,
    save_classifier,
    windows_for,
)

from .tiny_images import tiny_classifier

NAMES = ("ant", "bee", "cat")


def test_windows_follow_the_published_rows():
    for name in ("tiny_vit_5m_224", "tiny_vit_21m_384", "tiny_vit_21m_512"):
        row = tinyvit.catalog.get_variant(name)
        assert windows_for(row.img_size) == row.window_sizes


@pytest.mark.parametrize("size", [*range(1, 70), 96, 128, 200, 256, 320, 448, 640])
def test_no_window_is_larger_than_its_map(size):
    for reduction, window in zip((8, 16, 32), windows_for(size)[1:], strict=True):
        side = -(-size // reduction)
        assert 1 <= window <= side
        assert -(-side // window) * window - side < max(side / 2, 1)  # little is padded


def test_windows_want_a_size():
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        windows_for(0)


def test_a_sam_encoder_becomes_a_classifier():
    model = build_classifier(NAMES, checkpoint="tinyvit_starter", img_size=32)
    assert model.neck is None
    assert (model.strides, model.window_sizes) == ((2, 2, 2), (4, 4, 2, 1))
    assert model.image_spec == ImageSpec.timm(32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    starter = tinyvit.create_model(checkpoint="tinyvit_starter").state_dict()
    own = model.state_dict()
    key = "layers.1.blocks.0.attn.qkv.weight"
    assert torch.equal(own[key], starter[key])
    assert own["layers.1.blocks.0.attn.attention_biases"].shape[1] == 16  # 4 x 4 offsets
    again = build_classifier(NAMES, checkpoint="tinyvit_starter", img_size=32)
    assert torch.equal(again.head.weight, model.head.weight)  # its seed, not the global one
    other = build_classifier(NAMES, checkpoint="tinyvit_starter", img_size=32, seed=1)
    assert not torch.equal(other.head.weight, model.head.weight)


def test_a_variant_from_chance():
    before = torch.get_rng_state()
    model = build_classifier(NAMES, model="tiny_vit_2m_sam", img_size=64)
    assert torch.equal(before, torch.get_rng_state())
    assert (model.num_classes, model.strides, model.neck) == (3, (2, 2, 2), None)
    assert model.window_sizes == (8, 8, 4, 2)
    with pytest.raises(ValueError, match="wanted a model or a checkpoint"):
        build_classifier(NAMES)


def test_names_and_preparation_stay_in_the_file(tmp_path, make_tiny_vit):
    model = tiny_classifier(make_tiny_vit)
    path = save_classifier(model, tmp_path / "a.safetensors", ("ant", "bée", "cat"))
    loaded, names = load_classifier(path)
    assert names == classes_in(read_header(path)) == ("ant", "bée", "cat")
    assert loaded.image_spec == model.image_spec
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))
    assert tinyvit.create_model(checkpoint=path).num_classes == 3  # any other command


def test_more_or_fewer_names_than_classes(tmp_path, make_tiny_vit):
    with pytest.raises(ValueError, match="has 3 classes, but 1 names came"):
        save_classifier(tiny_classifier(make_tiny_vit), tmp_path / "a.safetensors", ("ant",))


def test_a_head_goes_on_only_for_the_same_classes(tmp_path, make_tiny_vit):
    model = tiny_classifier(make_tiny_vit)
    path = save_classifier(model, tmp_path / "a.safetensors", NAMES)
    same = build_classifier(NAMES, checkpoint=path)
    assert torch.equal(same.head.weight, model.head.weight)
    assert same.image_spec == model.image_spec
    for names in (("x", "y", "z"), ("x", "y")):
        other = build_classifier(names, checkpoint=path)
        assert other.num_classes == len(names)
        shared = min(len(names), 3)
        assert not torch.equal(other.head.weight[:shared], model.head.weight[:shared])
        assert torch.equal(
            other.state_dict()["patch_embed.seq.0.c.weight"],
            model.state_dict()["patch_embed.seq.0.c.weight"],
        )


def test_another_size_resizes_windows_and_tables(tmp_path, make_tiny_vit):
    model = tiny_classifier(make_tiny_vit)
    path = save_classifier(model, tmp_path / "a.safetensors", NAMES)
    larger = build_classifier(NAMES, checkpoint=path, img_size=64)
    assert larger.window_sizes == windows_for(64)
    assert (larger.image_spec.size, larger.image_spec.resize) == ((64, 64), "crop")
    assert larger(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    chosen = build_classifier(NAMES, checkpoint=path, img_size=64, window_sizes=(4, 4, 4, 2))
    assert chosen.window_sizes == (4, 4, 4, 2)


def test_a_folder_of_save_pretrained(tmp_path, make_tiny_vit):
    folder = tinyvit.save_pretrained(tiny_classifier(make_tiny_vit), tmp_path / "m")
    assert build_classifier(NAMES, checkpoint=folder).num_classes == 3


def test_a_torch_file_has_no_names(tmp_path, make_tiny_vit):
    path = tmp_path / "a.pt"
    write_state_dict(path, tiny_classifier(make_tiny_vit).state_dict(), "torch")
    assert classes_in(read_header(path)) is None


@pytest.mark.parametrize(
    "header, words",
    [
        ({CLASSES: "{"}, "tinyvit.classes in the header is damaged"),
        ({CLASSES: '["a", 1]'}, "must be a JSON list of names"),
        ({IMAGE_SPEC: "[]"}, "tinyvit.image_spec in the header is damaged"),
        ({IMAGE_SPEC: json.dumps({"size": [1, 1]})}, "tinyvit.image_spec in the header is damaged"),
    ],
)
def test_a_damaged_header(tmp_path, make_tiny_vit, header, words):
    path = tmp_path / "a.safetensors"
    tensors = tiny_classifier(make_tiny_vit).state_dict()
    write_state_dict(path, tensors, metadata={"tinyvit.family": "tinyvit", **header})
    with pytest.raises(CheckpointError, match=words):
        load_classifier(path)


def test_an_encoder_is_no_classifier():
    with pytest.raises(CheckpointError, match="no classification head; train one first"):
        load_classifier("tinyvit_starter")


def test_the_file_is_plain_safetensors(tmp_path, make_tiny_vit):
    path = save_classifier(tiny_classifier(make_tiny_vit), tmp_path / "a.safetensors", NAMES)
    header = read_state_dict(path).metadata
    assert header["tinyvit.family"] == "tinyvit"
    assert header["tinyvit.strides"] == "2,2,2"
    assert json.loads(header[CLASSES]) == list(NAMES)
