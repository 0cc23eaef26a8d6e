import importlib.util
import json
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tinyvit
from tinyvit.checkpoints.files import (
    CLASSES,
    IMAGE_SPEC,
    classes_in,
    read_state_dict,
    write_state_dict,
)
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.image_spec import ImageSpec
from tinyvit.train import TrainSettings, train
from tinyvit.train.data.images import open_data_set
from tinyvit.train.tasks.classify import (
    Classify,
    ClassifySettings,
    build_classifier,
    load_classifier,
    make_task,
    mix,
    save_classifier,
    spec_of,
    windows_for,
)

from .tiny_images import png, tiny_classifier, write_folder
from .toy_task import interrupt


@pytest.fixture
def task(tmp_path, make_tiny_vit):
    def make(**changes):
        folder = tmp_path / "data"
        if not folder.exists():
            write_folder(folder)
        data = open_data_set(folder, val_part=0.25)
        model = changes.pop("model", None) or tiny_classifier(make_tiny_vit)
        return Classify(model, data, ClassifySettings("", **{"smoothing": 0.0, **changes}))

    return make


def samples_of(task, count=4):
    return [task.sample(i, np.random.default_rng([0, i])) for i in range(count)]


def test_a_sample_is_a_pure_function_of_index_and_generator(task):
    one = pickle.loads(pickle.dumps(task()))  # as in a worker process
    torch.manual_seed(1)
    np.random.seed(1)
    first = one.sample(3, np.random.default_rng(7))
    one.sample(5, np.random.default_rng(8))
    again = task().sample(3, np.random.default_rng(7))
    np.testing.assert_array_equal(first["images"], again["images"])
    assert first["labels"] == again["labels"] == task().data.train.labels[3]
    other = task().sample(3, np.random.default_rng(9))
    assert not np.array_equal(first["images"], other["images"])


def test_a_batch_and_its_loss(task):
    one = task()
    batch = one.collate(samples_of(one))
    assert batch["images"].shape == (4, 3, 16, 16)
    assert batch["labels"].tolist() == one.data.train.labels[:4].tolist()
    loss, figures = one.loss(one.model, batch, torch.Generator())
    logits = one.model(batch["images"])
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["labels"]))
    assert (loss.dtype, loss.ndim) == (torch.float32, 0)
    hits = (logits.argmax(1) == batch["labels"]).float().mean()
    assert figures["train_top1"] == hits
    assert not figures["train_top1"].requires_grad


def test_mixing_takes_its_chance_from_the_generator(task):
    one = task(mixup=0.8, cutmix=1.0, smoothing=0.1)
    batch = one.collate(samples_of(one))
    losses = {
        float(one.loss(one.model, batch, torch.Generator().manual_seed(s))[0].detach())
        for s in (1, 1, 2)
    }
    assert len(losses) == 2


def test_gradients_agree_with_double_precision(task, make_tiny_vit):
    # one block of each kind; differences by 1e-6 in float64 leave an error of about 1e-8
    model = tiny_classifier(
        make_tiny_vit, embed_dims=(4, 6), depths=(1, 1), num_heads=(1, 2), window_sizes=(2, 2),
        strides=(2,),
    ).double()  # fmt: skip
    one = task(model=model, smoothing=0.1, mixup=0.8)
    batch = one.collate(samples_of(one, 2))
    batch["images"] = batch["images"].double()
    names = (
        "patch_embed.seq.0.c.weight",
        "layers.0.blocks.0.conv2.bn.weight",
        "layers.1.blocks.0.attn.attention_biases",
        "layers.1.blocks.0.mlp.norm.bias",
        "norm_head.weight",
        "head.bias",
    )
    own = {name: p for name, p in model.named_parameters() if name in names}
    assert len(own) == len(names)

    def loss(*values):
        def run(images):
            changed = dict(zip(own, values, strict=True))
            return torch.func.functional_call(model, changed, (images,))

        return one.loss(run, batch, torch.Generator().manual_seed(3))[0]

    inputs = [p.detach().clone().requires_grad_(True) for p in own.values()]
    assert torch.autograd.gradcheck(loss, inputs)


