import numpy as np
import pytest
import torch

import tinyvit
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec
from tinyvit.train.data.augment import View, augmentation
from tinyvit.train.data.images import open_part
from tinyvit.train.store import StoreMismatchError
from tinyvit.train.tasks.classify import save_classifier
from tinyvit.train.tasks.teachers import (
    LogitTeacher as Teacher,
)
from tinyvit.train.tasks.teachers import (
    open_logit_teacher as open_teacher,
)
from tinyvit.train.tasks.teachers import (
    write_logits,
)

from .tiny_images import tiny_classifier, write_folder

SPEC = ImageSpec.timm(16)
WEIGHT = torch.randn(3, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)) / 20


def answer(images):
    return images.flatten(1) @ WEIGHT.T


TEACHER = Teacher(answer, SPEC, "linear", "0" * 64)


@pytest.fixture
def images(tmp_path):
    return open_part(write_folder(tmp_path / "data", count=3))


def test_answers_are_those_of_the_view_that_the_seed_makes(tmp_path, images):
    store, broken = write_logits(tmp_path / "s", images, TEACHER, views=2, k=2, batch_size=4)
    assert not broken
    from tinyvit.images.decode import decode

    seen = set()
    for view in range(2):
        assert not len(store.missing(view))
        for index in range(9):
            seed, probabilities, classes = store.read(view, index)
            seen.add(seed)
            image = decode(images.source(index))
            pixels = View(augmentation("light"), SPEC)(image, np.random.default_rng(seed))
            wanted = answer(torch.from_numpy(pixels)[None]).softmax(1)[0]
            best = wanted.topk(2)
            assert classes.tolist() == best.indices.tolist()
            # kept in half precision
            np.testing.assert_allclose(probabilities, best.values.numpy(), rtol=1e-3, atol=1e-6)
    assert len(seen) == 18


def test_a_stopped_writing_goes_on_to_the_same_bytes(tmp_path, images):
    whole, _ = write_logits(tmp_path / "whole", images, TEACHER, views=2, k=2, batch_size=2)
    calls = []

    def killed(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(images)

    teacher = Teacher(killed, SPEC, "linear", "0" * 64)
    with pytest.raises(KeyboardInterrupt):
        write_logits(tmp_path / "parts", images, teacher, views=2, k=2, batch_size=2)
    told = []
    parts, _ = write_logits(
        tmp_path / "parts", images, TEACHER, views=2, k=2, batch_size=4,
        progress=lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert told[0] == (9, 18)  # six of the first view were there; the last three came together
    assert told[-1] == (18, 18)
    bytes_of = [(s.folder / "logits.bin").read_bytes() for s in (whole, parts)]
    assert bytes_of[0] == bytes_of[1]
    told.clear()
    write_logits(
        tmp_path / "parts", images, teacher, views=2, k=2,
        progress=lambda done, of: told.append(done),
    )  # fmt: skip
    assert told == []  # nothing was left to do


def test_another_teacher_does_not_write_on(tmp_path, images):
    write_logits(tmp_path / "s", images, TEACHER, views=1)
    other = Teacher(answer, SPEC, "linear", "1" * 64)
    with pytest.raises(StoreMismatchError, match=r"teacher_sha256 is '000.* there and '111"):
        write_logits(tmp_path / "s", images, other, views=1)


def test_broken_images_are_named_and_have_no_answer(tmp_path, images):
    (tmp_path / "data" / images.name(4)).write_bytes(b"")
    store, broken = write_logits(tmp_path / "s", images, TEACHER, views=1)
    assert list(broken) == [images.name(4)]
    assert store.missing(0).tolist() == [4]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: answer(x)[:, :2], r"linear gave \[9, 2\], wanted \[9, 3\]"),
        (lambda x: answer(x) * float("nan"), "not finite"),
    ],
)
def test_a_teacher_that_answers_wrongly(tmp_path, images, wrong, words):
    with pytest.raises(ValueError, match=words):
        write_logits(tmp_path / "s", images, Teacher(wrong, SPEC, "linear", ""), views=1)


def test_a_checkpoint_as_a_teacher(tmp_path, make_tiny_vit, images):
    model = tiny_classifier(make_tiny_vit)
    path = save_classifier(model, tmp_path / "t.safetensors", images.classes)
    teacher = open_teacher(path)
    assert teacher.spec == model.image_spec
    x = torch.randn(2, 3, 16, 16)
    # with and without gradients other kernels may run
    torch.testing.assert_close(teacher.answer(x), model(x))
    assert (
        teacher.sha256
        != open_teacher(save_classifier(model, tmp_path / "u.safetensors", ("x", "y", "z"))).sha256
    )
    folder = tinyvit.save_pretrained(model, tmp_path / "folder")
    assert len(open_teacher(folder).sha256) == 64
    with pytest.raises(CheckpointError, match="no classification head"):
        open_teacher("tinyvit_starter")


def test_onnx_wants_to_be_told_the_preparation(tmp_path):
    with pytest.raises(ValueError, match="give spec="):
        open_teacher(tmp_path / "t.onnx")


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
    teacher = open_teacher(path, SPEC)
    x = torch.randn(2, 3, 16, 16)
    # the same product, summed in another order
    torch.testing.assert_close(teacher.answer(x), answer(x), rtol=1e-4, atol=1e-4)
