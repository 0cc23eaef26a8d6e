"""What exists: the network sizes (variants) and the published files of weights (checkpoints).

Two tables of plain data and four functions to look things up. No torch, no files, no network;
every row is a frozen dataclass. A *variant* says how a TinyViT is built, a *checkpoint* says
which file holds weights for it, who published the file, under which licence, and how it is
checked after a download.

Sizes, multiply-accumulates and published names are facts of the TinyViT and MobileSAM papers
and of the files themselves; GMAC are counted at the variant's own image size and include the
attention products, the neck where there is one, and the classification head only for
classification.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec

Task: TypeAlias = Literal["classification", "sam", "sam3"]
"""What a network is for: classes, the image encoder of SAM, or that of SAM 3 (EfficientSAM3). The
last merge's stride is 1 for SAM, else 2."""

Family: TypeAlias = Literal[
    "cream",
    "timm",
    "mobile_sam",
    "mobile_sam_v2",
    "mobile_sam_v2_decoder",
    "hq_sam",
    "tinysam",
    "litemedsam",
    "ultralytics",
    "micro_sam",
    "mmpretrain",
    "efficientsam3",
    "tinyvit",
    "tinyvit_sam",
]
"""Whose names a file of weights uses. ``tinyvit`` is this package's encoder or classifier alone,
``tinyvit_sam`` its encoder, prompt encoder and mask decoder together."""


_SIZES = ("embed_dims", "depths", "num_heads", "window_sizes", "strides", "stem", "neck_dim")


@dataclass(frozen=True)
class Variant:
    """One size of TinyViT: everything its constructor needs, and what it costs."""

    name: str  # to ask for; classification variants have timm's names
    embed_dims: tuple[int, ...]  # channels of the four stages
    depths: tuple[int, ...]  # blocks of the four stages
    num_heads: tuple[int, ...]  # of the four stages; the first is not used: stage 1 convolves
    window_sizes: tuple[int, ...]  # sides in tokens of the four stages; the first is not used
    strides: tuple[int, ...]  # of the three merges
    img_size: int  # side of the square image the weights were trained for, in pixels
    task: Task
    image_spec: ImageSpec  # how an image is prepared
    parameters: int  # how many, head and neck included where the variant has them
    gmacs: float  # giga multiply-accumulates for one image of ``img_size``
    num_classes: int = 1000  # outputs of the classification head
    drop_path_rate: float = 0.0  # stochastic depth used in training
    stem: Literal["conv", "pointwise"] = "conv"  # two 3x3 of stride 2, or two 1x1 of stride 1
    neck_dim: int | None = None  # output channels of the neck; None without a neck
    neck_size: int | None = None  # side of the map of EfficientSAM3's neck; None for any other
    head: bool = True  # whether ``norm_head`` and ``head`` exist

    def arguments(self) -> dict[str, object]:
        """The constructor arguments of ``TinyViT`` for this variant, a new dict of plain data."""
        others = "name", "task", "image_spec", "parameters", "gmacs"
        return {key: value for key, value in vars(self).items() if key not in others}


@dataclass(frozen=True)
class Checkpoint:
    """One published file of weights."""

    name: str  # to ask for; timm's files keep timm's full names, Cream's their file names
    variant: str  # whose sizes the weights have
    family: Family  # whose key names the file uses
    file: str  # its name in the cache and below a mirror; unique in the table
    format: Literal["safetensors", "torch"]  # the latter for a file of ``torch.save``
    licence: str  # that the publisher states, by its SPDX name where it has one
    source: str  # page where the file is published
    urls: tuple[str, ...] = ()  # tried in order; empty if it must be fetched by hand
    sha256: str | None = None  # None where no publisher states it, see ``checkpoints.fetch``
    num_classes: int = 1000  # outputs of the head in the file
    image_spec: ImageSpec | None = None  # where it differs from the variant's
    note: str = ""  # what a user should know, in a sentence
    embedded: bool = False  # whether the file ships inside the package
    thresholds: Mapping[str, float] = field(default_factory=dict, hash=False)  # of its masks

    @property
    def url(self) -> str | None:
        """The first place to fetch the file from, or None if it must be fetched by hand."""
        return self.urls[0] if self.urls else None


# --- rows -----------------------------------------------------------------------------------------

