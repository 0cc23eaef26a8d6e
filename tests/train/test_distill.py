import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tinyvit
from tinyvit.image_spec import ImageSpec
from tinyvit.modules import TinyViT
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder, TwoWayTransformer
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.sam import build_sam
from tinyvit.sam.model import Sam
from tinyvit.train import TrainSettings, train
from tinyvit.train.data.images import open_data_set
from tinyvit.train.store import StoreMismatchError
from tinyvit.train.tasks.classify import Classify
from tinyvit.train.tasks.distill import (
    DistillFeaturesSettings,
    DistillLogits,
    Heads,
    Student,
    random_points,
)
from tinyvit.train.tasks.distill import make_features_task as make_task
from tinyvit.train.tasks.distill import make_task as make_run
from tinyvit.train.tasks.losses import soft_cross_entropy
from tinyvit.train.tasks.settings import DistillLogitsSettings
from tinyvit.train.tasks.teachers import Teacher, open_teacher, store_features, write_logits

from .test_losses import dense_distribution
from .tiny_images import tiny_classifier, write_folder

SPEC = ImageSpec.sam(32)


def tiny(seed=0, width=8, neck_dim=16, size=32):
    torch.manual_seed(seed)
    model = TinyViT(
        size, embed_dims=(width,) * 4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
        window_sizes=(7, 7, 7, 7), neck_dim=neck_dim, head=False,
    ).eval()  # fmt: skip
    model.image_spec = ImageSpec.sam(size)
    return model


