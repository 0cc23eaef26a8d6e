"""Mobile inverted bottleneck convolution (Sandler et al., CVPR 2018), the block of stage 1."""

from __future__ import annotations

from torch import Tensor, nn

from .activate import activate
from .conv import Conv2d_BN
from .drop import DropPath
from .mlp import Activation

__all__ = ["MBConv"]


class MBConv(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, add the input, activate.

    Args:
        in_chans: Input channels.
        out_chans: Output channels; must equal ``in_chans``, since the input is added.
        expand_ratio: Hidden channels are ``int(in_chans * expand_ratio)``.
        activation: Makes the activations.
        drop_path: Probability of leaving the branch out in training.

    Raises:
        ValueError: ``in_chans`` and ``out_chans`` differ, or no hidden channel is left.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        expand_ratio: float,
        activation: Activation,
        drop_path: float,
    ) -> None:
        super().__init__()
        if in_chans != out_chans:
            raise ValueError(
                f"MBConv adds its input to its output, so out_chans must equal in_chans; "
                f"got in_chans={in_chans}, out_chans={out_chans}"
            )
        if int(in_chans * expand_ratio) < 1:
            raise ValueError(
                f"expand_ratio must leave at least 1 hidden channel, got {expand_ratio} for "
                f"in_chans={in_chans}"
            )
        self.in_chans = in_chans
        self.out_chans = out_chans
        self.hidden_chans = int(in_chans * expand_ratio)
        self.conv1 = Conv2d_BN(in_chans, self.hidden_chans, ks=1)
        self.act1 = activation()
        self.conv2 = Conv2d_BN(
            self.hidden_chans, self.hidden_chans, ks=3, pad=1, groups=self.hidden_chans
        )
        self.act2 = activation()
        self.conv3 = Conv2d_BN(self.hidden_chans, out_chans, ks=1, bn_weight_init=0.0)
        self.act3 = activation()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        y = activate(self.act1, self.conv1(x))
        y = activate(self.act2, self.conv2(y))
        y = self.drop_path(self.conv3(y))
        return activate(self.act3, x + y)
