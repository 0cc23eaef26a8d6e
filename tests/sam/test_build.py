"""From names and files to a ``Sam``: every family, every size, strict loading, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tinyvit.checkpoints.open
from checkpoints.families import small, table, values
from golden import recipe
from tinyvit.catalog import VARIANTS
from tinyvit.checkpoints import write_state_dict
from tinyvit.checkpoints.families import LAYOUTS
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder
from tinyvit.sam.model import build_sam, sam_model_registry

WHOLE = [name for name, row in LAYOUTS.items() if {"trunk", "mask_decoder"} <= {*row.required}]


def write(folder, family, state, name=None):
    layout = LAYOUTS[family]
    suffix = ".safetensors" if layout.container == "safetensors" else ".pt"
    wrapper = layout.wrapper if layout.container == "torch" else None
    path = folder / f"{name or family}{suffix}"
    return write_state_dict(path, state, layout.container, wrapper)


def plain_file(folder, state, name="mine.pt"):
    return write_state_dict(folder / name, state, "torch", None)


def assert_holds(sam, state):
    """Every tensor of the state stands in the model under its own key, bit for bit."""
    own = sam.state_dict()
    assert state.keys() - own.keys() == set()
    different = [key for key, value in state.items() if not torch.equal(own[key], value)]
    assert different == []


@pytest.fixture(scope="module")
def mobile_sam_state():
    """MobileSAM's keys and shapes, with the values that the goldens are made of."""
    shapes = {key: shape for key, (shape, _) in table("mobile_sam").items()}
    return {key: torch.from_numpy(v) for key, v in recipe.fill_state_dict(shapes).items()}


def test_a_file_like_mobile_sams_is_used_to_the_last_tensor(tmp_path, mobile_sam_state):
    assert len(mobile_sam_state) == 439
    sam = build_sam(plain_file(tmp_path, mobile_sam_state, "mobile_sam.pt"))
    assert sam.state_dict().keys() == mobile_sam_state.keys()
    assert_holds(sam, mobile_sam_state)
    assert not sam.training
    heads = (sam.prompt_encoder, sam.mask_decoder)
    numbers = [sum(p.numel() for p in part.parameters()) for part in heads]
    assert numbers == [6_220, 4_058_340]
    assert sam.prompt_encoder.image_embedding_size == (64, 64)
    assert sam.prompt_encoder.input_image_size == (1024, 1024)
    assert type(sam.mask_decoder) is MaskDecoder


def test_registry_names_the_variant_and_takes_the_file(tmp_path, mobile_sam_state):
    path = plain_file(tmp_path, mobile_sam_state)
    assert_holds(sam_model_registry["vit_t"](checkpoint=path), mobile_sam_state)
    with pytest.raises(CheckpointError, match="does not fit this TinyViT of widths"):
        sam_model_registry["tiny_vit_11m"](checkpoint=path)


@pytest.mark.parametrize("family", WHOLE)
def test_every_family(tmp_path, family):
    state = small(family)
    sam = build_sam(write(tmp_path, family, state), img_size=64)
    loaded = {key: v for key, v in state.items() if not key.startswith("decoder_state.")}
    assert_holds(sam, loaded)
    own = {key for key in sam.state_dict() if not key.endswith("num_batches_tracked")}
    assert own <= loaded.keys()
    assert isinstance(sam.mask_decoder, HQMaskDecoder) == (family == "hq_sam")
    # LiteMedSAM's stem keeps the image's size: its encoder's total stride is 4, not 16
    cells = 16 if family == "litemedsam" else 4
    assert sam.prompt_encoder.image_embedding_size == (cells, cells)
    with torch.no_grad():
        [found] = sam([{"image": torch.zeros(3, 64, 40), "original_size": (32, 20)}], True)
    assert found["masks"].shape == (1, 1 if family == "hq_sam" else 3, 32, 20)
    assert found["low_res_logits"].shape[2:] == (4 * cells, 4 * cells)


def test_published_litemedsam(tmp_path):
    rows = {f"image_encoder.{k}": row for k, row in table("encoder_litemedsam").items()}
    rows.update(table("prompt_encoder_and_mask_decoder"))
    state = values({key: shape for key, (shape, _) in rows.items()})
    sam = build_sam(plain_file(tmp_path, state, "lite_medsam.pth"))
    assert_holds(sam, state)
    assert sam.image_encoder.image_spec == ImageSpec.litemedsam(256)
    assert sam.prompt_encoder.image_embedding_size == (64, 64)
    assert sam.prompt_encoder.input_image_size == (256, 256)
    assert sam.prompt_encoder.mask_input_size == (256, 256)


def test_published_hq_sam(tmp_path, mobile_sam_state):
    added = values({key: shape for key, (shape, _) in table("hq_decoder").items()}, seed=1)
    state = {**mobile_sam_state, **added}
    sam = build_sam(plain_file(tmp_path, state, "sam_hq_vit_tiny.pth"))
    assert_holds(sam, state)
    assert sam.state_dict().keys() == state.keys()
    assert build_sam(variant="tiny_vit_2m_sam", is_hq=True).mask_decoder.vit_dim == 96


def test_save_and_load_again(tmp_path):
    first = build_sam(write(tmp_path, "mobile_sam", small("mobile_sam")), img_size=64)
    path = tmp_path / "again.pt"
    torch.save(first.state_dict(), path)
    second = build_sam(path)
    assert_holds(second, first.state_dict())


