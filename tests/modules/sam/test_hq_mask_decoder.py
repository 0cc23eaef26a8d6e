"""Light HQ-SAM's decoder, by the steps of its paper."""

from __future__ import annotations

import pytest
import torch

from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder, TwoWayTransformer

C, D = 16, 12
# float32 sums in another order
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def decoder(randomise):
    transformer = TwoWayTransformer(2, C, 4, 24)
    return randomise(HQMaskDecoder(transformer_dim=C, transformer=transformer, vit_dim=D)).eval()


def inputs(count=3, size=(3, 5), images=1):
    generator = torch.Generator().manual_seed(7)
    shapes = ((images, C, *size), (1, C, *size), (count, 2, C), (count, C, *size))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def early_map(images=1, size=(3, 5)):
    return torch.randn(images, *size, D, generator=torch.Generator().manual_seed(8))


def parts_of(decoder, early):
    """Plain masks [N, 4, H, W], the high-quality mask [N, 1, H, W] and IoU, step by step."""
    image, image_pe, sparse, dense = inputs()
    own = (decoder.iou_token, decoder.mask_tokens, decoder.hf_token)
    own = torch.cat([table.weight for table in own]).expand(3, -1, -1)
    tokens, cells = decoder.transformer(image + dense, image_pe, torch.cat((own, sparse), dim=1))
    upscaled = decoder.output_upscaling(cells.transpose(1, 2).reshape(3, C, 3, 5))
    detail = decoder.embedding_encoder(image)
    detail = detail + decoder.compress_vit_feat(early.permute(0, 3, 1, 2))
    fine = decoder.embedding_maskfeature(upscaled) + detail
    mlps = decoder.output_hypernetworks_mlps
    hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(mlps)], 1)
    plain = torch.einsum("nkc,nchw->nkhw", hyper, upscaled)
    best = torch.einsum("nc,nchw->nhw", decoder.hf_mlp(tokens[:, 5]), fine)[:, None]
    return plain, best, decoder.iou_prediction_head(tokens[:, 0])


def test_single_mask_is_the_first_plus_the_fine_one(decoder):
    plain, fine, iou = parts_of(decoder, early_map())
    low_res, quality = decoder(*inputs(), False, interm_embeddings=early_map())
    torch.testing.assert_close(low_res, plain[:, :1] + fine, **NEAR)
    torch.testing.assert_close(quality, iou[:, :1], **NEAR)


def test_multimask_corrects_the_best_of_the_others(decoder):
    plain, fine, iou = parts_of(decoder, early_map())
    low_res, quality = decoder(*inputs(), True, interm_embeddings=[early_map()])
    for n in range(3):
        quality_of = iou[n].tolist()
        best = max((1, 2, 3), key=quality_of.__getitem__)
        torch.testing.assert_close(low_res[n, 0], plain[n, best] + fine[n, 0], **NEAR)
        torch.testing.assert_close(quality[n, 0], iou[n, best], **NEAR)


@pytest.mark.parametrize("multimask", [True, False])
def test_the_fine_mask_alone(decoder, multimask):
    _, fine, _ = parts_of(decoder, early_map())
    low_res, _ = decoder(*inputs(), multimask, hq_token_only=True, interm_embeddings=early_map())
    torch.testing.assert_close(low_res, fine, **NEAR)


def test_all_masks_of_predict_masks(decoder):
    plain, fine, iou = parts_of(decoder, early_map())
    masks, quality = decoder.predict_masks(*inputs(), early_map())
    torch.testing.assert_close(masks, torch.cat((plain, fine), 1), **NEAR)
    torch.testing.assert_close(quality, iou, **NEAR)


@pytest.mark.parametrize("count, images", [(0, 1), (1, 1), (3, 3)])
def test_numbers_of_prompts_and_images(decoder, count, images):
    low_res, iou = decoder(
        *inputs(count, (2, 3), images), True, interm_embeddings=early_map(images, (2, 3))
    )
    assert low_res.shape == (count, 1, 8, 12)
    assert iou.shape == (count, 1)


def test_keys_are_the_plain_ones_and_the_additions(decoder):
    transformer = TwoWayTransformer(2, C, 4, 24)
    plain = MaskDecoder(transformer_dim=C, transformer=transformer).state_dict().keys()
    added = {key.split(".")[0] for key in decoder.state_dict().keys() - plain}
    assert plain <= decoder.state_dict().keys()
    assert added == {
        "hf_token",
        "hf_mlp",
        "compress_vit_feat",
        "embedding_encoder",
        "embedding_maskfeature",
    }


def test_gradients_reach_what_was_added(decoder):
    low_res, _ = decoder(*inputs(), False, interm_embeddings=early_map())
    low_res.sin().sum().backward()
    added = ("hf_", "compress_vit_feat", "embedding_")
    for name, parameter in decoder.named_parameters():
        if name.startswith(added):
            assert parameter.grad.any(), name


def test_compiles_in_one_graph(decoder):
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(*inputs(), True, False, early_map())
        torch.testing.assert_close(found, decoder(*inputs(), True, False, early_map()))


def test_without_or_with_a_wrong_early_map(decoder):
    with pytest.raises(
        ValueError, match=r"wants interm_embeddings.*\[1 or N, 3, 5, 12\].*forward_hq"
    ):
        decoder(*inputs(), True)
    with pytest.raises(ValueError, match=r"\[1 or N, 3, 5, 12\], got \[1, 12, 3, 5\]"):
        decoder(*inputs(), True, interm_embeddings=torch.zeros(1, D, 3, 5))
