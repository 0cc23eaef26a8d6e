from dataclasses import replace

import numpy as np
import pytest
import torch

from tinyvit.image_spec import ImageSpec
from tinyvit.train.data.augment import View, augmentation
from tinyvit.train.data.images import open_data_set
from tinyvit.train.store import StoreMismatchError
from tinyvit.train.tasks.classify import (
    Classify,
    ClassifySettings,
    dense_distribution,
    soft_cross_entropy,
)
from tinyvit.train.tasks.distill import DistillLogits
from tinyvit.train.tasks.distill import make_logits_task as make_task
from tinyvit.train.tasks.teachers import LogitTeacher as Teacher
from tinyvit.train.tasks.teachers import write_logits

from .tiny_images import tiny_classifier, write_folder


@pytest.fixture
def data(tmp_path):
    return open_data_set(write_folder(tmp_path / "data", count=4), val_part=0.25)


@pytest.fixture
def teacher(make_tiny_vit):
    model = tiny_classifier(make_tiny_vit, seed=5)
    return Teacher(model, model.image_spec, "teacher", "5" * 64)


@pytest.fixture
def task(tmp_path, data, teacher, make_tiny_vit):
    def make(strength="light", size=16, **changes):
        store, _ = write_logits(tmp_path / "store", data.train, teacher, views=3, k=2)
        model = tiny_classifier(make_tiny_vit, size=size)
        view = View(augmentation(strength), ImageSpec.timm(size))
        return DistillLogits(Classify(model, data, view, **changes), store)

    return make


def batch_of(task, count=4):
    return task.collate([task.sample(i, np.random.default_rng([0, i])) for i in range(count)])


def test_a_sample_is_a_stored_view_with_its_answer(task, teacher):
    one = task()
    for index in range(4):
        made = one.sample(index, np.random.default_rng(index))
        again = one.sample(index, np.random.default_rng(index))
        np.testing.assert_array_equal(made.pixels, again.pixels)
        # teacher and student see the very same pixels, so asking again gives the stored answer
        with torch.inference_mode():
            chances = teacher.answer(torch.from_numpy(made.pixels)[None]).softmax(1)[0]
        best = chances.topk(2)
        assert made.classes.tolist() == best.indices.tolist()
        # half precision
        np.testing.assert_allclose(made.probabilities, best.values.numpy(), rtol=2e-3, atol=1e-6)


def test_each_image_is_seen_in_all_its_views(task):
    one = task()
    views = {one.sample(2, np.random.default_rng(seed)).pixels.tobytes() for seed in range(40)}
    assert len(views) == 3


def test_the_loss_is_the_cross_entropy_with_the_teachers_distribution(task):
    one = task()
    batch = batch_of(one)
    loss, figures = one.loss(one.model, batch, torch.Generator())
    logits = one.model(batch["images"])
    dense = dense_distribution(batch["classes"], batch["probabilities"], 3)
    torch.testing.assert_close(loss, soft_cross_entropy(logits, dense))
    assert figures["as_teacher"] == (logits.argmax(1) == dense.argmax(1)).float().mean()
    assert set(figures) == {"train_top1", "as_teacher"}


def test_the_teacher_itself_has_little_left_to_learn(task, teacher):
    one = task()
    batch = batch_of(one)
    logits = teacher.answer(batch["images"])
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    loss, _ = one.loss(teacher.answer, batch, torch.Generator())
    # k is 2 of 3 classes, so the distribution is the teacher's own; half precision
    torch.testing.assert_close(loss, entropy, rtol=0, atol=5e-3)


def test_a_student_of_another_size_sees_the_same_view(task):
    one = task(size=32)
    assert one.sample(0, np.random.default_rng(0)).pixels.shape == (3, 32, 32)


def test_measuring_and_saving_are_the_classifiers(task, tmp_path):
    one = task()
    assert one.validate(one.model) == one.student.validate(one.model)
    one.save(one.model, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").is_file()
    assert (len(one), one.goal, one.name) == (9, ("top1", "max"), "distill-logits")
    assert one.model is one.student.model


def test_answers_of_something_else_are_refused(task, data):
    with pytest.raises(StoreMismatchError, match=r"augmentation is .* there and .* here"):
        task("none")
    one = task()
    other = replace(one.student, data=replace(data, train=data.val))
    with pytest.raises(StoreMismatchError, match=r"images is 9 there and 3 here; data is"):
        DistillLogits(other, one.store)


def test_images_without_an_answer_are_named_and_replaced(task, data):
    one = task()
    raw = bytearray((one.store.folder / "logits.bin").read_bytes())
    size = one.store.header.record.itemsize
    for view in range(3):
        raw[(view * 9 + 4) * size : (view * 9 + 5) * size] = bytes(size)
    (one.store.folder / "logits.bin").write_bytes(raw)
    batch = one.collate([one.sample(4, np.random.default_rng(0))])
    one.loss(one.model, batch, torch.Generator())
    assert "no answer to view" in one.broken[data.train.name(4)]
    one.student.on_broken = "error"
    with pytest.raises(ValueError, match=r"without an answer in .* call write_logits again"):
        one.sample(4, np.random.default_rng(0))


def test_make_task(tmp_path, data, teacher):
    write_logits(tmp_path / "store", data.train, teacher, views=1)
    settings = ClassifySettings(str(tmp_path / "data"), val_part=0.25, img_size=32)
    one = make_task(settings, tmp_path / "store")
    assert (one.student.smoothing, len(one)) == (0.0, 9)
    with pytest.raises(ValueError, match=r"mixup=0\.8 and cutmix=0\.0 cannot be used here"):
        make_task(replace(settings, mixup=0.8), tmp_path / "store")
    with pytest.raises(ValueError, match="holds no store"):
        make_task(settings, tmp_path)
