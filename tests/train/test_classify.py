import importlib.util
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tinyvit
from tinyvit.checkpoints.files import classes_in, read_header
from tinyvit.errors import ImageError
from tinyvit.image_spec import ImageSpec
from tinyvit.train import TrainSettings, train
from tinyvit.train.data.augment import View, augmentation
from tinyvit.train.data.images import open_data_set
from tinyvit.train.tasks.classify import (
    Classify,
    ClassifySettings,
    Mixing,
    make_task,
    spec_of,
    validate_classifier,
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
        return Classify(model, data, View(augmentation("light"), spec_of(model)), **changes)

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
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.label == again.label == task().data.train.labels[3]
    other = task().sample(3, np.random.default_rng(9))
    assert not np.array_equal(first.pixels, other.pixels)


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
    one = task(mixing=Mixing(0.8, 1.0), smoothing=0.1)
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
    one = task(model=model, smoothing=0.1, mixing=Mixing(0.8))
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
    figures, _ = validate_classifier(model, data.val, spec_of(model), batch_size=3)
    logits = tinyvit.Engine(model).classify([data.val.source(i) for i in range(7)])
    best = logits.topk(5, dim=1).indices
    assert figures["top5"] == np.float32(np.mean([i in best[i] for i in range(7)]))


def test_the_batch_size_of_validation_changes_nothing(task):
    one = task()
    a, b = (
        validate_classifier(one.model, one.data.train, spec_of(one.model), n)[0] for n in (2, 64)
    )
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
    assert classes_in(read_header(tmp_path / "a.safetensors")) == ("ant", "bee", "cat")
    with pytest.raises(TypeError, match="wanted a TinyViT to save, got Linear"):
        one.save(torch.nn.Linear(1, 1), tmp_path / "b.safetensors")


def test_make_task_puts_it_together(tmp_path):
    folder = write_folder(tmp_path / "data")
    settings = ClassifySettings(str(folder), img_size=32, augment="none", mixup=0.2, val_part=0.5)
    one = make_task(settings)
    assert (len(one), len(one.data.val)) == (6, 6)
    assert one.view.spec == ImageSpec.timm(32)
    assert (one.mixing.mixup, one.smoothing) == (0.2, 0.1)
    assert one.model.num_classes == 3
    starter = tinyvit.create_model(checkpoint="tinyvit_starter").state_dict()
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
            view = View(augmentation("light"), spec_of(model))
            one = Classify(model, data, view, Mixing(0.8, 1.0))
            settings = TrainSettings(
                str(tmp_path / name), steps=4, batch_size=6, device="cpu", tensorboard=False
            )
            if stop is None:
                result = train(one, settings, resume=bool(stops))
            else:
                with pytest.raises(KeyboardInterrupt):
                    train(one, settings, report=stop_after(stop))
        reached.append(one.model.state_dict())
        assert classes_in(read_header(result.last_weights)) == ("ant", "bee", "cat")
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
    assert result.figures["top1"] >= 0.97


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
