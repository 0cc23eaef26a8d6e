"""Weights for a whole SAM that finds objects, at two sizes, without a download.

``starter``: the first embedded weights, at their own size (256 pixels).

``5m``: the network of MobileSAM at 1024 pixels, for its speed. The encoder has the random weights
of ``weights.py``; its neck is fitted by least squares, so that its embedding of the given
images comes near that of the starter, enlarged from 16x16 to 64x64. Prompt encoder and mask
decoder are the starter's, with logits ten times as steep, as after a longer training. So masks have
realistic sizes and shapes; they say nothing about quality.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from weights import weights

import tinyvit
from tinyvit.checkpoints import from_canonical, read_state_dict, write_state_dict

STARTER = Path(__file__).parents[1] / "recipes" / "default_model" / "start" / "first.safetensors"
KINDS = {"starter": ("tiny_vit_2m_sam", 256), "5m": ("tiny_vit_5m_sam", 1024)}
HYPERNETWORKS = "mask_decoder.output_hypernetworks_mlps."
STEEPNESS = 10  # logits of the starter are flat, those of published weights reach 20 and more
PARTS = ("prompt_encoder.", "mask_decoder.")


def write_weights(folder: Path, kind: str, images: Sequence[str]) -> None:
    """Write ``sam.safetensors``, a whole SAM in MobileSAM's keys, float32.

    Raises:
        ValueError: ``kind`` is not one of ``KINDS``.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown weights {kind!r}; there are {', '.join(KINDS)}")
    starter = read_state_dict(STARTER).tensors
    state = {key: value.float() for key, value in starter.items()}
    if kind == "5m":
        state = {key: value for key, value in state.items() if key.startswith(PARTS)}
        encoder = from_canonical(fitted_encoder(images).state_dict(), "mobile_sam")
        state |= {key: value.detach().clone() for key, value in encoder.items()}
        for key in state:
            if key.startswith(HYPERNETWORKS) and ".layers.2." in key:
                state[key] = state[key] * STEEPNESS
    write_state_dict(folder / "sam.safetensors", state)


@torch.inference_mode()
def fitted_encoder(images: Sequence[str]) -> torch.nn.Module:
    """A 5M encoder of random weights whose neck gives nearly the starter's embedding."""
    small = tinyvit.create_model(checkpoint=STARTER)
    model = tinyvit.create_model("tiny_vit_5m_sam")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(v) for key, v in weights(shapes).items()})
    scale, shift = small.neck[3].weight[:, None, None], small.neck[3].bias[:, None, None]
    wanted = []
    engine = tinyvit.Engine(model, device="cpu")
    for features in tinyvit.Engine(small, device="cpu").embed(images):
        normal = (features - shift) / scale
        wanted.append(torch.nn.functional.interpolate(normal[None], (64, 64), mode="bilinear")[0])
    given = [engine.stages(image)[0][-1] for image in images]
    fitted = _fit(_rows(given), _rows(wanted))
    model.neck[0].weight.copy_(fitted[:, :, None, None])
    model.neck[1].weight.fill_(1)
    model.neck[1].bias.zero_()
    model.neck[2].weight.zero_()
    model.neck[2].weight[:, :, 1, 1] = torch.eye(256)
    model.neck[3].weight.copy_(small.neck[3].weight)
    model.neck[3].bias.copy_(small.neck[3].bias)
    return model


def _rows(maps: Sequence[Tensor]) -> Tensor:
    """Maps [C, h, w] of all images as [cells, C]."""
    return torch.cat([one.flatten(1).T for one in maps]).double()


def _fit(given: Tensor, wanted: Tensor) -> Tensor:
    """[256, C] float32: the linear map from rows to rows with the least squared error."""
    return torch.linalg.lstsq(given, wanted, driver="gelsd").solution.T.float()
