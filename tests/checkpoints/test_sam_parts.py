from __future__ import annotations

from checkpoints.families import table
from tinyvit.checkpoints.detection import (
    hq_decoder_shapes,
    mask_decoder_shapes,
    prompt_encoder_shapes,
)
from tinyvit.checkpoints.families import part_of


def published(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in table(name).items()}


def test_lists_exactly_the_tensors_of_the_published_files() -> None:
    both = {**prompt_encoder_shapes(), **mask_decoder_shapes()}
    assert both == published("prompt_encoder_and_mask_decoder")
    assert hq_decoder_shapes() == published("hq_decoder")


def test_every_key_belongs_to_its_part() -> None:
    assert {part_of(key) for key in prompt_encoder_shapes()} == {"prompt_encoder"}
    assert {part_of(key) for key in mask_decoder_shapes()} == {"mask_decoder"}
    assert {part_of(key) for key in hq_decoder_shapes()} == {"hq_decoder"}


def test_another_width_changes_shapes_and_no_keys() -> None:
    prompt, mask, hq = prompt_encoder_shapes(32), mask_decoder_shapes(32), hq_decoder_shapes(32, 24)
    assert prompt.keys() == prompt_encoder_shapes().keys()
    assert mask.keys() == mask_decoder_shapes().keys()
    assert hq.keys() == hq_decoder_shapes().keys()

    expected: dict[str, tuple[int, ...]] = {
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 16),
        "prompt_encoder.point_embeddings.3.weight": (1, 32),
        "prompt_encoder.mask_downscaling.3.weight": (16, 4, 2, 2),
        "prompt_encoder.mask_downscaling.6.weight": (32, 16, 1, 1),
        "prompt_encoder.mask_downscaling.6.bias": (32,),
        "mask_decoder.transformer.layers.1.self_attn.q_proj.weight": (32, 32),
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image.k_proj.weight": (16, 32),
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight": (32, 16),
        "mask_decoder.transformer.layers.1.mlp.lin2.weight": (32, 2048),
        "mask_decoder.mask_tokens.weight": (4, 32),
        "mask_decoder.output_upscaling.0.weight": (32, 8, 2, 2),
        "mask_decoder.output_upscaling.0.bias": (8,),
        "mask_decoder.output_upscaling.3.weight": (8, 4, 2, 2),
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (4, 32),
        "mask_decoder.iou_prediction_head.layers.2.bias": (4,),
        "mask_decoder.hf_mlp.layers.2.weight": (4, 32),
        "mask_decoder.compress_vit_feat.0.weight": (24, 32, 2, 2),
        "mask_decoder.compress_vit_feat.0.bias": (32,),
        "mask_decoder.embedding_encoder.3.weight": (8, 4, 2, 2),
        "mask_decoder.embedding_maskfeature.3.weight": (4, 8, 3, 3),
    }
    every = {**prompt, **mask, **hq}
    assert {key: every[key] for key in expected} == expected
