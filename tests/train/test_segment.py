import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvit.errors import ImageError
from tinyvit.image_spec import ImageSpec
from tinyvit.sam.model import build_sam
from tinyvit.train.data.masks import open_mask_set
from tinyvit.train.tasks import segment
from tinyvit.train.tasks.segment import Objects, Segment, SegmentSettings, make_task, save_sam
from tinyvit.train.tasks.teachers import open_maps

from .shapes import write_shapes


def learn(task, steps, lr, batch=2):
    """The plainest loop: the same few images, over and over; the losses."""
    moving = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=lr)
    found = []
    for step in range(steps):
        rng = np.random.default_rng([0, step])
        samples = [task.sample((step * batch + i) % len(task), rng) for i in range(batch)]
        generator = torch.Generator().manual_seed(step)
        loss, _ = task.loss(task.model, task.collate(samples), generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimiser.step()
        found.append(loss.item())
    return found


@pytest.fixture
def data(tmp_path):
    return open_mask_set(write_shapes(tmp_path, 2))


@pytest.fixture
def tiny_task(make_tiny_sam, data):
    return task_of(make_tiny_sam(64), data, objects=2, corrective_share=0.2)


def task_of(sam, data, **choices):
    settings = {"augment": "none", "least_pixels": 4, **choices}
    return Segment(sam, data, data, SegmentSettings("", **settings))


def change(task, **choices):
    task.settings = replace(task.settings, **choices)


def test_a_sample_depends_on_its_chance_alone(tiny_task):
    one, two = (tiny_task.sample(1, np.random.default_rng(3)) for _ in range(2))
    torch.testing.assert_close(one["images"], two["images"], rtol=0, atol=0)
    np.testing.assert_array_equal(one["points"], two["points"])
    other = tiny_task.sample(1, np.random.default_rng(4))
    assert not np.array_equal(one["boxes"], other["boxes"])


def test_clicks_lie_in_their_objects(tiny_task):
    sample = tiny_task.sample(0, np.random.default_rng(0))
    for mask, (x, y) in zip(sample["masks"], sample["points"], strict=True):
        assert mask[int(y), int(x)]


def test_the_task_can_go_to_other_processes(tiny_task):
    task = pickle.loads(pickle.dumps(tiny_task))
    sample = task.sample(0, np.random.default_rng(0))
    np.testing.assert_array_equal(
        sample["points"], tiny_task.sample(0, np.random.default_rng(0))["points"]
    )


def test_a_step_depends_on_its_chance_alone(tiny_task):
    batch = tiny_task.collate([tiny_task.sample(i, np.random.default_rng(i)) for i in (0, 1)])
    losses = [
        tiny_task.loss(tiny_task.model, batch, torch.Generator().manual_seed(seed))[0].item()
        for seed in (7, 7, 8)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_every_part_learns(tiny_task):
    change(tiny_task, box_share=0.5, corrective_share=1.0)
    batch = tiny_task.collate([tiny_task.sample(i, np.random.default_rng(i)) for i in (0, 1)])
    for seed in range(4):  # clicks and boxes both come
        tiny_task.loss(tiny_task.model, batch, torch.Generator().manual_seed(seed))[0].backward()
    for name, part in tiny_task.model.named_children():
        grads = [p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None]
        assert sum(grads) > 0, name


def test_a_tiny_model_learns_simple_shapes(tiny_task):
    tiny_task.model.train()
    before = tiny_task.validate(tiny_task.model.eval())
    losses = learn(tiny_task, 60, 3e-3)
    after = tiny_task.validate(tiny_task.model.eval())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    assert after["mean_iou"] > before["mean_iou"] + 0.2


def test_kept_embeddings_give_the_same_loss(tiny_task):
    tiny_task.model.image_encoder.requires_grad_(False)
    batch = tiny_task.collate([tiny_task.sample(i, np.random.default_rng(i)) for i in (0, 1)])

    def loss():
        return tiny_task.loss(tiny_task.model, batch, torch.Generator().manual_seed(0))[0].item()

    plain = loss()
    change(tiny_task, cached_features=1)
    assert loss() == plain
    assert list(tiny_task._kept) == [0]
    assert loss() == pytest.approx(plain, rel=1e-5)  # the other image is encoded in a batch of 1


def test_embeddings_of_a_learning_encoder_are_not_kept(tiny_task):
    change(tiny_task, cached_features=4)
    batch = tiny_task.collate([tiny_task.sample(0, np.random.default_rng(0))])
    with pytest.raises(ValueError, match="cached_features must be 0 where the encoder is trained"):
        tiny_task.loss(tiny_task.model, batch, torch.Generator())


def test_a_broken_image_is_replaced_and_named(tiny_task, data):
    data[0].image.write_bytes(b"\x89PNG broken")
    batch = tiny_task.collate([tiny_task.sample(0, np.random.default_rng(0))])
    tiny_task.loss(tiny_task.model, batch, torch.Generator())
    assert list(tiny_task.broken) == [data[0].name]
    change(tiny_task, on_broken="error")
    with pytest.raises(ImageError, match=data[0].name):
        tiny_task.sample(0, np.random.default_rng(0))


def test_data_of_which_nothing_can_be_read(tiny_task, data):
    for scene in data:
        scene.image.write_bytes(b"")
    with pytest.raises(ImageError, match="20 images drawn in a row are unreadable"):
        tiny_task.sample(0, np.random.default_rng(0))


def test_what_is_saved_loads_anywhere(tmp_path):
    sam = build_sam("tinyvit_sam_2m")
    sam.thresholds = {"mask_threshold": 0.25}
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight.add_(1)
    loaded = build_sam(save_sam(sam, tmp_path / "model.safetensors"))
    assert loaded.thresholds == {"mask_threshold": 0.25}
    assert loaded.image_encoder.image_spec.size == (256, 256)
    for name, value in sam.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def spoil(module, share):
    """Add noise to every matrix, a share of its own spread."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * share)


def test_a_spoilt_decoder_gets_better_on_a_few_images(tmp_path):
    folder = write_shapes(tmp_path, 2, size=(120, 160))
    settings = SegmentSettings(
        str(folder), str(folder), augment="none", objects=2, corrective_share=0.2
    )
    with pytest.warns(UserWarning, match="2 of 2 images .* the same is trained and validated on"):
        task = make_task(settings)
    task.model.image_encoder.requires_grad_(False)
    change(task, cached_features=2)
    spoil(task.model.mask_decoder, 0.8)  # the shipped one is good at shapes already
    before = task.validate(task.model)
    learn(task, 10, 5e-4)
    after = task.validate(task.model)
    assert after["mean_iou"] > before["mean_iou"] + 0.1


def test_one_image_is_learnt_from_and_measured_on(tmp_path):
    with pytest.warns(UserWarning, match="only one image: it is trained and validated on"):
        task = make_task(SegmentSettings(str(write_shapes(tmp_path, 1))))
    assert len(task) == len(task.val) == 1


def test_what_was_left_out_is_said(tmp_path):
    folder = write_shapes(tmp_path, 3)
    Image.new("L", (5, 5), 255).save(folder / "masks" / "image0_9.png")
    with pytest.warns(UserWarning, match="skipped 1: .*image0.png, image0_9.png"):
        task = make_task(SegmentSettings(str(folder)))
    assert len(task) == 2
    with pytest.raises(ValueError, match="5 x 5 pixels"):
        make_task(SegmentSettings(str(folder), on_broken="error"))


def test_wrong_choices(tmp_path):
    folder = str(write_shapes(tmp_path, 2))
    with pytest.raises(ValueError, match="augment must be one of none, full"):
        make_task(SegmentSettings(folder, augment="some"))
    with pytest.raises(ValueError, match="cached_features must be 0 without augment='none'"):
        SegmentSettings(folder, cached_features=3)
    with pytest.raises(ValueError, match="objects must be at least 1"):
        make_task(SegmentSettings(folder, objects=0))
    with pytest.raises(ValueError, match="box_share must be at least 0 and at most 1, got 2"):
        SegmentSettings(folder, box_share=2)
    with pytest.raises(ValueError, match="most_corrections must be at least 1"):
        SegmentSettings(folder, most_corrections=0)
    with pytest.raises(ValueError, match="focal must be above 0 where dice and embedding are 0"):
        SegmentSettings(folder, focal=0, dice=0)
    with pytest.raises(ValueError, match="dice must be at least 0"):
        SegmentSettings(folder, dice=-1)


def test_another_size_is_kept_in_the_file(tmp_path):
    sam = build_sam("tinyvit_sam_2m", img_size=128)
    path = save_sam(sam, tmp_path / "small.safetensors")
    again = build_sam(path)
    assert again.image_encoder.image_spec == sam.image_encoder.image_spec
    assert again.prompt_encoder.input_image_size == (128, 128)


def test_few_objects_come_again_with_other_prompts(make_tiny_sam, data):
    sample = task_of(make_tiny_sam(64), data, objects=5).sample(0, np.random.default_rng(0))
    assert sample["masks"].shape == (5, 64, 64)
    assert sample["sizes"] == (48, 64)
    assert not sample["masks"][:, 48:].any()
    assert len(np.unique(sample["masks"].reshape(5, -1), axis=0)) == 2
    assert len(np.unique(sample["boxes"], axis=0)) == 5


def test_small_objects_are_skipped_where_larger_ones_are(make_tiny_sam, data):
    task = task_of(make_tiny_sam(64), data, objects=4)
    areas = data[0].load()[1].sum((1, 2))
    change(task, least_pixels=int(areas.mean()))
    sample = task.sample(0, np.random.default_rng(0))
    assert set(sample["masks"].sum((1, 2))) == {areas.max()}
    change(task, least_pixels=10**6)
    assert task.sample(0, np.random.default_rng(0))["masks"].any((1, 2)).all()


def test_a_batch_has_the_images_first(make_tiny_sam, data):
    task = task_of(make_tiny_sam(32), data, augment="full", objects=3)
    batch = task.collate([task.sample(i, np.random.default_rng(i)) for i in (0, 1)])
    shapes = {name: tuple(v.shape) for name, v in batch.items() if name != "broken"}
    assert shapes == {
        "index": (2,),
        "images": (2, 3, 32, 32),
        "sizes": (2, 2),
        "masks": (2, 3, 32, 32),
        "points": (2, 3, 2),
        "boxes": (2, 3, 4),
    }
    assert batch["broken"] == {}


def test_images_that_are_cropped_are_refused(make_tiny_sam, data):
    sam = make_tiny_sam(64)
    sam.image_encoder.image_spec = ImageSpec.timm(224)
    with pytest.raises(ValueError, match="fitted by their longest side, not 'crop'"):
        task_of(sam, data)


class Soft:
    """Two images whose objects are probabilities; no box stands for the first object."""

    name, labels, boxed = "soft", ("one", "two"), np.array([False, True])

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self

    def load(self):
        y, x = np.mgrid[-1:1:64j, -1:1:64j].astype(np.float32)
        near = np.stack([np.hypot(x - at, y) for at in (-0.5, 0.5)])
        masks = np.clip(1.5 - 3 * near, 0, 1)
        return (masks.sum(0)[..., None] * (200, 90, 40)).astype(np.uint8), masks


def test_probabilities_are_targets(make_tiny_sam):
    task = task_of(make_tiny_sam(64), Soft(), objects=2)
    sample = task.sample(0, np.random.default_rng(0))
    wanted = Soft().load()[1]
    order = [int(np.isfinite(box).all()) for box in sample["boxes"]]  # the second has a box
    assert sorted(order) == [0, 1]
    np.testing.assert_allclose(sample["masks"], wanted[order], atol=1e-6)
    for mask, (x, y) in zip(sample["masks"], sample["points"], strict=True):
        assert mask[int(y), int(x)] > 0.5
    objects = Objects.of(task.model, (4, 4), task.collate([sample]))
    low_res = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(wanted[order]), 16)
    torch.testing.assert_close(objects.targets, low_res)


def test_probabilities_can_be_augmented(make_tiny_sam):
    task = task_of(make_tiny_sam(64), Soft(), objects=2, augment="full")
    masks = task.sample(0, np.random.default_rng(1))["masks"]
    assert masks.dtype == np.float32 and ((masks > 0.1) & (masks < 0.9)).any()


def test_no_box_where_none_may_be(make_tiny_sam, monkeypatch):
    task = task_of(make_tiny_sam(64), Soft(), objects=2, box_share=1.0)
    batch = task.collate([task.sample(0, np.random.default_rng(0))])
    seen = {}

    def learn(sam, features, objects, by_box, *rest):
        seen[by_box] = objects.boxes
        return {"total": torch.zeros(len(objects.rows))}

    monkeypatch.setattr(segment, "_learn_one_kind", learn)
    task.loss(task.model, batch, torch.Generator().manual_seed(0))
    assert seen[False].isnan().all() and seen[True].isfinite().all()
    assert len(seen[False]) == len(seen[True]) == 1


def test_a_teacher_is_learnt_from_less_and_less(make_tiny_sam, data, tmp_path):
    sam = make_tiny_sam(64, loadable=True)
    own = [parameter.clone() for parameter in sam.image_encoder.parameters()]
    maps = [torch.randn(1, 16, 4, 4), torch.randn(1, 5, 2, 2)]
    choices = SegmentSettings(
        "", augment="none", least_pixels=4, focal=0, dice=0, embedding=2.0, final_embedding=0.5
    )
    task = Segment(
        sam,
        data,
        data,
        choices,
        lambda images: [one.expand(len(images), -1, -1, -1) for one in maps],
    )
    batch = task.collate([task.sample(i, np.random.default_rng(i)) for i in (0, 1)])

    def loss_at(progress):
        batch["progress"] = progress
        return task.loss(task.model, batch, torch.Generator())

    loss, metrics = loss_at(0.0)
    assert loss.item() == pytest.approx(2 * metrics["embedding_distance"].item())
    assert loss_at(1.0)[0].item() == pytest.approx(loss.item() / 2, rel=1e-5)
    losses = learn(task, 30, 3e-3)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    moved = [
        not torch.equal(a, b) for a, b in zip(own, sam.image_encoder.parameters(), strict=True)
    ]
    assert any(moved)
    change(task, focal=10.0, dice=1.0)  # masks and the teacher together
    both, metrics = loss_at(0.0)
    assert {"train_iou", "embedding_distance"} <= set(metrics) and both > loss_at(1.0)[0]
    task.save(task.model, tmp_path / "sam.safetensors")
    assert build_sam(tmp_path / "sam.safetensors").image_encoder.neck is not None
    pickle.loads(pickle.dumps(replace_model(task)))


def test_a_backbone_has_only_further_maps(make_tiny_sam, data):
    sam = make_tiny_sam(64, loadable=True)
    coarse = torch.randn(1, 5, 2, 2)
    choices = SegmentSettings("", augment="none", least_pixels=4, embedding=0.5)
    task = Segment(
        sam, data, data, choices, lambda images: (None, coarse.expand(len(images), -1, -1, -1))
    )
    batch = task.collate([task.sample(i, np.random.default_rng(i)) for i in (0, 1)])
    loss, metrics = task.loss(task.model, batch, torch.Generator())
    assert {"train_iou", "embedding_distance"} <= set(metrics)
    assert 0 < metrics["embedding_distance"].item() <= 2  # a cosine's distance alone
    loss.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in task.model.heads)


def replace_model(task):
    """As the loader hands a task to other processes: without its network."""
    light = copy.copy(task)
    light.model = torch.nn.Identity()
    return light


def test_an_onnx_file_teaches(tmp_path):
    onnx = pytest.importorskip("onnx")
    value, tensor = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [
        onnx.helper.make_node("AveragePool", ["x"], [name], kernel_shape=[n, n], strides=[n, n])
        for name, n in (("first", 16), ("second", 32))
    ]
    outputs = [value(name, tensor, ["n", 3, "h", "w"]) for name in ("first", "second")]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", tensor, ["n", 3, 64, 64])], outputs)
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    path = tmp_path / "teacher.onnx"
    onnx.save(model, path)
    images = torch.randn(2, 3, 64, 64)
    first, second = open_maps(path)(images)
    torch.testing.assert_close(first, torch.nn.functional.avg_pool2d(images, 16))
    assert second.shape == (2, 3, 2, 2)
    (tmp_path / "data").mkdir()
    write_shapes(tmp_path / "data", 2)
    with pytest.raises(ValueError, match="embedding must be above 0 where there is a teacher"):
        SegmentSettings(str(tmp_path / "data"), teacher=str(path))
    with pytest.raises(ValueError, match="embedding must be 0 without a teacher"):
        make_task(SegmentSettings(str(tmp_path / "data"), embedding=1.0))