def test_a_file_is_read_once(tmp_path, monkeypatch):
    path = write(tmp_path, "mobile_sam", small("mobile_sam"))
    reads = []
    read = tinyvit.checkpoints.open.read_state_dict
    monkeypatch.setattr(
        tinyvit.checkpoints.open,
        "read_state_dict",
        lambda *given: reads.append(given) or read(*given),
    )
    build_sam(path, img_size=64)
    assert reads == [(path,)]


@pytest.mark.parametrize(
    "img_size, grid, frame",
    [
        (256, (16, 16), (256, 256)),
        (64, (4, 4), (64, 64)),
        ((48, 100), (3, 7), (48, 112)),
        (50, (4, 4), (64, 64)),
    ],
)
def test_another_size(tmp_path, img_size, grid, frame):
    sam = build_sam(write(tmp_path, "mobile_sam", small("mobile_sam")), img_size=img_size)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert sam.image_encoder.img_size == img_size
    assert sam.image_encoder.image_spec == ImageSpec.sam(size)
    prompts = sam.prompt_encoder
    assert prompts.image_embedding_size == grid
    assert prompts.input_image_size == frame
    assert prompts.mask_input_size == (4 * grid[0], 4 * grid[1])
    x = torch.zeros(1, 3, *size)
    with torch.no_grad():
        assert sam.image_encoder(x).shape[2:] == grid == prompts.get_dense_pe().shape[2:]


def test_the_embedded_weights_segment_a_synthetic_image():
    sam = sam_model_registry["default"]()
    assert sam.prompt_encoder.image_embedding_size == (16, 16)
    assert sam.prompt_encoder.input_image_size == (256, 256)
    assert sam.prompt_encoder.mask_input_size == (64, 64)
    y, x = np.mgrid[:192, :256]
    disc = torch.from_numpy((x - 90) ** 2 + (y - 100) ** 2 < 45**2)
    colours = torch.tensor([[60, 90, 60], [220, 60, 40]], dtype=torch.uint8)
    record = {
        "image": colours[disc.long()].permute(2, 0, 1),
        "original_size": (96, 128),
        "point_coords": torch.tensor([[[90.0, 100.0]]]),
        "point_labels": torch.tensor([[1]]),
    }
    [found] = sam([record], True)
    masks = found["masks"][0]
    truth = disc[::2, ::2]
    shares = [float((m & truth).sum() / (m | truth).sum()) for m in masks]
    assert masks.shape == (3, 96, 128)
    # a disc of one colour is what these small weights are good at
    assert max(shares) > 0.85


def test_without_a_checkpoint_the_model_is_untrained():
    sam = sam_model_registry["vit_t"]()
    assert len(sam.state_dict()) == 439
    assert not sam.training
    starter = sam_model_registry["default"](checkpoint=None, img_size=64)
    assert starter.image_encoder.embed_dims == (32, 64, 96, 160)
    assert starter.prompt_encoder.image_embedding_size == (4, 4)


def test_names_of_the_registry():
    assert {"default", "vit_t", "tiny_vit_5m", "tiny_vit_11m", "tiny_vit_21m"} <= {
        *sam_model_registry
    }
    assert {row.name for row in VARIANTS if row.task == "sam"} <= {*sam_model_registry}


def test_a_classifier_is_no_sam():
    with pytest.raises(
        ValueError, match=r"'tiny_vit_5m_224' is a classifier; a SAM is one of tiny"
    ):
        build_sam(variant="tiny_vit_5m_224")
    with pytest.raises(ValueError, match="unknown model 'tiny_vit_5m_sma'; did you mean"):
        build_sam(variant="tiny_vit_5m_sma")


@pytest.mark.parametrize("family", ["cream", "timm", "tinyvit"])
def test_an_encoder_alone_is_no_sam(tmp_path, family):
    words = (
        rf"\({family}\) holds no prompt_encoder and no mask_decoder, only trunk.*"
        "an encoder and no SAM.*create_model"
    )
    with pytest.raises(CheckpointError, match=words):
        build_sam(write(tmp_path, family, small(family)))


def test_heads_alone_are_no_sam(tmp_path):
    path = write(tmp_path, "mobile_sam_v2_decoder", small("mobile_sam_v2_decoder"))
    with pytest.raises(CheckpointError, match="holds no image encoder"):
        build_sam(path)


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    state = dict(small("mobile_sam"))
    del state["mask_decoder.iou_token.weight"], state["image_encoder.neck.0.weight"]
    del state["prompt_encoder.no_mask_embed.weight"]
    state["mask_decoder.extra.weight"] = torch.zeros(1)
    state["mask_decoder.mask_tokens.weight"] = torch.zeros(5, 16)
    with pytest.raises(CheckpointError) as caught:
        build_sam(plain_file(tmp_path, state))
    words = str(caught.value)
    assert "3 missing: " in words
    for key in ("image_encoder.neck.0.weight", "prompt_encoder.no_mask_embed.weight"):
        assert key in words
    assert "mask_decoder.iou_token.weight" in words
    assert "1 unexpected: mask_decoder.extra.weight" in words
    assert "mask_decoder.mask_tokens.weight has shape [5, 16] instead of [4, 16]" in words


def test_unknown_checkpoint():
    with pytest.raises(CheckpointError, match="did you mean 'mobile_sam'"):
        build_sam("mobilesam")


def test_a_model_without_weights_says_so():
    with pytest.warns(UserWarning, match="this SAM is untrained.*build_sam\\('tinyvit_sam_2m'\\)"):
        build_sam()
