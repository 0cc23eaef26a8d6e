"""List the tensors of Segment Anything's prompt encoder and mask decoder.

Names and shapes only, to say what a file lacks. The architecture is Segment Anything's (Apache-2.0)
as in MobileSAM: two transformer layers, three masks and one single mask, the additions of Light
HQ-SAM. ``width`` is the embedding's channel number, 256 in every published file.
"""

from __future__ import annotations

from collections.abc import Mapping

from tinyvit.checkpoints.architecture import Shape

__all__ = ["hq_decoder_shapes", "mask_decoder_shapes", "prompt_encoder_shapes"]

_MASK_TOKENS = 4  # three masks of an ambiguous prompt and a single one
_MLP_DIM = 2048
_MASK_IN_CHANS = 16


def prompt_encoder_shapes(width: int = 256) -> dict[str, Shape]:
    """List the tensors of a prompt encoder.

    Args:
        width: Channels of the image embedding.

    Returns:
        Key -> shape.
    """
    quarter = _MASK_IN_CHANS // 4
    name = "prompt_encoder."
    shapes: dict[str, Shape] = {
        f"{name}pe_layer.positional_encoding_gaussian_matrix": (2, width // 2),
        **{f"{name}point_embeddings.{i}.weight": (1, width) for i in range(4)},
        f"{name}not_a_point_embed.weight": (1, width),
        f"{name}no_mask_embed.weight": (1, width),
    }
    shapes.update(_layer(f"{name}mask_downscaling.0", (quarter, 1, 2, 2)))
    shapes.update(_layer(f"{name}mask_downscaling.1", (quarter,)))
    shapes.update(_layer(f"{name}mask_downscaling.3", (_MASK_IN_CHANS, quarter, 2, 2)))
    shapes.update(_layer(f"{name}mask_downscaling.4", (_MASK_IN_CHANS,)))
    shapes.update(_layer(f"{name}mask_downscaling.6", (width, _MASK_IN_CHANS, 1, 1)))
    return shapes


def mask_decoder_shapes(width: int = 256) -> dict[str, Shape]:
    """List the tensors of a mask decoder.

    Args:
        width: Channels of the image embedding.

    Returns:
        Key -> shape.
    """
    name = "mask_decoder."
    shapes: dict[str, Shape] = {}
    for layer in range(2):
        prefix = f"{name}transformer.layers.{layer}."
        shapes.update(_attention(f"{prefix}self_attn", width, width))
        shapes.update(_attention(f"{prefix}cross_attn_token_to_image", width, width // 2))
        shapes.update(_attention(f"{prefix}cross_attn_image_to_token", width, width // 2))
        shapes.update(_layer(f"{prefix}mlp.lin1", (_MLP_DIM, width)))
        shapes.update(_layer(f"{prefix}mlp.lin2", (width, _MLP_DIM)))
        for norm in range(1, 5):
            shapes.update(_layer(f"{prefix}norm{norm}", (width,)))
    last = f"{name}transformer.final_attn_token_to_image"
    shapes.update(_attention(last, width, width // 2))
    shapes.update(_layer(f"{name}transformer.norm_final_attn", (width,)))
    shapes[f"{name}iou_token.weight"] = (1, width)
    shapes[f"{name}mask_tokens.weight"] = (_MASK_TOKENS, width)
    shapes.update(_transposed(f"{name}output_upscaling.0", (width, width // 4, 2, 2)))
    shapes.update(_layer(f"{name}output_upscaling.1", (width // 4,)))
    shapes.update(_transposed(f"{name}output_upscaling.3", (width // 4, width // 8, 2, 2)))
    for token in range(_MASK_TOKENS):
        shapes.update(_mlp(f"{name}output_hypernetworks_mlps.{token}", width, width // 8))
    shapes.update(_mlp(f"{name}iou_prediction_head", width, _MASK_TOKENS))
    return shapes


def hq_decoder_shapes(width: int = 256, vit_dim: int = 160) -> dict[str, Shape]:
    """List the tensors Light HQ-SAM adds to the mask decoder.

    Args:
        width: Channels of the image embedding.
        vit_dim: Channels after the encoder's second stage and its merge.

    Returns:
        Key -> shape.
    """
    name = "mask_decoder."
    quarter, eighth = width // 4, width // 8
    shapes: dict[str, Shape] = {f"{name}hf_token.weight": (1, width)}
    shapes.update(_mlp(f"{name}hf_mlp", width, eighth))
    shapes.update(_transposed(f"{name}compress_vit_feat.0", (vit_dim, width, 2, 2)))
    shapes.update(_layer(f"{name}compress_vit_feat.1", (width,)))
    shapes.update(_transposed(f"{name}compress_vit_feat.3", (width, eighth, 2, 2)))
    shapes.update(_transposed(f"{name}embedding_encoder.0", (width, quarter, 2, 2)))
    shapes.update(_layer(f"{name}embedding_encoder.1", (quarter,)))
    shapes.update(_transposed(f"{name}embedding_encoder.3", (quarter, eighth, 2, 2)))
    shapes.update(_layer(f"{name}embedding_maskfeature.0", (quarter, eighth, 3, 3)))
    shapes.update(_layer(f"{name}embedding_maskfeature.1", (quarter,)))
    shapes.update(_layer(f"{name}embedding_maskfeature.3", (eighth, quarter, 3, 3)))
    return shapes


def _layer(name: str, weight: Shape) -> Mapping[str, Shape]:
    """A weight [out, …] and its bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _transposed(name: str, weight: Shape) -> Mapping[str, Shape]:
    """A transposed convolution: weight [in, out, k, k] and its bias [out]."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[1:2]}


def _attention(name: str, width: int, inner: int) -> dict[str, Shape]:
    """Projections of an attention whose inner width may be smaller."""
    shapes: dict[str, Shape] = {}
    for projection in ("q_proj", "k_proj", "v_proj"):
        shapes.update(_layer(f"{name}.{projection}", (inner, width)))
    shapes.update(_layer(f"{name}.out_proj", (width, inner)))
    return shapes


def _mlp(name: str, width: int, out: int) -> dict[str, Shape]:
    """Three linear layers, the last to ``out``."""
    shapes: dict[str, Shape] = {}
    for layer, outputs in enumerate((width, width, out)):
        shapes.update(_layer(f"{name}.layers.{layer}", (outputs, width)))
    return shapes
