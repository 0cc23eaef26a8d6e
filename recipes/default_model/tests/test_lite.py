import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lite
from tinyvit.checkpoints import read_state_dict
from tinyvit.sam import SamPredictor, build_sam
from tinyvit.train.tasks.segment import Segment, save_sam
from tinyvit.train.tasks.settings import SegmentSettings

from .recipe_files import load

train, evaluate = load("train"), load("evaluate")


def backbone(pixels):
    """As the real one gives: maps at strides 16 and 32, of sines of the pixels' means."""
    found = []
    for stride, channels in ((16, 120), (32, 352)):
        mean = F.avg_pool2d(torch.from_numpy(pixels), stride)  # [B, 3, h, w]
        waves = torch.linspace(0.2, 6, channels // 3 + 1)[None, None, :, None, None]
        maps = (waves * mean[:, :, None]).sin().flatten(1, 2)[:, :channels]
        found.append(maps.contiguous().numpy())
    return found


@pytest.fixture
def encoder():
    return lite.LiteEncoder(backbone, 64)


def test_pixels_come_as_the_backbone_was_trained(encoder):
    seen = []

    def watch(pixels):
        seen.append(pixels)
        return backbone(pixels)

    encoder._run = watch
    rgb = torch.full((1, 3, 64, 64), 200.0)
    spec = encoder.image_spec
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    encoder((rgb - mean) / std)
    np.testing.assert_allclose(seen[0], (200 - 127) / 128, atol=1e-5)


def test_a_neck_that_can_be_solved_for_is_found(encoder):
    wanted = torch.nn.Conv2d(sum(lite.CHANNELS), 256, 1)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 64, 64, generator=generator) for _ in range(60)]

    def teacher(images):
        return wanted(lite.joined(encoder.maps(images)))

    assert lite.fit_neck(encoder, teacher, batches, ridge=1e-6) > 0.99
    images = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        error = (encoder(images) - teacher(images)).square().mean()
        assert error < 0.05 * teacher(images).var()
    noise = iter([torch.randn(4, 256, 4, 4, generator=generator) for _ in batches])
    assert lite.fit_neck(encoder, lambda images: next(noise), batches, ridge=1e-2) < 0.6


def test_everything_that_a_student_learns_from(encoder):
    images = torch.randn(2, 3, 64, 64)
    embedding, fine, coarse = encoder.everything(images)
    assert embedding.shape == (2, 256, 4, 4)
    assert (fine.shape, coarse.shape) == ((2, 120, 4, 4), (2, 352, 2, 2))
    torch.testing.assert_close(embedding, encoder(images))


@pytest.fixture
def work(tmp_path, make_supply, monkeypatch):
    monkeypatch.setattr(lite, "open_backbone", lambda work, size: backbone)
    return make_supply(tmp_path)


STAGE = {
    "start": "", "model": "tiny_vit_2m_sam", "img_size": 64, "objects": 2, "seed": 3,
    "kinds": {"photo": 1.0}, "steps": 2, "batch_size": 2, "workers": 0, "device": "cpu",
    "val_masks": 2, "learning_rate": 1e-3,
}  # fmt: skip


def test_a_teacher_is_trained_evaluated_and_learnt_from(work, monkeypatch):
    start = work / "start.safetensors"
    save_sam(build_sam(None, "tiny_vit_2m_sam", img_size=64), start)
    monkeypatch.setattr(lite, "build_sam", lambda like, img_size: build_sam(start))
    run = {**STAGE, "start": str(start), "encoder": "lite2"}
    best = train.run_stage(work, "teacher", run)
    assert lite.is_lite(best) and not lite.is_lite(start) and not lite.is_lite(work / "gone")
    assert not any("backbone" in key for key in read_state_dict(best).tensors)
    again = lite.open_lite(work, best, 64)
    torch.testing.assert_close(
        again.state_dict()[lite.NECK], read_state_dict(best).tensors[lite.NECK]
    )
    monkeypatch.setattr(evaluate.Choices, "size", 64)
    assert isinstance(evaluate.open_weights(str(best), work), SamPredictor)
    assert evaluate.open_weights(str(start), work) == str(start)
    student = {
        **STAGE, "start": str(start), "decoder": "teacher", "teacher": "teacher",
        "embedding": 1.0, "focal": 0.0, "dice": 0.0,
    }  # fmt: skip
    learnt = train.run_stage(work, "student", student)
    key = "mask_decoder.iou_token.weight"
    ours, theirs = (read_state_dict(path).tensors[key] for path in (learnt, best))
    torch.testing.assert_close(ours, theirs)
    build_sam(learnt)  # nothing of what was beside it is in the file
    masks = {**STAGE, "start": "student", "teacher": "teacher", "embedding": 0.3}
    task = train.task_of(work, masks)
    assert isinstance(task, Segment) and isinstance(task.settings, SegmentSettings)
    assert len(task.model.heads) == 2
