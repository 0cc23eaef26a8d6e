"""The native decoder behind Segmenter, SamPredictor and everything; see scripts/native-check."""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import tinyvit
from tiny import randomise
from tinyvit.errors import CheckpointError
from tinyvit.sam import Prompt, SamAutomaticMaskGenerator, SamPredictor, Segmenter, build_sam
from tinyvit.sam.decoder import TorchDecoder
from tinyvit.sam.native_decoder import NativeDecoder
from tinyvit.sam.open import StoredSam, open_sam
from tinyvit.sam.prompts import PromptBatch

pytestmark = pytest.mark.skipif(
    find_spec("tinyvit_native") is None,
    reason="tinyvit-native is not installed; scripts/native-check builds it and runs this file",
)
STARTER = Path(tinyvit.__file__).parent / "weights" / "sam_2m.safetensors"


@pytest.fixture(scope="module")
def sam():
    return build_sam("tinyvit_sam_2m")


@pytest.fixture(scope="module")
def hq_file(tmp_path_factory):
    """A whole Light HQ-SAM with an encoder of the embedded sizes."""
    model = build_sam("tinyvit_sam_2m")
    other = build_sam(None, "tiny_vit_5m_sam", is_hq=True, img_size=256)
    decoder = randomise(other.mask_decoder, 3)
    decoder.compress_vit_feat[0] = torch.nn.ConvTranspose2d(96, 256, 2, 2)
    decoder.vit_dim = 96
    model.mask_decoder = decoder.eval()
    return tinyvit.save_pretrained(model, tmp_path_factory.mktemp("hq"))


def photo(height=90, width=120):
    rng = np.random.default_rng(height)
    small = rng.integers(0, 256, (6, 8, 3), np.uint8)
    return small.repeat(20, 0).repeat(20, 1)[:height, :width]


PROMPTS = [
    Prompt(points=[[60, 40]]),
    Prompt(points=[[30, 40], [90, 20]], labels=[1, 0]),
    Prompt(box=[10, 10, 60, 60]),
    Prompt(points=[[20, 20]], box=[10, 10, 60, 60]),
    Prompt(mask=np.tile(np.arange(120) < 50, (90, 1))),
    Prompt(points=[[20, 20]], mask=np.random.default_rng(0).normal(0, 4, (64, 64))),
]


@pytest.mark.parametrize("pad", [None, False])
def test_a_segmenter(sam, pad):
    plain = Segmenter(sam, backend="torch", pad=pad)
    prompts = PROMPTS if pad is None else PROMPTS[:-1]  # the last one is of a padded image
    for source in (sam, "tinyvit_sam_2m", STARTER):
        ours = Segmenter(source, backend="native", pad=pad)
        for multimask in (True, False, "auto"):
            (wanted,) = plain.segment([photo()], [prompts], multimask)
            (found,) = ours.segment([photo()], [prompts], multimask)
            for got, exact in zip(found.low_res_logits, wanted.low_res_logits, strict=True):
                assert np.abs(got - exact).max() <= 1e-4 * np.abs(exact).max()
            for got, exact in zip(found.predicted_ious, wanted.predicted_ious, strict=True):
                assert np.abs(got - exact).max() <= 1e-4
            assert np.mean(np.asarray(found) == np.asarray(wanted)) > 0.999
        checked = "" if source is not sam else " (checked: error "
        assert f"the decoder runs in native{checked}" in ours.explain()
        assert ours.encoder.weights_sha256() == plain.encoder.weights_sha256()
        assert ours.prepare(next(iter(ours.embed(photo())))).nbytes > 2**19
    assert plain.explain().endswith("the decoder runs in torch")


def test_hq(hq_file):
    plain = Segmenter(hq_file, backend="torch")
    ours = Segmenter(hq_file, backend="native")
    assert isinstance(ours.source, StoredSam) and ours.source.is_hq
    (embedding,), (wanted_embedding,) = ours.embed(photo()), plain.embed(photo())
    assert embedding.interm_features is not None
    assert np.allclose(embedding.interm_features, wanted_embedding.interm_features, atol=1e-4)
    for multimask in (True, False):
        (found,) = ours.segment([photo()], [PROMPTS], multimask)
        (wanted,) = plain.segment([photo()], [PROMPTS], multimask)
        for got, exact in zip(found.low_res_logits, wanted.low_res_logits, strict=True):
            assert got.shape == exact.shape == (1, 64, 64)
            assert np.abs(got - exact).max() <= 1e-4 * np.abs(exact).max()
    same = NativeDecoder(plain.model)  # of a Sam of torch
    prompts = PromptBatch(boxes=np.array([[10, 10, 60, 60]], np.float32))
    for decoder in (same, TorchDecoder(plain.model)):
        prepared = decoder.prepare(wanted_embedding)
        logits, _ = decoder.decode(prepared, prompts, hq_token_only=True)
        if decoder is same:
            first = logits
    assert np.abs(first - logits).max() <= 1e-4 * np.abs(logits).max()
    assert "native (checked" in same.explain()
    bare = tinyvit.sam.ImageEmbedding(embedding.features, embedding.placement, embedding.image_spec)
    with pytest.raises(ValueError, match="wants interm_features"):
        same.prepare(bare)


