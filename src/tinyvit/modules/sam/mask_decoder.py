"""Mask decoders of Segment Anything (Kirillov et al., 2023) and of Light HQ-SAM (Ke et al., 2023).

Image embedding and prompt embeddings become masks, as 4 x 4 logits for each image token, and their
predicted IoU, after a transformer of cross attention both ways. Every grid size and any number of
prompts will do.

Shapes: N prompts, T tokens of a prompt, K masks, C channels, h w the image embedding's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.modules import LayerNorm2d
from tinyvit.modules.functional import attend, is_tracing


class MLP(nn.Module):
    """Linear layers with ReLU between them, and a sigmoid at the end if asked for."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int,
        sigmoid_output: bool = False,
    ) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.num_layers = num_layers
        self.layers = nn.ModuleList(nn.Linear(widths[i], widths[i + 1]) for i in range(num_layers))
        self.sigmoid_output = sigmoid_output

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_dim] -> [..., output_dim]."""
        for index, layer in enumerate(self.layers):
            x = layer(x) if index == self.num_layers - 1 else F.relu(layer(x))
        return x.sigmoid() if self.sigmoid_output else x


class MaskDecoder(nn.Module):
    """Masks of prompts, and their predicted IoU.

    Args:
        transformer_dim: Channels C of the image embedding.
        transformer: A ``TwoWayTransformer`` of that width.
        num_multimask_outputs: Masks for an ambiguous prompt; one more is made for a clear one.
        activation: Class of the activation between the upscalings.
        iou_head_depth: Linear layers of the quality head.
        iou_head_hidden_dim: Its hidden width.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        dim = transformer_dim
        self.transformer_dim = dim
        self.transformer = transformer
        self.num_multimask_outputs = num_multimask_outputs
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, dim)
        self.output_upscaling = _upscaling(dim, dim // 4, dim // 8, activation)
        self.output_upscaling.append(activation())
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, dim, dim // 8, 3) for _ in range(self.num_mask_tokens)
        )
        widths = dim, iou_head_hidden_dim, self.num_mask_tokens
        self.iou_prediction_head = MLP(*widths, iou_head_depth)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Predict masks.

        Args:
            image_embeddings: [1, C, h, w] of one image for all prompts, or [N, C, h, w].
            image_pe: [1, C, h, w], from ``PromptEncoder.get_dense_pe``.
            sparse_prompt_embeddings: [N, T, C]; N may be 0.
            dense_prompt_embeddings: [N, C, h, w].
            multimask_output: Return the masks of an ambiguous prompt instead of the single one.

        Returns:
            (low-res logits [N, K, 4h, 4w], predicted IoU [N, K]), K = ``num_multimask_outputs``
            or 1. The IoU is unbounded: no sigmoid.

        Raises:
            ValueError: The shapes do not go together.
        """
        masks, iou_predictions = self.predict_masks(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
        )
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, chosen], iou_predictions[:, chosen]

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """All masks of all prompts, the single one first; arguments and errors as for ``forward``.

        Returns:
            (low-res logits [N, num_mask_tokens, 4h, 4w], predicted IoU [N, num_mask_tokens]).
        """
        own = torch.cat((self.iou_token.weight, self.mask_tokens.weight))
        tokens, image = self.attend(
            own, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
        )
        masks = multiply_masks(self.hypernetworks(tokens[:, 1:]), self.output_upscaling(image))
        return masks, self.iou_prediction_head(tokens[:, 0])

    def attend(
        self, own: Tensor, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Own tokens [S, C] and the prompts' -> own tokens [N, S, C], image tokens [N, C, h, w]."""
        if not (is_tracing() or torch.compiler.is_compiling()):  # sizes are tensors there
            self._check(image_embeddings, image_pe, sparse, dense)
        count = sparse.shape[0]
        tokens = torch.cat((own.expand(count, -1, -1), sparse.to(own.dtype)), dim=1)
        source = image_embeddings + dense  # [N, C, h, w]
        tokens, image = self.transformer(source, image_pe, tokens)
        return tokens[:, : own.shape[0]], image.transpose(1, 2).reshape(source.shape)

    def hypernetworks(self, tokens: Tensor) -> Tensor:
        """Each mask token by its own MLP: [N, K, C] -> [N, K, C / 8]."""
        mlps = self.output_hypernetworks_mlps
        return torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(mlps)], dim=1)

    def _check(self, image: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> None:
        count, channels = sparse.shape[0], self.transformer_dim
        grid = image.shape[2:]
        if (
            image.ndim != 4
            or sparse.ndim != 3
            or image.shape[0] not in (1, count)
            or {image.shape[1], sparse.shape[2]} != {channels}
            or dense.shape != (count, channels, *grid)
            or image_pe.shape[1:] != (channels, *grid)
            or image_pe.shape[0] not in (1, count)
        ):
            raise ValueError(
                f"for N prompts the mask decoder wants image_embeddings [1 or N, {channels}, h, w],"
                f" image_pe [1, {channels}, h, w], sparse_prompt_embeddings [N, T, {channels}] and "
                f"dense_prompt_embeddings [N, {channels}, h, w]; got {list(image.shape)}, "
                f"{list(image_pe.shape)}, {list(sparse.shape)} and {list(dense.shape)}"
            )


def multiply_masks(hyper: Tensor, upscaled: Tensor) -> Tensor:
    """[N, K, c] and [N, c, H, W] -> the products [N, K, H, W]."""
    masks = hyper @ upscaled.flatten(2)
    return masks.reshape(*masks.shape[:2], *upscaled.shape[2:])


class HQMaskDecoder(MaskDecoder):
    """A mask decoder that corrects its best mask by a high-quality one.

    ``vit_dim`` are the channels D of the encoder's early map; all other arguments are those of
    ``MaskDecoder``.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        vit_dim: int = 160,
    ) -> None:
        super().__init__(
            transformer_dim=transformer_dim,
            transformer=transformer,
            num_multimask_outputs=num_multimask_outputs,
            activation=activation,
            iou_head_depth=iou_head_depth,
            iou_head_hidden_dim=iou_head_hidden_dim,
        )
        dim, quarter, eighth = transformer_dim, transformer_dim // 4, transformer_dim // 8
        self.vit_dim = vit_dim
        self.hf_token = nn.Embedding(1, dim)
        self.hf_mlp = MLP(dim, dim, eighth, 3)
        self.compress_vit_feat = _upscaling(vit_dim, dim, eighth)
        self.embedding_encoder = _upscaling(dim, quarter, eighth)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(eighth, quarter, kernel_size=3, padding=1),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.Conv2d(quarter, eighth, kernel_size=3, padding=1),
        )

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        hq_token_only: bool = False,
        interm_embeddings: Tensor | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict one mask for each prompt; the first four arguments as in ``MaskDecoder.forward``.

        ``multimask_output`` corrects the mask of the highest predicted IoU among those of an
        ambiguous prompt, instead of the single one; ``hq_token_only`` returns the high-quality mask
        alone. ``interm_embeddings`` is the encoder's early map [1 or N, h, w, D], as
        ``TinyViT.forward_hq`` gives it, or a list that begins with it.

        Returns:
            (low-res logits [N, 1, 4h, 4w], predicted IoU [N, 1]). The IoU is that of the mask
            that is corrected: the high-quality one has none of its own.

        Raises:
            ValueError: The shapes do not go together, or there is no early map.
        """
        prompts = sparse_prompt_embeddings, dense_prompt_embeddings
        masks, iou_predictions = self.predict_masks(
            image_embeddings, image_pe, *prompts, interm_embeddings
        )
        plain, fine = masks[:, :-1], masks[:, -1:]
        if multimask_output:
            iou_predictions, best = iou_predictions[:, 1:].max(dim=1, keepdim=True)
            rows = torch.arange(masks.shape[0], device=masks.device)
            plain = plain[rows, best[:, 0] + 1].unsqueeze(1)
        else:
            iou_predictions, plain = iou_predictions[:, :1], plain[:, :1]
        return (fine if hq_token_only else plain + fine), iou_predictions

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        interm_embeddings: Tensor | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All masks of all prompts, the high-quality one last; arguments as in ``forward``.

        Returns:
            (low-res logits [N, num_mask_tokens + 1, 4h, 4w], predicted IoU [N, num_mask_tokens]).
        """
        early = self._early_map(interm_embeddings, image_embeddings, sparse_prompt_embeddings)
        own = torch.cat((self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight))
        tokens, image = self.attend(
            own, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
        )
        upscaled = self.output_upscaling(image)
        masks = multiply_masks(self.hypernetworks(tokens[:, 1:-1]), upscaled)
        detail = self.embedding_encoder(image_embeddings) + self.compress_vit_feat(early)
        fine = self.embedding_maskfeature(upscaled) + detail
        fine_mask = multiply_masks(self.hf_mlp(tokens[:, -1:]), fine)
        return torch.cat((masks, fine_mask), dim=1), self.iou_prediction_head(tokens[:, 0])

    def _early_map(
        self, given: Tensor | Sequence[Tensor] | None, image: Tensor, sparse: Tensor
    ) -> Tensor:
        """The early map as [1 or N, D, h, w]."""
        early = given if given is None or isinstance(given, Tensor) else given[0]
        wanted = f"[1 or N, {image.shape[2]}, {image.shape[3]}, {self.vit_dim}]"
        if early is None:
            raise ValueError(
                f"HQMaskDecoder wants interm_embeddings, the encoder's early map {wanted}; "
                "TinyViT.forward_hq gives it beside the image embedding"
            )
        is_dynamic = is_tracing() or torch.compiler.is_compiling()  # sizes are tensors there
        wanted_shapes = [(n, *image.shape[2:], self.vit_dim) for n in (1, sparse.shape[0])]
        if not is_dynamic and early.shape not in wanted_shapes:
            raise ValueError(f"interm_embeddings must be {wanted}, got {list(early.shape)}")
        return early.permute(0, 3, 1, 2)


def _upscaling(
    into: int, middle: int, out: int, activation: type[nn.Module] = nn.GELU
) -> nn.Sequential:
    """Four times the size in two steps."""
    return nn.Sequential(
        nn.ConvTranspose2d(into, middle, kernel_size=2, stride=2),
        LayerNorm2d(middle),
        activation(),
        nn.ConvTranspose2d(middle, out, kernel_size=2, stride=2),
    )


class Attention(nn.Module):
    """Attention of queries, keys and values of ``embedding_dim // downsample_rate`` channels."""

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        if self.internal_dim % num_heads:
            raise ValueError(
                f"num_heads must divide embedding_dim // downsample_rate = {self.internal_dim}, "
                f"got {num_heads}"
            )
        self.q_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.k_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.v_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.out_proj = nn.Linear(self.internal_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [B, Tq, C] to keys and values [B, Tk, C] -> [B, Tq, C]."""
        width = self.internal_dim // self.num_heads
        q, k, v = (  # [B, heads, T, C']
            x.reshape(x.shape[0], x.shape[1], self.num_heads, width).transpose(1, 2)
            for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        out = attend(q, k, v, width**-0.5)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).flatten(2)))


class _MLPBlock(nn.Module):
    """Two linear layers, under Segment Anything's key names."""

    def __init__(self, embedding_dim: int, mlp_dim: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embedding_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embedding_dim)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.lin2(self.act(self.lin1(x))))


class TwoWayAttentionBlock(nn.Module):
    """Tokens to tokens, tokens to image, MLP on the tokens, image to tokens.

    ``skip_first_layer_pe`` leaves the position out of the first attention, and its residual too:
    the first block's tokens are their own positions.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int = 2048,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
        skip_first_layer_pe: bool = False,
    ) -> None:
        super().__init__()
        rate = attention_downsample_rate
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, rate)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = _MLPBlock(embedding_dim, mlp_dim, activation)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, rate)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, C], image tokens [B, L, C] and the positions of each -> both."""
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)
        k = keys + key_pe
        queries = queries + self.cross_attn_token_to_image(queries + query_pe, k, keys)
        queries = self.norm2(queries)
        queries = self.norm3(queries + self.mlp(queries))
        keys = keys + self.cross_attn_image_to_token(k, queries + query_pe, queries)
        return queries, self.norm4(keys)


class TwoWayTransformer(nn.Module):
    """Blocks of both ways, then a last attention of the tokens to the image.

    Args:
        depth: Blocks.
        embedding_dim: Channels C.
        num_heads: Heads of all attentions.
        mlp_dim: Hidden width of the MLPs.
        activation: Class of the MLPs' activation.
        attention_downsample_rate: C over the inner width of the attentions across.
    """

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
    ) -> None:
        super().__init__()
        rate = attention_downsample_rate
        self.depth = depth
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(embedding_dim, num_heads, mlp_dim, activation, rate, index == 0)
            for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, rate)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(
        self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Let tokens and image attend to each other.

        Args:
            image_embedding: [B, C, h, w].
            image_pe: [B or 1, C, h, w], positions of the image tokens.
            point_embedding: [B, T, C], the tokens; they are their own positions.

        Returns:
            (tokens [B, T, C], image tokens [B, h * w, C], row by row).
        """
        keys = image_embedding.flatten(2).transpose(1, 2)  # [B, L, C]
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries, keys, point_embedding, key_pe)
        out = self.final_attn_token_to_image(queries + point_embedding, keys + key_pe, keys)
        queries = self.norm_final_attn(queries + out)
        return queries, keys
