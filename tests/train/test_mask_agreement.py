import pytest
import torch

from tinyvit.modules import TinyViT
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.modules.sam.transformer import TwoWayTransformer
from tinyvit.sam.model import Sam
from tinyvit.train.tasks.distill import MaskAgreement, random_points


def tiny_sam(decoder=MaskDecoder, **more):
    torch.manual_seed(0)
    encoder = TinyViT(
        64, embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
        window_sizes=(7, 7, 7, 7), neck_dim=16, head=False,
    )  # fmt: skip
    heads = decoder(transformer_dim=16, transformer=TwoWayTransformer(2, 16, 2, 32), **more)
    return Sam(encoder, PromptEncoder(16, (4, 4), (64, 64), 4), heads).eval()


def test_points_lie_in_the_images():
    placed = torch.tensor([[1.0, 0.5], [0.25, 1.0]])
    points = random_points(placed, 200, torch.Generator().manual_seed(0))
    assert points.shape == (2, 200, 2)
    most = points.amax(1)
    assert bool((most <= placed.flip(1)).all()) and bool((most > 0.9 * placed.flip(1)).all())
    assert torch.equal(points, random_points(placed, 200, torch.Generator().manual_seed(0)))


def test_masks_are_those_of_the_model_at_the_same_place():
    sam = tiny_sam()
    embedding = torch.randn(2, 16, 4, 4)
    points = torch.tensor([[[0.5, 0.25]], [[0.125, 0.75]]])  # (x, y)
    masks = MaskAgreement(sam).masks(embedding, points)
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
    sam = tiny_sam().train()
    agreement = MaskAgreement(sam)
    embedding = torch.randn(1, 16, 4, 4, requires_grad=True)
    agreement.masks(embedding, torch.rand(1, 3, 2)).square().sum().backward()
    assert embedding.grad is not None and embedding.grad.abs().sum() > 0
    heads = (*sam.prompt_encoder.parameters(), *sam.mask_decoder.parameters())
    assert all(p.grad is None and not p.requires_grad for p in heads)
    assert not sam.mask_decoder.training


def test_every_grid_will_do():
    agreement = MaskAgreement(tiny_sam())
    flat = torch.randn(1, 16, 1, 1)
    points = torch.tensor([[[0.3, 0.6]]])
    fine = agreement.masks(flat.expand(1, 16, 8, 8), points)
    assert fine.shape == (4, 32, 32)
    assert agreement.channels == 16


def test_the_high_quality_decoder_is_refused():
    with pytest.raises(ValueError, match="early map beside the embedding"):
        MaskAgreement(tiny_sam(HQMaskDecoder, vit_dim=8))