_DEPTHS = (2, 2, 6, 2)
_5M = (64, 128, 160, 320), _DEPTHS, (2, 4, 5, 10)  # channels, blocks and heads
_11M = (64, 128, 256, 448), _DEPTHS, (2, 4, 8, 14)
_21M = (96, 192, 384, 576), _DEPTHS, (3, 6, 12, 18)
_WINDOWS = (7, 7, 14, 7)
_TO_32, _TO_16 = (2, 2, 2), (2, 2, 1)
_Sizes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _classifier(
    name: str, sizes: _Sizes, windows: tuple[int, ...], params: int, gmacs: float, drop: float = 0.0
) -> Variant:
    """A classifier of timm, at the side that its name ends with."""
    side = int(name.rpartition("_")[2])
    spec = ImageSpec.timm(side)
    return Variant(
        name, *sizes, windows, _TO_32, side, "classification", spec, params, gmacs,
        drop_path_rate=drop,
    )  # fmt: skip


def _sam(name: str, sizes: _Sizes, params: int, gmacs: float, drop: float = 0.0) -> Variant:
    return Variant(
        name, *sizes, _WINDOWS, _TO_16, 1024, "sam", ImageSpec.sam(1024), params, gmacs,
        drop_path_rate=drop, neck_dim=256,
    )  # fmt: skip


def _student(name: str, sizes: _Sizes, params: int, gmacs: float) -> Variant:
    """A student of EfficientSAM3: the trunk of a classifier of 224 pixels, and its own neck."""
    return Variant(
        name, *sizes, _WINDOWS, _TO_32, 1008, "sam3", ImageSpec.sam3(), params, gmacs,
        neck_dim=1024, neck_size=72, head=False,
    )  # fmt: skip


VARIANTS: tuple[Variant, ...] = (
    _classifier("tiny_vit_5m_224", _5M, _WINDOWS, 5_392_764, 1.26),
    _classifier("tiny_vit_11m_224", _11M, _WINDOWS, 10_996_972, 2.02, 0.1),
    _classifier("tiny_vit_21m_224", _21M, _WINDOWS, 21_198_568, 4.25, 0.2),
    _classifier("tiny_vit_21m_384", _21M, (12, 12, 24, 12), 21_230_488, 13.70, 0.1),
    _classifier("tiny_vit_21m_512", _21M, (16, 16, 32, 16), 21_268_120, 26.88, 0.1),
    Variant(
        "tiny_vit_2m_sam", (32, 64, 96, 160), _DEPTHS, (1, 2, 3, 5), (8, 8, 16, 8), _TO_16, 256,
        "sam", ImageSpec.sam(256), 2_130_384, 0.83, neck_dim=256, head=False,
    ),
    _sam("tiny_vit_5m_sam", _5M, 6_065_532, 38.77),
    _sam("tiny_vit_11m_sam", _11M, 11_702_508, 64.04),
    _sam("tiny_vit_21m_sam", _21M, 21_936_872, 123.94, 0.1),
    Variant(
        "tiny_vit_5m_litemedsam", *_5M, _WINDOWS, _TO_16, 256, "sam", ImageSpec.litemedsam(256),
        5_726_740, 37.47, stem="pointwise", neck_dim=256, head=False,
    ),
    _student("tiny_vit_5m_sam3", _5M, 14_839_060, 36.59),
    _student("tiny_vit_11m_sam3", _11M, 20_446_084, 53.48),
    _student("tiny_vit_21m_sam3", _21M, 30_650_496, 101.28),
)  # fmt: skip
"""All sizes, classification first."""

_CREAM = "https://github.com/microsoft/Cream/tree/main/TinyViT"
_CREAM_FILES = "https://github.com/wkcn/TinyViT-model-zoo/releases/download/checkpoints"
_IN22K = 21841


def _cream(name: str, variant: str, num_classes: int = 1000) -> Checkpoint:
    spec = ImageSpec.cream(224) if variant.endswith("_224") else None
    file = f"{name}.pth"
    return Checkpoint(
        name, variant, "cream", file, "torch", "MIT", _CREAM,
        urls=(f"{_CREAM_FILES}/{file}",), num_classes=num_classes, image_spec=spec,
    )  # fmt: skip


