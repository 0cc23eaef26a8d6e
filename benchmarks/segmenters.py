"""What runs in a contestant's process of ``everything.py``, one process for each.

Each maker makes one project's whole SAM ready, with the same weights, and returns the call to time:
the masks of everything in one image, or the masks of a list of prompts. ``mask_agreement.py`` says
how what they give is compared; ``sam_weights.py`` where the weights come from.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from contestants import keep_freed_memory
from mask_agreement import MaskSet

from tinyvit.bench import serve

SAM_PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}


def prompts_of(height, width):
    """Prompts for an image of any content, as arguments of ``SamPredictor.predict``.

    Nine clicks; a click with a second one that is background; a box; a box with a click.
    """
    shares = (0.2, 0.5, 0.8)
    clicks = [(x * width, y * height) for y in shares for x in shares]
    for click in clicks:
        yield {"point_coords": np.array([click]), "point_labels": np.array([1])}
    for here, there in ((4, 0), (2, 6), (7, 1)):
        both = np.array([clicks[here], clicks[there]])
        yield {"point_coords": both, "point_labels": np.array([1, 0])}
    for share in (0.1, 0.25, 0.4):
        box = np.array([share * width, 0.3 * height, 0.9 * width, (1 - share) * height])
        yield {"box": box, "multimask_output": False}
        inside = np.array([(box[:2] + box[2:]) / 2])
        yield {"box": box, "point_coords": inside, "point_labels": np.array([1])}


def ask_all(predictor, image):
    """Masks [N, H, W] and scores [N] of all prompts; each click is refined by its best mask."""
    predictor.set_image(image)
    masks, scores = [], []
    for prompt in prompts_of(*image.shape[:2]):
        found = [predictor.predict(**prompt)]
        if "box" not in prompt:
            best = found[0][2][np.argmax(found[0][1])][None]
            found.append(predictor.predict(**prompt, mask_input=best, multimask_output=False))
        masks += [row for one in found for row in one[0]]
        scores += [score for one in found for score in one[1]]
    return MaskSet.of_masks(masks, scores)


def make(spec: Mapping[str, object]):
    """From {"name", "job", "folder", "variant", "size", "threads", "arguments"} to a call."""
    import torch

    name, _, setting = spec["name"].partition("+")
    facts = {"allocator": keep_freed_memory()} if setting == "mallopt" else {}
    if setting not in ("", "mallopt"):
        raise ValueError(f"unknown setting {setting!r} of {spec['name']}; there is mallopt")
    kind, _, rest = name.partition("-")
    if kind not in MAKERS:
        raise ValueError(f"unknown contestant {name!r}; there are {', '.join(MAKERS)}")
    torch.set_num_threads(spec["threads"])
    image = np.load(Path(spec["folder"]) / "picture.npy")
    predictor, generator = MAKERS[kind](spec, rest)
    if spec["job"] == "prompts":
        return lambda: ask_all(predictor(), image), facts
    everything = generator(**spec["arguments"])
    return lambda: MaskSet.of_records(everything.generate(image)), facts


def _mobile_sam(spec, rest):
    """MobileSAM's own classes, built at the sizes of the weights."""
    importlib.import_module("torchvision_stub")  # before anything that imports torchvision
    importlib.import_module("nms_kernel")
    import mobile_sam
    from mobile_sam import modeling
    from safetensors.torch import load_file

    from tinyvit.catalog import get_variant

    row, size = get_variant(spec["variant"]), spec["size"]
    encoder = modeling.TinyViT(
        img_size=size,
        embed_dims=list(row.embed_dims),
        depths=list(row.depths),
        num_heads=list(row.num_heads),
        window_sizes=list(row.window_sizes),
        drop_path_rate=0.0,
    )
    if size != 1024:
        _let_any_size_through(encoder, row.strides)
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    sam = modeling.Sam(
        encoder,
        modeling.PromptEncoder(
            embed_dim=256,
            image_embedding_size=(size // 16, size // 16),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        modeling.MaskDecoder(
            transformer_dim=256,
            transformer=transformer,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        **SAM_PIXELS,
    )
    missing, unexpected = sam.load_state_dict(
        load_file(Path(spec["folder"]) / "sam.safetensors"), strict=False
    )
    unused = ("attention_bias_idxs", "norm_head.weight", "norm_head.bias", "head.weight")
    missing = [key for key in missing if not key.endswith((*unused, "head.bias"))]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"mobile_sam wants other keys: {missing[:5]}, {unexpected[:5]} over")
    sam.train().eval()  # it keeps a table of biases, which eval() makes from the new weights
    return (
        lambda: mobile_sam.SamPredictor(sam),
        lambda **arguments: mobile_sam.SamAutomaticMaskGenerator(sam, **arguments),
    )


def _let_any_size_through(encoder, strides):
    """The same steps as its own forward, but for a grid that it has fixed at 64x64.

    Strides too: it guesses them from numbers of channels, and knows those of three models only.
    """
    for layer, stride in zip(list(encoder.layers)[:-1], strides, strict=True):
        layer.downsample.conv2.c.stride = (stride, stride)

    def forward(images):
        tokens = encoder.patch_embed(images)
        for layer in encoder.layers:
            tokens = layer(tokens)
        batch, _, channels = tokens.size()
        grid = [side // 16 for side in images.shape[-2:]]
        return encoder.neck(tokens.view(batch, *grid, channels).permute(0, 3, 1, 2))

    encoder.forward = forward


def _tinyvit(spec, rest):
    """``rest`` is a precision, or a backend and a precision."""
    from tinyvit.sam import SamAutomaticMaskGenerator, SamPredictor, build_sam

    *backend, precision = (rest or "fp32").split("-")
    choice = {"backend": backend[0] if backend else "torch", "precision": precision}
    sam = build_sam(Path(spec["folder"]) / "sam.safetensors")
    return (
        lambda: SamPredictor(sam, **choice),
        lambda **arguments: SamAutomaticMaskGenerator(sam, **arguments, **choice),
    )


def _make_any(spec):
    if spec["name"] == "prepare":
        from sam_weights import write_weights

        write_weights(Path(spec["folder"]), spec["weights"], spec["pictures"])
        return (lambda: np.zeros(0)), {}
    return make(spec)


MAKERS = {"mobile_sam": _mobile_sam, "tinyvit": _tinyvit}

if __name__ == "__main__":
    serve(_make_any)