def tiny_sam(encoder):
    torch.manual_seed(3)
    heads = MaskDecoder(
        transformer_dim=16, transformer=TwoWayTransformer(2, 16, 8, 2048), iou_head_hidden_dim=16
    )
    side = encoder.img_size // 16
    prompts = PromptEncoder(16, (side, side), (encoder.img_size,) * 2, 16)
    return Sam(encoder, prompts, heads).eval()


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(8):
        image = rng.integers(0, 256, (20, 32, 3) if n % 2 else (32, 24, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    return tmp_path


def stored(images, teacher=None, **more):
    teacher = open_teacher(tiny(seed=7) if teacher is None else teacher, device="cpu")
    return store_features(teacher, images, images / "features", **more)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_student_that_is_the_teacher_has_nothing_to_learn(images):
    teacher = tiny(seed=7)
    sam = tiny_sam(teacher)
    settings = DistillFeaturesSettings(held_out=0.4, mask_weight=1.0)
    task = make_task(copy.deepcopy(teacher), stored(images), images, settings, sam)
    assert len(task) + len(task.val_names) == 8
    with torch.no_grad():
        figures = task.validate(task.model)
        batch = task.collate([task.sample(i, rng()) for i in range(len(task))])
        loss, parts = task.loss(task.model, batch, torch.Generator())
    # what was stored is rounded to fp16: 5e-4 of values up to 3
    assert figures["cosine"] > 0.9999 and figures["cosine_centred"] > 0.999
    assert figures["mse"] < 1e-5 and parts["feature_loss"] < 1e-5
    assert figures["mask_iou"] > 0.97
    assert 0 < figures["cosine_floor"] < 0.9999
    assert loss == parts["feature_loss"] + parts["mask_loss"]


def test_figures_are_means_over_covered_cells_of_held_out_images(images):
    store = stored(images)
    student = tiny(seed=1)
    task = make_task(student, store, images, DistillFeaturesSettings(held_out=0.4))
    cosines, floors = [], []
    maps = [store.read(name, "features") for name in task.train_names]
    mean = torch.from_numpy(np.stack(maps)).float().mean(0)
    with torch.no_grad():
        for name in task.val_names:
            one = task._read(name, flip=False)
            found, wanted = (
                student(torch.from_numpy(one["images"])[None])[0],
                torch.from_numpy(one["features"]).float(),
            )
            height, width = one["placed"]
            for y in range(2):
                for x in range(2):
                    if (y + 0.5) / 2 < height and (x + 0.5) / 2 < width:
                        cosines.append(F.cosine_similarity(found[:, y, x], wanted[:, y, x], dim=0))
                        floors.append(F.cosine_similarity(mean[:, y, x], wanted[:, y, x], dim=0))
        figures = task.validate(student)
    # means in another order, in float32
    assert figures["cosine"] == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    assert figures["cosine_floor"] == pytest.approx(float(torch.stack(floors).mean()), abs=1e-5)
    assert "mask_iou" not in figures


def test_the_student_comes_nearer_to_the_teacher(images, tmp_path):
    task = make_task(tiny(seed=1, width=16), stored(images), images)
    settings = TrainSettings(
        folder=str(tmp_path / "run"), steps=15, batch_size=8, learning_rate=1e-2, device="cpu",
        tensorboard=False, batch_stats="own", validate_every=15, weight_decay=0.0, warmup_steps=2,
    )  # fmt: skip
    batch = task.collate([task.sample(i, rng()) for i in range(len(task))])
    task.model.train()
    with torch.no_grad():
        before, _ = task.loss(copy.deepcopy(task.model), batch, torch.Generator())
    result = train(task, settings)
    task.model.train()
    with torch.no_grad():
        after, _ = task.loss(task.model, batch, torch.Generator())
    assert float(after) < 0.8 * float(before)
    assert set(result.metrics) == {"cosine", "cosine_floor", "cosine_centred", "mse"}
    saved = tinyvit.create_model(None, result.last_weights)
    assert saved.embed_dims == (16,) * 4 and saved.neck_dim == 16


@pytest.mark.parametrize("loss", ["mse", "huber", "whitened", "cosine"])
def test_other_channels_and_another_grid_are_brought_together(images, tmp_path, loss):
    student = tiny(seed=1, neck_dim=4, size=64)
    task = make_task(student, stored(images), images, DistillFeaturesSettings(loss=loss))
    assert isinstance(task.model, Student)
    batch = task.collate([task.sample(i, rng()) for i in range(2)])
    assert batch["images"].shape == (2, 3, 64, 64) and batch["features"].shape == (2, 16, 2, 2)
    loss_value, _ = task.loss(task.model, batch, torch.Generator())
    loss_value.backward()
    assert all(p.grad is not None for p in task.model.adapter.parameters())
    with torch.no_grad():
        assert -1 <= task.validate(task.model.eval())["cosine"] <= 1
    task.save(task.model, tmp_path / "student.safetensors")
    kept = tinyvit.create_model(None, tmp_path / "student.safetensors")
    assert kept.neck_dim == 4  # the adapter is gone
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(kept(x), student.eval()(x))


def test_the_mask_s_loss_reaches_the_student_alone(images):
    sam = tiny_sam(tiny(seed=7))
    settings = DistillFeaturesSettings(mask_weight=2.0, points=3)
    student = tiny(seed=1, size=64)
    task = make_task(student, stored(images), images, settings, sam)
    batch = task.collate([task.sample(0, rng())])
    loss, parts = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    same, _ = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    other, _ = task.loss(task.model, batch, torch.Generator().manual_seed(1))
    assert loss == same != other
    assert torch.isclose(loss, parts["feature_loss"] + 2 * parts["mask_loss"])
    loss.backward()
    assert all(p.grad is None for p in sam.mask_decoder.parameters())
    assert student.patch_embed.seq[0].c.weight.grad.abs().sum() > 0


def test_with_heads_a_whole_sam_is_saved(images, tmp_path):
    teacher = tiny(seed=7)
    sam = tiny_sam(teacher)
    student = tiny(seed=1)
    task = make_task(student, stored(images), images, None, sam)
    task.save(task.model, tmp_path / "student.safetensors")
    whole = build_sam(tmp_path / "student.safetensors", img_size=32)
    for name, wanted in (("image_encoder", student), ("mask_decoder", sam.mask_decoder)):
        kept = getattr(whole, name).state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in wanted.state_dict().items())


def test_mirrored_images_go_with_mirrored_images_features(images):
    teacher = tiny(seed=7)
    task = make_task(copy.deepcopy(teacher), stored(images, flips=True), images)
    seen = set()
    for seed in range(8):
        one = task.sample(0, rng(seed))
        with torch.no_grad():
            # stored in fp16
            assert torch.allclose(
                teacher(torch.from_numpy(one["images"])[None])[0],
                torch.from_numpy(one["features"]).float(),
                atol=5e-3,
            )
        seen.add(round(float(one["images"].sum() + one["images"][0, 0, 0]), 3))
    assert len(seen) == 2
    plain = make_task(tiny(), store_features(open_teacher(teacher, device="cpu"), images,
                      images / "plain"), images)  # fmt: skip
    first, second = (plain.sample(0, rng(seed))["images"] for seed in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_workers_get_the_task_by_pickle(images):
    task = make_task(tiny(), stored(images), images)
    task.sample(0, rng())  # opens a file
    other = pickle.loads(pickle.dumps(task))
    np.testing.assert_array_equal(
        other.sample(1, rng())["features"], task.sample(1, rng())["features"]
    )


def test_images_that_changed_are_refused(images):
    store = stored(images)
    (images / "3.png").unlink()
    with pytest.raises(ValueError, match=r"1 images .* have changed .*: '3\.png'; store features"):
        make_task(tiny(), store, images)


def test_what_does_not_go_together_is_said(images):
    store = stored(images)
    student = tiny()
    student.image_spec = ImageSpec.timm(32)
    with pytest.raises(ValueError, match="prepare images alike"):
        make_task(student, store, images)
    student.image_spec = replace(SPEC, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))
    make_task(student, store, images)  # each normalises in its own way
    student.image_spec = ImageSpec.sam((32, 64))
    with pytest.raises(ValueError, match=r"student \(32, 64\) and teacher \(32, 32\)"):
        make_task(student, store, images)
    with pytest.raises(ValueError, match="mask_weight must be 0 without a SAM"):
        make_task(tiny(), store, images, DistillFeaturesSettings(mask_weight=1.0))
    other = store_features(open_teacher(tiny(neck_dim=4), device="cpu"), images, images / "other")
    with pytest.raises(ValueError, match="16 channels, but the teacher's have 4"):
        make_task(tiny(), other, images, None, tiny_sam(tiny()))
    without = tiny()
    without.image_spec = None
    make_task(without, store, images)
    assert without.image_spec == SPEC  # the teacher's way
    with pytest.raises(TypeError, match="wanted a TinyViT to save, got Identity"):
        make_task(tiny(), store, images).save(torch.nn.Identity(), images / "x.safetensors")


def test_points_lie_in_the_images():
    placed = torch.tensor([[1.0, 0.5], [0.25, 1.0]])
    points = random_points(placed, 200, torch.Generator().manual_seed(0))
    assert points.shape == (2, 200, 2)
    most = points.amax(1)
    assert bool((most <= placed.flip(1)).all()) and bool((most > 0.9 * placed.flip(1)).all())
    assert torch.equal(points, random_points(placed, 200, torch.Generator().manual_seed(0)))


def test_masks_are_those_of_the_model_at_the_same_place():
    sam = tiny_sam(tiny(size=64))
    embedding = torch.randn(2, 16, 4, 4)
    points = torch.tensor([[[0.5, 0.25]], [[0.125, 0.75]]])  # (x, y)
    masks = Heads(sam)(embedding, points)
    assert masks.shape == (8, 16, 16)
    for image in range(2):
        coords = points[image][None] * 64 - 0.5  # the model adds half a pixel
        sparse, dense = sam.prompt_encoder((coords, torch.ones(1, 1)), None, None)
        wanted, _ = sam.mask_decoder.predict_masks(
            embedding[image : image + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense
        )
        # one image alone and two together: sums in another order
        assert torch.allclose(masks[4 * image :][:4], wanted[0], atol=1e-5)


def test_gradients_flow_into_the_embedding_and_not_into_the_heads():
    sam = tiny_sam(tiny(size=64)).train()
    agreement = Heads(sam)
    embedding = torch.randn(1, 16, 4, 4, requires_grad=True)
    agreement(embedding, torch.rand(1, 3, 2)).square().sum().backward()
    assert embedding.grad is not None and embedding.grad.abs().sum() > 0
    heads = (*sam.prompt_encoder.parameters(), *sam.mask_decoder.parameters())
    assert all(p.grad is None and not p.requires_grad for p in heads)
    assert not sam.mask_decoder.training


def test_every_grid_will_do():
    agreement = Heads(tiny_sam(tiny(size=64)))
    flat = torch.randn(1, 16, 1, 1)
    points = torch.tensor([[[0.3, 0.6]]])
    fine = agreement(flat.expand(1, 16, 8, 8), points)
    assert fine.shape == (4, 32, 32)


def test_the_high_quality_decoder_is_refused():
    sam = tiny_sam(tiny())
    sam.mask_decoder = HQMaskDecoder(
        transformer_dim=16, transformer=TwoWayTransformer(2, 16, 2, 32), vit_dim=8
    )
    with pytest.raises(ValueError, match="early map beside the embedding"):
        Heads(sam)


@pytest.fixture
def data(tmp_path):
    return open_data_set(write_folder(tmp_path / "data", count=4), val_part=0.25)


@pytest.fixture
def teacher(make_tiny_vit):
    model = tiny_classifier(make_tiny_vit, seed=5)
    return Teacher(model, model.image_spec, "teacher", "5" * 64)


def distill_settings(store, augment="light", **changes):
    return DistillLogitsSettings("", logits=str(store), augment=augment, **changes)


@pytest.fixture
def logits_task(tmp_path, data, teacher, make_tiny_vit):
    def make(strength="light", size=16, **changes):
        store, _ = write_logits(tmp_path / "store", data.train, teacher, views=3, k=2)
        model = tiny_classifier(make_tiny_vit, size=size)
        return DistillLogits(model, data, distill_settings(store.folder, strength, **changes))

    return make


def batch_of(task, count=4):
    return task.collate([task.sample(i, np.random.default_rng([0, i])) for i in range(count)])


def test_a_sample_is_a_stored_view_with_its_answer(logits_task, teacher):
    one = logits_task()
    for index in range(4):
        made = one.sample(index, np.random.default_rng(index))
        again = one.sample(index, np.random.default_rng(index))
        np.testing.assert_array_equal(made["images"], again["images"])
        # teacher and student see the very same pixels, so asking again gives the stored answer
        with torch.inference_mode():
            chances = teacher(torch.from_numpy(made["images"])[None]).softmax(1)[0]
        best = chances.topk(2)
        assert made["classes"].tolist() == best.indices.tolist()
        # half precision
        np.testing.assert_allclose(made["probabilities"], best.values.numpy(), rtol=2e-3, atol=1e-6)


def test_each_image_is_seen_in_all_its_views(logits_task):
    one = logits_task()
    views = {one.sample(2, np.random.default_rng(seed))["images"].tobytes() for seed in range(40)}
    assert len(views) == 3


def test_the_loss_is_the_cross_entropy_with_the_teachers_distribution(logits_task):
    one = logits_task()
    batch = batch_of(one)
    loss, figures = one.loss(one.model, batch, torch.Generator())
    logits = one.model(batch["images"])
    dense = dense_distribution(batch["classes"], batch["probabilities"], 3)
    torch.testing.assert_close(loss, soft_cross_entropy(logits, dense))
    assert figures["as_teacher"] == (logits.argmax(1) == dense.argmax(1)).float().mean()
    assert set(figures) == {"train_top1", "as_teacher"}


def test_the_teacher_itself_has_little_left_to_learn(logits_task, teacher):
    one = logits_task()
    batch = batch_of(one)
    logits = teacher(batch["images"])
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    loss, _ = one.loss(teacher, batch, torch.Generator())
    # k is 2 of 3 classes, so the distribution is the teacher's own; half precision
    torch.testing.assert_close(loss, entropy, rtol=0, atol=5e-3)


def test_a_student_of_another_size_sees_the_same_view(logits_task):
    one = logits_task(size=32)
    assert one.sample(0, np.random.default_rng(0))["images"].shape == (3, 32, 32)


def test_measuring_and_saving_are_the_classifiers(logits_task, tmp_path):
    one = logits_task()
    plain = Classify(one.model, one.data, one.settings)
    assert one.validate(one.model) == plain.validate(one.model)
    one.save(one.model, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").is_file()
    assert (len(one), one.goal, one.name) == (9, ("top1", "max"), "distill-logits")


def test_answers_of_something_else_are_refused(logits_task, data):
    with pytest.raises(StoreMismatchError, match=r"augmentation is .* there and .* here"):
        logits_task("none")
    one = logits_task()
    with pytest.raises(StoreMismatchError, match=r"images is 9 there and 3 here; data is"):
        replace(one, data=replace(data, train=data.val))


def test_images_without_logits_are_named_and_replaced(logits_task, data):
    one = logits_task()
    del one.store.entries["4"]
    batch = one.collate([one.sample(4, np.random.default_rng(0))])
    one.loss(one.model, batch, torch.Generator())
    assert "without logits" in one.broken[data.train.name(4)]
    one.settings = replace(one.settings, on_broken="error")
    with pytest.raises(ValueError, match=r"without logits in .* call write_logits again"):
        one.sample(4, np.random.default_rng(0))


def test_make_task_opens_data_and_store(tmp_path, data, teacher):
    write_logits(tmp_path / "store", data.train, teacher, views=1)
    settings = distill_settings(tmp_path / "store", val_part=0.25, img_size=32)
    settings = replace(settings, data=str(tmp_path / "data"))
    assert len(make_run(settings)) == 9
    with pytest.raises(ValueError, match="holds no store"):
        make_run(replace(settings, logits=str(tmp_path)))