def test_validation_is_what_the_engine_says(task):
    one = task()
    figures = one.validate(one.model)
    engine = tinyvit.Engine(one.model)
    logits = engine.classify([one.data.val.source(i) for i in range(3)])
    labels = torch.from_numpy(one.data.val.labels)
    assert figures["top1"] == float((logits.argmax(1) == labels).float().mean())
    # the engine folds norms into weights: float32 rounding of another order
    assert figures["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-4)
    assert "top5" not in figures  # of three classes it is always 1
    assert one.goal[0] in figures


def test_top5_with_more_classes(tmp_path, make_tiny_vit):
    data = open_data_set(write_folder(tmp_path, "abcdefg", count=2), val_part=0.5)
    model = tiny_classifier(make_tiny_vit, classes=7)
    figures = Classify(model, data, ClassifySettings("", val_batch_size=3)).validate(model)
    logits = tinyvit.Engine(model).classify([data.val.source(i) for i in range(7)])
    best = logits.topk(5, dim=1).indices
    assert figures["top5"] == np.float32(np.mean([i in best[i] for i in range(7)]))


def test_the_batch_size_of_validation_changes_nothing(task):
    a, b = (one.validate(one.model) for one in (task(val_batch_size=n) for n in (2, 64)))
    assert a["top1"] == b["top1"]
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)  # sums in another order


def test_broken_images_are_counted_and_named(task, tmp_path):
    one = task()
    victim = one.data.train.name(0)
    (tmp_path / "data" / victim).write_bytes(b"")
    held = one.data.val.name(1)
    (tmp_path / "data" / held).write_bytes(b"nonsense")
    batch = one.collate(samples_of(one, 2))
    assert batch["images"].shape[0] == 2
    one.loss(one.model, batch, torch.Generator())
    assert list(one.broken) == [victim]
    one.validate(one.model)
    assert set(one.broken) == {victim, held}
    assert "0 bytes" in one.broken[victim]


def test_a_broken_image_may_be_an_error(task, tmp_path):
    one = task(on_broken="error")
    (tmp_path / "data" / one.data.train.name(0)).write_bytes(b"")
    (tmp_path / "data" / one.data.val.name(1)).write_bytes(b"nonsense")
    with pytest.raises(ImageError, match=one.data.train.name(0)):
        one.sample(0, np.random.default_rng(0))
    with pytest.raises(ImageError, match=one.data.val.name(1)):
        one.validate(one.model)


def test_nothing_to_validate_on(task, tmp_path):
    one = task()
    for i in range(len(one.data.val)):
        (tmp_path / "data" / one.data.val.name(i)).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image to validate on can be read; ant/.*0 bytes"):
        one.validate(one.model)


def test_grey_and_transparent_and_tiny_images(task, tmp_path):
    one = task()
    kinds = (
        np.zeros((1, 1), np.uint8),
        np.full((5, 3, 4), 100, np.uint8),
        np.zeros((40, 9, 3), np.uint8),
    )
    for i, pixels in enumerate(kinds):
        (tmp_path / "data" / one.data.train.name(i)).write_bytes(png(pixels))
    batch = one.collate(samples_of(one, 3))
    assert batch["images"].shape == (3, 3, 16, 16)
    assert not batch["broken"]


def test_save_takes_a_tinyvit(task, tmp_path):
    one = task()
    one.save(one.model, tmp_path / "a.safetensors")
    assert classes_in(read_state_dict(tmp_path / "a.safetensors").metadata) == ("ant", "bee", "cat")
    with pytest.raises(TypeError, match="wanted a TinyViT to save, got Linear"):
        one.save(torch.nn.Linear(1, 1), tmp_path / "b.safetensors")