def test_a_predictor(sam):
    ours, theirs = (SamPredictor(sam, backend=name) for name in ("native", "torch"))
    stored = SamPredictor(STARTER, backend="native")
    assert isinstance(stored._model, StoredSam)
    for predictor in (ours, theirs, stored):
        predictor.set_image(photo())
    points, labels = np.array([[60, 40]]), np.array([1])
    wanted = theirs.predict(points, labels)
    for predictor in (ours, stored, pickle.loads(pickle.dumps(stored)), copy.deepcopy(ours)):
        masks, scores, logits = predictor.predict(points, labels)
        assert np.mean(masks == wanted[0]) > 0.999 and masks.dtype == bool
        assert np.abs(scores - wanted[1]).max() <= 1e-4
        again = predictor.predict(points, labels, mask_input=logits[:1], return_logits=True)
        assert again[0].dtype == np.float32 and again[0].shape == (3, 90, 120)
    coords = torch.tensor([[[30.0, 40.0]], [[90.0, 20.0]]])
    one, two = (p.predict_torch(coords, torch.ones(2, 1)) for p in (stored, theirs))
    assert torch.allclose(one[2], two[2], atol=1e-3) and one[0].shape == (2, 3, 90, 120)
    with pytest.raises(ValueError, match="wants a model with Light HQ-SAM"):
        ours.predict(points, labels, hq_token_only=True)
    with pytest.raises(ValueError, match=r"mask_input must be low-res logits of this image"):
        ours.predict_torch(coords, torch.ones(2, 1), mask_input=torch.zeros(2, 1, 8, 8))
    assert stored.model.mask_threshold == 0.0  # a Sam of torch from here on
    assert not isinstance(stored._model, StoredSam)
    masks, _, _ = stored.predict(points, labels)
    assert np.mean(masks == wanted[0]) > 0.999


@pytest.mark.parametrize("crops", [0, 1])
def test_everything(sam, crops):
    found = []
    for source, backend in ((sam, "torch"), (sam, "native"), ("tinyvit_sam_2m", "native")):
        generator = SamAutomaticMaskGenerator(
            source,
            4,
            pred_iou_thresh=0.1,
            stability_score_thresh=0.3,
            crop_n_layers=crops,
            backend=backend,
        )
        found.append(generator.generate(photo(100, 130)))
    first, *others = found
    assert len(first) > 3
    for records in others:
        assert len(records) == len(first)
        for got, wanted in zip(records, first, strict=True):
            assert got["crop_box"] == wanted["crop_box"]
            assert got["point_coords"] == wanted["point_coords"]
            assert abs(got["predicted_iou"] - wanted["predicted_iou"]) < 1e-4
            assert abs(got["stability_score"] - wanted["stability_score"]) < 1e-2
            inside, either = (
                kind(got["segmentation"], wanted["segmentation"]).sum()
                for kind in (np.logical_and, np.logical_or)
            )
            assert inside >= 0.99 * either
            assert abs(got["area"] - int(got["segmentation"].sum())) == 0


def test_it_follows_the_weights():
    model = build_sam("tinyvit_sam_2m")
    segmenter = Segmenter(model, backend="native")
    (embedding,) = segmenter.embed(photo())
    before = segmenter.predict(embedding, PROMPTS[:1]).low_res_logits[0]
    with torch.no_grad():
        model.mask_decoder.output_hypernetworks_mlps[1].layers[2].weight.mul_(3)
    after = segmenter.predict(embedding, PROMPTS[:1]).low_res_logits[0]
    assert np.abs(after[0] - before[0]).max() > 1 and np.array_equal(after[1:], before[1:])


def test_what_it_cannot_run_is_for_torch(sam, make_tiny_sam):
    tiny = make_tiny_sam()
    decoder = NativeDecoder(tiny)
    assert decoder.explain().startswith("torch (") and "256 channels" in decoder.explain()
    hooked = copy.deepcopy(sam)
    hooked.mask_decoder.register_forward_hook(lambda module, inputs, output: output)
    decoder = NativeDecoder(hooked)
    assert decoder.explain() == "torch (a head has a forward hook)"
    (embedding,) = Segmenter(sam, backend="native").embed(photo())
    prompts = PromptBatch((np.full((2, 1, 2), 60, np.float32), np.ones((2, 1), np.int64)))
    ours, theirs = decoder, TorchDecoder(sam)
    prepared, other = ours.prepare(embedding), theirs.prepare(embedding)
    got, wanted = ours.decode(prepared, prompts), theirs.decode(other, prompts)
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(got, wanted, strict=True))


def test_which_files_need_torch(sam, tmp_path, make_tiny_sam):
    pickled = tmp_path / "sam.pt"
    torch.save(sam.state_dict(), pickled)
    assert not isinstance(open_sam(pickled, "test", "native"), StoredSam)
    tinyvit.save_pretrained(sam, tmp_path / "folder")
    stored = open_sam(tmp_path / "folder", "test", "native")
    assert isinstance(stored, StoredSam) and open_sam(stored, "test") is stored
    assert set(stored.state_dict()) == set(sam.state_dict())
    assert not isinstance(open_sam(STARTER, "test", "torch"), StoredSam)
    narrow = make_tiny_sam(loadable=True)
    tinyvit.save_pretrained(narrow, tmp_path / "narrow")
    assert not isinstance(open_sam(tmp_path / "narrow", "test", "native"), StoredSam)
    larger = open_sam(STARTER, "test", "native", img_size=512)
    assert isinstance(larger, StoredSam) and larger.grids == ((32, 32), (512, 512))
    assert larger.build().image_encoder.img_size == 512
    limited = Segmenter(STARTER, backend="native", threads=2)
    assert "2 threads" in limited.explain() and limited._decoder._threads == 2
    with pytest.raises(CheckpointError, match="no such file"):
        open_sam(tmp_path / "none.safetensors", "test", "native")
