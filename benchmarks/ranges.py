"""The range of values inside a model, for comparison with float16, which ends at 65504.

Hooks on every layer of the plain model, in float32. The largest magnitude is noted for each
kind of value, also for what is only there within an operator: scores before softmax, and the sum of
squares within LayerNorm.
"""

from collections import defaultdict

import torch

from tinyvit.modules import (
    Attention,
    Conv2d_BN,
    LayerNorm2d,
    MBConv,
    Mlp,
    PatchMerging,
    TinyViTBlock,
)

FLOAT16_MAX = 65504.0


class Ranges:
    """Notes the largest magnitudes in a model while it runs.

    Args:
        model: The model; it gets hooks.
    """

    def __init__(self, model):
        self.largest = defaultdict(float)
        for name, module in model.named_modules():
            self._watch(name, module)

    def note(self, kind, values):
        """Keep the largest magnitude of a kind."""
        if values.numel():
            self.largest[kind] = max(self.largest[kind], float(values.abs().max()))

    def _watch(self, name, module):
        if isinstance(module, Conv2d_BN):
            self._outputs(module.c, "a convolution before its batch norm")
            self._outputs(module, "stem" if name.startswith("patch_embed") else "convolution")
        elif isinstance(module, MBConv):
            self._outputs(module.conv2, "MBConv hidden")
            self._outputs(module, "MBConv output")
        elif isinstance(module, PatchMerging):
            self._outputs(module.conv3, "merge output")
        elif isinstance(module, Attention):
            self._outputs(module.qkv, "query, key, value")
            module.qkv.register_forward_hook(lambda _, __, out: self._scores(module, out))
            self._outputs(module.proj, "attention output")
            self._inputs(module.norm, "block")
        elif isinstance(module, Mlp):
            self._outputs(module.fc1, "perceptron hidden")
            self._outputs(module.fc2, "perceptron output")
            self._inputs(module.norm, "block")
        elif isinstance(module, TinyViTBlock):
            self._outputs(module, "block output")
        elif isinstance(module, LayerNorm2d):
            self._inputs(module, "neck", axis=1)
            module.register_forward_pre_hook(lambda _, x: self.note("neck before a norm", x[0]))
            self._outputs(module, "neck behind a norm")

    def _outputs(self, module, kind):
        module.register_forward_hook(lambda _, __, out: self.note(kind, out))

    def _inputs(self, norm, place, axis=-1):
        def look(_, inputs):
            centred = inputs[0] - inputs[0].mean(axis, keepdim=True)
            self.note(f"sum of squares in a {place}'s LayerNorm", centred.square().sum(axis))

        norm.register_forward_pre_hook(look)

    def _scores(self, attention, qkv):
        widths = (attention.key_dim, attention.key_dim, attention.d)
        heads = qkv.unflatten(2, (attention.num_heads, sum(widths))).transpose(1, 2)
        q, k, _ = heads.split(widths, dim=-1)
        product = q @ k.transpose(-1, -2)
        self.note("scores before their scale", product)
        self.note("scores", product * attention.scale + attention.bias())


def largest_values(model, batches):
    """From kind to the largest magnitude over all batches [N, C, H, W]."""
    ranges = Ranges(model)
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    return dict(ranges.largest)