def _timm(name: str, num_classes: int = 1000) -> Checkpoint:
    """The row of a file that timm publishes on Hugging Face; the tag follows the dot."""
    page = f"https://huggingface.co/timm/{name}"
    return Checkpoint(
        name, name.partition(".")[0], "timm", f"{name}.safetensors", "safetensors", "Apache-2.0",
        page, urls=(f"{page}/resolve/main/model.safetensors",), num_classes=num_classes,
    )  # fmt: skip


def _efficientsam3(name: str, variant: str) -> Checkpoint:
    """The row of a whole EfficientSAM3, of which only the image encoder is read."""
    page = "https://huggingface.co/Simon7108528/EfficientSAM3"
    return Checkpoint(
        name, variant, "efficientsam3", f"{name}.pt", "torch", "SAM License",
        "https://github.com/SimonZeng7108/efficientsam3",
        urls=(f"{page}/resolve/main/stage1_all_converted/{name}.pt",),
        note="Derived from SAM 3: Meta's SAM License holds. Only "
        "the image encoder is read; the rest of SAM 3 in the file is left over.",
    )  # fmt: skip


_EMBEDDED = Checkpoint(
    "tinyvit_sam_2m", "tiny_vit_2m_sam", "tinyvit_sam", "sam_2m.safetensors", "safetensors",
    "Apache-2.0", "shipped inside the package", embedded=True,
    sha256="f2931d7816f5bd2ead5a37d02db8e3f4f496c44e41f974456cc997aba86a3ff3",
    note="Small, for a first try without a download; trained on GPL-2, CC-BY-SA, CC-BY, MIT and "
    "CC0 images, see its model card.",
    thresholds={"pred_iou_thresh": 0.5, "stability_score_thresh": 0.49},  # as its header says
)  # fmt: skip

