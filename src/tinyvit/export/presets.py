"""What each consumer loads: one row of plain data for each.

The decoder's inputs, where a row says nothing else (segment-anything's exporter has them so):

================== =================== =========================================================
image_embeddings   [1, 256, g, g]      g = side / 16
point_coords       [1, P, 2]           x, y in the input's pixels; no 0.5 added by the caller
point_labels       [1, P]              1, 0, -1 padding, 2 and 3 a box's corners
mask_input         [1, 1, 4g, 4g]      earlier logits
has_mask_input     [1]                 above 0.5 means given
orig_im_size       [2]                 height, width of the image
================== =================== =========================================================

All float32. Outputs: masks [1, K, H, W] logits, iou_predictions [1, K], low_res_masks
[1, K, 4g, 4g]; K = 4, or 1 with the best mask alone. P is free, or fixed where the export says so;
with many prompts in a call the first axis of points and outputs is their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DECODER_INPUTS = (
    "image_embeddings",
    "point_coords",
    "point_labels",
    "mask_input",
    "has_mask_input",
    "orig_im_size",
)
DECODER_OUTPUTS = ("masks", "iou_predictions", "low_res_masks")

_PADDING = (
    "This client appends a padding point also to a box, where segment-anything has none, so masks "
    "of a box may differ from SamPredictor's. It is the client's prompt, not the file."
)


@dataclass(frozen=True)
class Preset:
    """What one consumer relies on.

    Attributes:
        name: As ``--for`` takes it.
        consumer: Who loads it, with the version that was tried.
        encoder: File of the encoder; None for none. ``{name}`` is the model's name.
        decoder: File of the decoder.
        layout: What the encoder takes: "nchw" normalised, "hwc" RGB in 0..255.
        encoder_input: Name of its input.
        encoder_output: Name of its output.
        side: The input's side; None keeps that of the weights.
        is_static: The encoder's input has a fixed size.
        single_mask: The decoder gives the best mask alone.
        masks: "full", "low-res" or "crop", as ``DecoderGraph``.
        outputs: Names of the decoder's outputs.
        storage: How weights are stored.
        style: "sam", or "transformers" for that library's own pair, "openvino" for IR files,
            "torch" for programs of torch.export.
        note: What its user must know.
        takes_parts: It also takes an encoder, a classifier or features alone.
    """

    name: str
    consumer: str
    encoder: str | None = "encoder.onnx"
    decoder: str = "decoder.onnx"
    layout: Literal["nchw", "hwc"] = "nchw"
    encoder_input: str = "images"
    encoder_output: str = "image_embeddings"
    side: int | None = 1024
    is_static: bool = False
    single_mask: bool = True
    masks: Literal["full", "low-res", "crop"] = "full"
    outputs: tuple[str, ...] = DECODER_OUTPUTS
    storage: Literal["fp32", "fp16"] = "fp32"
    style: Literal["sam", "transformers", "openvino", "torch"] = "sam"
    note: str = ""
    takes_parts: bool = False


_NAMED = ("{name}.encoder.onnx", "{name}.decoder.onnx")
_CVAT = ("masks", "iou_predictions", "low_res_masks", "xtl", "ytl", "xbr", "ybr")

PRESETS = {
    row.name: row
    for row in (
        Preset("tinyvit", "tinyvit.Segmenter, tinyvit.Engine", side=None, single_mask=False,
               takes_parts=True),
        Preset("sam", "segment-anything's notebook and web demo (decoder only)", encoder=None,
               note="The embedding is a .npy file of float32 [1, 256, 64, 64]."),
        Preset("samexporter", "samexporter 0.5.0, AnyLabeling 0.4.43", *_NAMED, layout="hwc",
               encoder_input="input_image", note=_PADDING),
        Preset("x-anylabeling", "X-AnyLabeling 4.2.1", *_NAMED, layout="hwc",
               encoder_input="input_image", note=_PADDING),
        Preset("osam", "osam 0.8.1 (labelme)", encoder_input="x", is_static=True,
               note="osam finds files by their sha256; README.txt has the class to write."),
        Preset("cvat", "CVAT's SAM plugin (decoder in the browser)", masks="crop", outputs=_CVAT,
               note="The function id is fixed by CVAT: pth-facebookresearch-sam-vit-h."),
        Preset("transformers.js", "transformers.js 4.3.2, optimum", style="transformers",
               encoder="onnx/vision_encoder.onnx", decoder="onnx/prompt_encoder_mask_decoder.onnx",
               encoder_input="pixel_values", side=None, single_mask=False,
               outputs=("iou_scores", "pred_masks"), note="Points alone: it has no boxes."),
        Preset("web", "onnxruntime-web >= 1.20", side=None, masks="low-res", storage="fp16",
               outputs=DECODER_OUTPUTS[1:], takes_parts=True),
        Preset("tensorrt", "trtexec, nanosam; static accelerators", encoder_input="image",
               is_static=True, masks="low-res", outputs=DECODER_OUTPUTS[1:], takes_parts=True,
               note="Keep LayerNorm in fp32."),
        Preset("openvino", "OpenVINO >= 2025.0", side=None, single_mask=False, style="openvino",
               encoder="encoder.xml", decoder="decoder.xml", takes_parts=True),
        Preset("torch", "torch.export.load: AOTInductor, ExecuTorch", side=None, style="torch",
               encoder="encoder.pt2", decoder="decoder.pt2", is_static=True, single_mask=False,
               masks="low-res", outputs=DECODER_OUTPUTS[1:], takes_parts=True,
               note="Programs of torch.export, of fixed size but for the number of points. "
                    "'tinyvit verify' needs torch for them."),
    )
}  # fmt: skip


def get_preset(name: str) -> Preset:
    """The row of a preset.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