def test_make_task_puts_it_together(tmp_path):
    folder = write_folder(tmp_path / "data")
    settings = ClassifySettings(str(folder), img_size=32, augment="none", mixup=0.2, val_part=0.5)
    one = make_task(settings)
    assert (len(one), len(one.data.val)) == (6, 6)
    assert one.view.spec == ImageSpec.timm(32)
    assert (one.settings.mixup, one.settings.smoothing) == (0.2, 0.1)
    assert one.model.num_classes == 3
    starter = tinyvit.create_model(checkpoint="tinyvit_sam_2m").state_dict()
    key = "layers.0.blocks.0.conv1.c.weight"
    assert torch.equal(one.model.state_dict()[key], starter[key])
    by_chance = make_task(replace(settings, model="tiny_vit_2m_sam"))
    assert not torch.equal(by_chance.model.state_dict()[key], starter[key])


def test_one_class_and_one_image(tmp_path):
    with pytest.raises(ValueError, match="only one class, 'ant'"):
        make_task(ClassifySettings(str(write_folder(tmp_path / "a", ("ant",)))))
    with pytest.raises(ValueError, match="1 images and no class with more than one"):
        make_task(ClassifySettings(str(write_folder(tmp_path / "b", ("ant",), count=1))))


def test_a_model_that_does_not_say_how(make_tiny_vit):
    with pytest.raises(ValueError, match=r"set model\.image_spec"):
        spec_of(make_tiny_vit())


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    data = open_data_set(write_folder(tmp_path / "data", count=3), val_part=0.34)
    reached = []
    for name, stops in (("whole", ()), ("parts", (2,))):
        for stop in (*stops, None):
            model = fresh_classifier()
            one = Classify(model, data, ClassifySettings("", mixup=0.8, cutmix=1.0))
            settings = TrainSettings(
                str(tmp_path / name), steps=4, batch_size=6, device="cpu", tensorboard=False
            )
            if stop is None:
                result = train(one, settings, resume=bool(stops))
            else:
                with pytest.raises(KeyboardInterrupt):
                    train(one, settings, report=stop_after(stop))
        reached.append(one.model.state_dict())
        assert classes_in(read_state_dict(result.last_weights).metadata) == ("ant", "bee", "cat")
    for key, tensor in reached[0].items():
        assert torch.equal(tensor, reached[1][key]), key


@pytest.mark.slow
def test_digits_are_learnt(tmp_path):
    """What docs/guides/classify.md says, without the command line around it."""
    pytest.importorskip("sklearn")
    place = Path(__file__).parents[2] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", place)
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    assert digits.write_digits(tmp_path / "digits") == 1797
    choices = ClassifySettings(str(tmp_path / "digits"), val_part=0.2, img_size=32, flip=False)
    settings = TrainSettings(
        str(tmp_path / "run"), epochs=25, batch_size=64, learning_rate=2e-3, warmup_steps=50,
        batch_stats="own", device="cpu",
    )  # fmt: skip
    result = train(make_task(choices), settings)
    assert result.metrics["top1"] >= 0.97


def fresh_classifier():
    torch.manual_seed(0)
    model = tinyvit.TinyViT(
        16, num_classes=3, embed_dims=(8, 12, 16), depths=(1, 1, 1), num_heads=(1, 2, 2),
        window_sizes=(2, 2, 2), strides=(2, 2), neck_dim=None, drop_path_rate=0.0,
    )  # fmt: skip
    model.image_spec = ImageSpec.timm(16)
    return model