CHECKPOINTS: tuple[Checkpoint, ...] = (
    _EMBEDDED,
    replace(_EMBEDDED, name="tinyvit_starter", note="The earlier name of tinyvit_sam_2m."),
    Checkpoint(
        "mobile_sam", "tiny_vit_5m_sam", "mobile_sam", "mobile_sam.pt", "torch",
        "Apache-2.0", "https://github.com/ChaoningZhang/MobileSAM",
        urls=(
            "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
            "https://huggingface.co/dhkim2810/MobileSAM/resolve/main/mobile_sam.pt",
            "https://github.com/ultralytics/assets/releases/download/v8.3.0/mobile_sam.pt",
        ),
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    Checkpoint(
        "tinysam", "tiny_vit_5m_sam", "tinysam", "tinysam_42.3.pth", "torch",
        "Apache-2.0", "https://github.com/xinghaochen/TinySAM",
        urls=("https://github.com/xinghaochen/TinySAM/releases/download/3.0/tinysam_42.3.pth",),
    ),
    Checkpoint(
        "sam_hq_vit_tiny", "tiny_vit_5m_sam", "hq_sam", "sam_hq_vit_tiny.pth", "torch",
        "Apache-2.0", "https://github.com/SysCV/sam-hq",
        urls=("https://huggingface.co/lkeab/hq-sam/resolve/main/sam_hq_vit_tiny.pth",),
        note="Light HQ-SAM; its extra decoder tensors are kept apart from the encoder's.",
    ),
    Checkpoint(
        "lite_medsam", "tiny_vit_5m_litemedsam", "litemedsam", "lite_medsam.pth", "torch",
        "Apache-2.0", "https://github.com/bowang-lab/MedSAM/tree/LiteMedSAM",
        note="Published on Google Drive only; download it from the link on the project's page.",
    ),
    _efficientsam3("efficient_sam3_tinyvit_s", "tiny_vit_5m_sam3"),
    _efficientsam3("efficient_sam3_tinyvit_m", "tiny_vit_11m_sam3"),
    _efficientsam3("efficient_sam3_tinyvit_m_geo_ft", "tiny_vit_11m_sam3"),
    _efficientsam3("efficient_sam3_tinyvit_l", "tiny_vit_21m_sam3"),
    _cream("tiny_vit_5m_22k_distill", "tiny_vit_5m_224", _IN22K),
    _cream("tiny_vit_5m_22kto1k_distill", "tiny_vit_5m_224"),
    _cream("tiny_vit_5m_1k", "tiny_vit_5m_224"),
    _cream("tiny_vit_11m_22k_distill", "tiny_vit_11m_224", _IN22K),
    _cream("tiny_vit_11m_22kto1k_distill", "tiny_vit_11m_224"),
    _cream("tiny_vit_11m_1k", "tiny_vit_11m_224"),
    _cream("tiny_vit_21m_22k_distill", "tiny_vit_21m_224", _IN22K),
    _cream("tiny_vit_21m_22kto1k_distill", "tiny_vit_21m_224"),
    _cream("tiny_vit_21m_1k", "tiny_vit_21m_224"),
    _cream("tiny_vit_21m_22kto1k_384_distill", "tiny_vit_21m_384"),
    _cream("tiny_vit_21m_22kto1k_512_distill", "tiny_vit_21m_512"),
    _timm("tiny_vit_5m_224.dist_in22k", _IN22K),
    _timm("tiny_vit_5m_224.dist_in22k_ft_in1k"),
    _timm("tiny_vit_5m_224.in1k"),
    _timm("tiny_vit_11m_224.dist_in22k", _IN22K),
    _timm("tiny_vit_11m_224.dist_in22k_ft_in1k"),
    _timm("tiny_vit_11m_224.in1k"),
    _timm("tiny_vit_21m_224.dist_in22k", _IN22K),
    _timm("tiny_vit_21m_224.dist_in22k_ft_in1k"),
    _timm("tiny_vit_21m_224.in1k"),
    _timm("tiny_vit_21m_384.dist_in22k_ft_in1k"),
    _timm("tiny_vit_21m_512.dist_in22k_ft_in1k"),
)  # fmt: skip
"""All published files, the embedded one first."""

DEFAULT_CHECKPOINT = "tinyvit_sam_2m"
"""What the command line uses where no checkpoint is named: the embedded one."""


# --- looking up -----------------------------------------------------------------------------------


def list_models() -> list[str]:
    """Return the names of all variants.

    Returns:
        Names in the order of the table: classification first, then SAM encoders.

    Examples:
        >>> list_models()[0]
        'tiny_vit_5m_224'
    """
    return [variant.name for variant in VARIANTS]


def list_checkpoints(variant: str | None = None) -> list[str]:
    """Return the names of all checkpoints, or of those that fit one variant.

    Args:
        variant: Name of a variant, or None for all.

    Returns:
        Names in the order of the table.

    Raises:
        ValueError: If there is no variant of that name.

    Examples:
        >>> list_checkpoints("tiny_vit_5m_sam")
        ['mobile_sam', 'tinysam', 'sam_hq_vit_tiny']
    """
    if variant is not None:
        get_variant(variant)
    return [row.name for row in CHECKPOINTS if variant in (None, row.variant)]


def get_variant(name: str) -> Variant:
    """The variant of that name; a ValueError for one that is none names the nearest."""
    for row in VARIANTS:
        if row.name == name:
            return row
    longer = [known for known in list_models() if known.startswith(f"{name}_")]
    near = nearest(name, longer[:1] or [*list_models(), *list_checkpoints()])
    raise ValueError(
        f"unknown model {name!r}{near} List them with tinyvit.list_models() and "
        "tinyvit.list_checkpoints()"
    )


def find_variant(arguments: Mapping[str, object]) -> str | None:
    """The name of the variant with these constructor arguments' sizes, or None."""
    for row in VARIANTS:
        own = {name: getattr(row, name) for name in _SIZES}
        if all(_plain(arguments.get(name)) == _plain(own[name]) for name in _SIZES):
            return row.name
    return None


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def get_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of that name; a CheckpointError for one that is none names the nearest."""
    for row in CHECKPOINTS:
        if row.name == name:
            return row
    raise CheckpointError(
        f"unknown checkpoint {name!r}{nearest(name, list_checkpoints())} "
        "List them with tinyvit.list_checkpoints()"
    )


def nearest(name: str, names: Iterable[str], otherwise: str = ".", cutoff: float = 0.5) -> str:
    """``; did you mean 'x'?`` for the nearest name, or ``otherwise`` if none is near."""
    close = difflib.get_close_matches(str(name).lower(), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else otherwise
