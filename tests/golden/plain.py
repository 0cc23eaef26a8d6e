"""A second, plain TinyViT to compare with: functions over a state dict, loops over windows.

It shares no line with the package and is written from the description alone: float64, batch norm
as a formula, softmax by hand, the bias of two tokens by a double loop, one window at a time.

Shapes: B batch, C channels, H W height and width, N tokens of a window, S window side.
"""

import functools
import math

import torch
import torch.nn.functional as F


def tiny_vit(state, x, *, num_heads, window_sizes, strides, pointwise=False, output="neck"):
    """The network that ``state`` (canonical keys) and the numbers describe, in eval mode.

    Args:
        state: State dict.
        x: [B, in_chans, H, W].
        num_heads: Heads of each stage.
        window_sizes: Window side of each stage.
        strides: Stride of each merge.
        pointwise: The stem is two 1x1 convolutions of stride 1.
        output: "neck", "logits" or "maps" (each stage's map before its merge).
    """
    state = {key: value.double() for key, value in state.items()}
    stride, pad = (1, 0) if pointwise else (2, 1)
    x = conv_bn(state, "patch_embed.seq.0", x.double(), stride, pad)
    x = conv_bn(state, "patch_embed.seq.2", gelu(x), stride, pad)
    maps = []
    for i in range(len(num_heads)):
        j = 0
        while any(key.startswith(f"layers.{i}.blocks.{j}.") for key in state):
            name = f"layers.{i}.blocks.{j}"
            args = (num_heads[i], window_sizes[i])
            x = block(state, name, x, *args) if i else mbconv(state, name, x)
            j += 1
        maps.append(x)
        if i < len(strides):
            x = merge(state, f"layers.{i}.downsample", x, strides[i])
    if output == "maps":
        return maps
    if output == "logits":
        x = layer_norm(state, "norm_head", x.mean((2, 3)))
        return linear(state, "head", x)
    x = F.conv2d(x, state["neck.0.weight"])
    x = layer_norm(state, "neck.1", x.movedim(1, 3), 1e-6).movedim(3, 1)
    x = F.conv2d(x, state["neck.2.weight"], padding=1)
    return layer_norm(state, "neck.3", x.movedim(1, 3), 1e-6).movedim(3, 1)


def conv_bn(state, name, x, stride=1, pad=0, depthwise=False):
    groups = x.shape[1] if depthwise else 1
    x = F.conv2d(x, state[f"{name}.c.weight"], None, stride, pad, 1, groups)
    scale = state[f"{name}.bn.weight"] / (state[f"{name}.bn.running_var"] + 1e-5).sqrt()
    shift = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def mbconv(state, name, x):
    y = gelu(conv_bn(state, f"{name}.conv1", x))
    y = gelu(conv_bn(state, f"{name}.conv2", y, 1, 1, depthwise=True))
    return gelu(x + conv_bn(state, f"{name}.conv3", y))


def merge(state, name, x, stride):
    x = gelu(conv_bn(state, f"{name}.conv1", x))
    x = gelu(conv_bn(state, f"{name}.conv2", x, stride, 1, depthwise=True))
    return conv_bn(state, f"{name}.conv3", x)


def block(state, name, x, heads, side):
    x = x.clone()
    height, width = x.shape[2:]
    attended = torch.zeros_like(x)
    for top in range(0, height, side):
        for left in range(0, width, side):
            seen = x[:, :, top : top + side, left : left + side]
            rows, columns = seen.shape[2:]
            window = x.new_zeros(x.shape[0], x.shape[1], side, side)
            window[:, :, :rows, :columns] = seen
            tokens = window.flatten(2).movedim(1, 2)  # [B, N, C]
            tokens = attention(state, f"{name}.attn", tokens, heads, (side, side))
            window = tokens.movedim(2, 1).unflatten(2, (side, side))
            attended[:, :, top : top + rows, left : left + columns] = window[:, :, :rows, :columns]
    x = x + attended
    kernel = state[f"{name}.local_conv.c.weight"].shape[-1]
    x = conv_bn(state, f"{name}.local_conv", x, 1, kernel // 2, depthwise=True)
    y = layer_norm(state, f"{name}.mlp.norm", x.movedim(1, 3))
    y = linear(state, f"{name}.mlp.fc2", gelu(linear(state, f"{name}.mlp.fc1", y)))
    return x + y.movedim(3, 1)


def attention(state, name, x, heads, resolution):
    """[B, N, C] -> [B, N, C]; each head's q, k, v lie side by side in ``qkv``."""
    table = state[f"{name}.attention_biases"]
    qkv = linear(state, f"{name}.qkv", layer_norm(state, f"{name}.norm", x))
    per_head = qkv.shape[2] // heads
    value_width = state[f"{name}.proj.weight"].shape[1] // heads
    key_width = (per_head - value_width) // 2
    outputs = []
    for head in range(heads):
        own = qkv[:, :, head * per_head : (head + 1) * per_head]
        q, k, v = own.split((key_width, key_width, value_width), dim=2)
        scores = q @ k.movedim(1, 2) / math.sqrt(key_width) + bias(table[head], resolution)
        weights = torch.exp(scores - scores.amax(2, keepdim=True))
        outputs.append(weights / weights.sum(2, keepdim=True) @ v)
    return linear(state, f"{name}.proj", torch.cat(outputs, 2))


def bias(table, resolution):
    """[H*W] -> [N, N]: entry (p, q) is table[|dy| * W + |dx|]."""
    return table[bias_index(*resolution)]


@functools.cache
def bias_index(height, width):
    places = [(y, x) for y in range(height) for x in range(width)]
    return torch.tensor([[abs(y - v) * width + abs(x - u) for v, u in places] for y, x in places])


def layer_norm(state, name, x, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