def stop_after(step):
    def report(progress):
        if progress.step == step - 1 and progress.phase == "train":
            interrupt(signal.SIGTERM)

    return report


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
    model = build_classifier(NAMES, checkpoint="tinyvit_sam_2m", img_size=32)
    assert model.neck is None
    assert (model.strides, model.window_sizes) == ((2, 2, 2), (4, 4, 2, 1))
    assert model.image_spec == ImageSpec.timm(32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    starter = tinyvit.create_model(checkpoint="tinyvit_sam_2m").state_dict()
    own = model.state_dict()
    key = "layers.1.blocks.0.attn.qkv.weight"
    assert torch.equal(own[key], starter[key])
    assert own["layers.1.blocks.0.attn.attention_biases"].shape[1] == 16  # 4 x 4 offsets
    again = build_classifier(NAMES, checkpoint="tinyvit_sam_2m", img_size=32)
    assert torch.equal(again.head.weight, model.head.weight)  # its seed, not the global one
    other = build_classifier(NAMES, checkpoint="tinyvit_sam_2m", img_size=32, seed=1)
    assert not torch.equal(other.head.weight, model.head.weight)


def test_an_encoder_of_sam_3_becomes_a_classifier(tmp_path):
    model = build_classifier(NAMES, model="tiny_vit_5m_sam3", img_size=32)
    assert (model.neck, model.strides, model.image_spec) == (None, (2, 2, 2), ImageSpec.timm(32))
    again = tinyvit.from_pretrained(tinyvit.save_pretrained(model, tmp_path))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))


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
    assert names == classes_in(read_state_dict(path).metadata) == ("ant", "bée", "cat")
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
    assert classes_in(read_state_dict(path).metadata) is None


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
        load_classifier("tinyvit_sam_2m")


def test_the_file_is_plain_safetensors(tmp_path, make_tiny_vit):
    path = save_classifier(tiny_classifier(make_tiny_vit), tmp_path / "a.safetensors", NAMES)
    header = read_state_dict(path).metadata
    assert header["tinyvit.family"] == "tinyvit"
    assert header["tinyvit.strides"] == "2,2,2"
    assert json.loads(header[CLASSES]) == list(NAMES)


def batch(size=4, classes=3, side=8):
    images = torch.randn(size, 3, side, side)
    return images, torch.eye(classes)[torch.arange(size) % classes]


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_same_generator_gives_the_same_mixture():
    images, targets = batch()
    for both in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        first, again = (mix(images, targets, *both, chance(5)) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], mix(images, targets, *both, chance(6))[0])


def test_the_global_generator_is_not_touched():
    images, targets = batch()
    before = torch.get_rng_state()
    mix(images, targets, 0.8, 1.0, chance())
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_mixed_where_it_is_off():
    images, targets = batch()
    mixed = mix(images, targets, 0.0, 0.0, chance())
    assert mixed[0] is images
    assert mixed[1] is targets


def test_one_image_alone_is_left_as_it_is():
    images, targets = batch(1)
    assert mix(images, targets, 0.8, 1.0, chance())[0] is images


@given(st.integers(0, 10_000))
def test_mixup_is_linear_in_images_and_targets(seed):
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 5, 6)
    targets = torch.eye(4)
    mixed, soft = mix(images, targets, 0.8, 0.0, chance(seed))
    # each image is its number, so its mean must be the mean number under its target
    torch.testing.assert_close(mixed[:, 0, 0, 0], soft @ torch.arange(4.0))
    torch.testing.assert_close(soft.sum(1), torch.ones(4))


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9))
def test_cutmix_counts_the_pixels_that_are_seen(seed, height, width):
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, height, width)
    mixed, soft = mix(images, torch.eye(4), 0.0, 1.0, chance(seed))
    assert set(mixed.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    for image, target in zip(mixed, soft, strict=True):
        seen = torch.bincount(image[0].flatten().long(), minlength=4) / (height * width)
        torch.testing.assert_close(target, seen)  # float32 division both times


def test_both_take_turns():
    images, targets = batch(side=16)
    kinds = set()
    for seed in range(30):
        mixed, _ = mix(images, targets, 0.8, 1.0, chance(seed))
        kinds.add(bool((mixed == images).any()))  # cutmix leaves most pixels to the last bit
    assert kinds == {False, True}
