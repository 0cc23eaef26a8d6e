"""The two-layer perceptron of a transformer block, with its layer norm in front."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["MLP", "Activation", "Mlp"]

Activation = Callable[[], nn.Module]
"""A class (or function) without arguments that makes an activation module, e.g. ``nn.GELU``."""


class Mlp(nn.Module):
    """``norm`` -> ``fc1`` -> ``act`` -> ``drop`` -> ``fc2`` -> ``drop``; [..., in] -> [..., out].

    Args:
        in_features: Input width.
        hidden_features: Hidden width; None means ``in_features``.
        out_features: Output width; None means ``in_features``.
        act_layer: Makes the activation.
        drop: Dropout probability in training.
        activation: Another name for ``act_layer``, as later copies of the file spell it.

    Raises:
        ValueError: ``hidden_features`` is below 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Activation = nn.GELU,
        drop: float = 0.0,
        *,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        hidden_features = in_features if hidden_features is None else hidden_features
        if hidden_features < 1:
            raise ValueError(f"hidden_features must be at least 1, got {hidden_features}")
        self.norm = nn.LayerNorm(in_features)
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.act = (activation or act_layer)()
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        x = self.drop(self.act(self.fc1(self.norm(x))))
        y: Tensor = self.drop(self.fc2(x))
        return y


MLP = Mlp
