"""Lets torchvision be imported beside a build of torch that its compiled library does not fit.

timm and mobile_sam import torchvision for things that encoding an image never uses. Its Python
files register shape rules and gradients for operators that the compiled library would define; all
they need is that the operators exist. So their signatures are declared here, without any code
behind them: calling one fails. Import this module before timm or mobile_sam.
"""

import torch

_POOL = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SHAPE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_GRADIENT = _POOL.replace("Tensor input", "Tensor grad")
_DEFORM = (
    "Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask"
)
_BOXES = "Tensor dets, Tensor scores, float iou_threshold"

# operator: (arguments, tensors that it gives)
OPERATORS = {
    "nms": (_BOXES, 1),
    "qnms": (_BOXES, 1),
    "roi_align": (f"{_POOL}, int sampling_ratio, bool aligned", 1),
    "_roi_align_backward": (f"{_GRADIENT}, {_SHAPE}, int sampling_ratio, bool aligned", 1),
    "roi_pool": (_POOL, 2),
    "_roi_pool_backward": (
        f"{_GRADIENT.replace('rois,', 'rois, Tensor argmax,')}, {_SHAPE}",
        1,
    ),
    "ps_roi_align": (f"{_POOL}, int sampling_ratio", 2),
    "_ps_roi_align_backward": (
        f"{_GRADIENT.replace('rois,', 'rois, Tensor channel_mapping,')}, int sampling_ratio, "
        f"{_SHAPE}",
        1,
    ),
    "ps_roi_pool": (_POOL, 2),
    "_ps_roi_pool_backward": (
        f"{_GRADIENT.replace('rois,', 'rois, Tensor channel_mapping,')}, {_SHAPE}",
        1,
    ),
    "deform_conv2d": (f"Tensor input, {_DEFORM}", 1),
    "_deform_conv2d_backward": (f"Tensor grad, Tensor input, {_DEFORM}", 5),
}


def schema(name: str) -> str:
    """The operator's signature as torch writes it."""
    arguments, number = OPERATORS[name]
    given = "Tensor" if number == 1 else f"({', '.join(['Tensor'] * number)})"
    return f"{name}({arguments}) -> {given}"


def declare() -> torch.library.Library:
    """Declare what is not declared yet; the declarations live as long as what is returned."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema(name))
    return library


_LIBRARY = declare()
