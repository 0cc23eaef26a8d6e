from __future__ import annotations

import ast
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from tinyvit.catalog import (
    CHECKPOINTS,
    VARIANTS,
    find_variant,
    get_checkpoint,
    get_variant,
    list_checkpoints,
    list_models,
)
from tinyvit.checkpoints.files import read_state_dict, thresholds_in
from tinyvit.checkpoints.open import find_checkpoint
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec

KEYS = Path(__file__).parent / "data" / "keys"


def parameters(table: str, without: tuple[str, ...] = ()) -> int:
    total = 0
    for line in (KEYS / f"{table}.tsv").read_text().splitlines():
        key, shape, _ = line.split("\t")
        if key.startswith(without) or key.endswith(
            ("running_mean", "running_var", "num_batches_tracked", "attention_bias_idxs")
        ):
            continue
        total += math.prod(ast.literal_eval(shape))
    return total


@pytest.mark.parametrize(
    ("variant", "table"),
    [
        ("tiny_vit_5m_224", "cream_5m"),
        ("tiny_vit_5m_sam", "encoder_5m"),
        ("tiny_vit_11m_sam", "encoder_11m"),
        ("tiny_vit_21m_sam", "encoder_21m"),
        ("tiny_vit_5m_litemedsam", "encoder_litemedsam"),
        ("tiny_vit_5m_sam3", "efficientsam3_5m"),
    ],
)
def test_parameters_are_those_of_the_key_tables(variant: str, table: str) -> None:
    assert get_variant(variant).parameters == parameters(table)


@pytest.mark.parametrize(
    ("variant", "table"),
    [
        ("tiny_vit_11m_224", "encoder_11m"),
        ("tiny_vit_21m_224", "encoder_21m"),
        ("tiny_vit_21m_384", "encoder_21m_384"),
    ],
)
def test_parameters_without_the_neck(variant: str, table: str) -> None:
    assert get_variant(variant).parameters == parameters(table, without=("neck.",))


def test_every_variant_is_consistent() -> None:
    assert len(list_models()) == len(set(list_models())) == len(VARIANTS)
    for row in VARIANTS:
        lengths = {len(x) for x in (row.embed_dims, row.depths, row.num_heads, row.window_sizes)}
        assert lengths == {4}
        assert len(row.strides) == 3
        assert all(d % h == 0 for d, h in zip(row.embed_dims, row.num_heads, strict=True))
        assert (row.task == "sam") == (row.strides == (2, 2, 1)) == (row.neck_dim == 256)
        assert (row.task == "sam3") == (row.neck_size == 72) == (row.neck_dim == 1024)
        assert row.image_spec.size == (row.img_size, row.img_size)
        assert row.task != "classification" or row.head


def test_arguments_are_the_constructors() -> None:
    arguments = get_variant("tiny_vit_5m_litemedsam").arguments()
    assert arguments == {
        "img_size": 256,
        "num_classes": 1000,
        "embed_dims": (64, 128, 160, 320),
        "depths": (2, 2, 6, 2),
        "num_heads": (2, 4, 5, 10),
        "window_sizes": (7, 7, 14, 7),
        "drop_path_rate": 0.0,
        "strides": (2, 2, 1),
        "stem": "pointwise",
        "neck_dim": 256,
        "neck_size": None,
        "head": False,
    }
    arguments["img_size"] = 1
    assert get_variant("tiny_vit_5m_litemedsam").arguments()["img_size"] == 256


def test_every_checkpoint_is_consistent() -> None:
    assert len({row.name for row in CHECKPOINTS}) == len(CHECKPOINTS)
    files = [row.file for row in CHECKPOINTS if row.name != "tinyvit_starter"]
    assert len(set(files)) == len(files)
    for row in CHECKPOINTS:
        get_variant(row.variant)
        assert row.urls or row.embedded or row.note
        assert all(url.startswith("https://") for url in row.urls)
        assert row.sha256 is None or len(row.sha256) == 64
        assert row.licence
        assert row.url == (row.urls[0] if row.urls else None)
        assert (row.format == "safetensors") == row.file.endswith(".safetensors")


def test_rows_of_the_families() -> None:
    timm = get_checkpoint("tiny_vit_21m_384.dist_in22k_ft_in1k")
    assert (timm.variant, timm.family, timm.num_classes) == ("tiny_vit_21m_384", "timm", 1000)
    assert timm.url == (
        "https://huggingface.co/timm/tiny_vit_21m_384.dist_in22k_ft_in1k/resolve/main/"
        "model.safetensors"
    )
    cream = get_checkpoint("tiny_vit_11m_22k_distill")
    assert (cream.num_classes, cream.file) == (21841, "tiny_vit_11m_22k_distill.pth")
    assert cream.image_spec == ImageSpec.cream(224)
    assert get_checkpoint("tiny_vit_21m_22kto1k_384_distill").image_spec is None
    assert get_checkpoint("mobile_sam").sha256 is not None
    embedded, earlier = (get_checkpoint(f"tinyvit_{name}") for name in ("sam_2m", "starter"))
    path, _ = find_checkpoint(embedded.name)
    assert thresholds_in(read_state_dict(path).metadata, path) == embedded.thresholds
    assert embedded.embedded and (earlier.file, earlier.sha256) == (embedded.file, embedded.sha256)


def test_list_checkpoints_of_one_variant() -> None:
    assert "tiny_vit_5m_1k" in list_checkpoints("tiny_vit_5m_224")
    assert list_checkpoints("tiny_vit_21m_sam") == []
    assert len(list_checkpoints()) == len(CHECKPOINTS)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(CheckpointError) as caught:
        get_checkpoint("mobilesam")
    assert str(caught.value) == (
        "unknown checkpoint 'mobilesam'; did you mean 'mobile_sam'? "
        "List them with tinyvit.list_checkpoints()"
    )
    with pytest.raises(ValueError, match=r"did you mean 'tiny_vit_5m_sam'\? List them with"):
        get_variant("TinyViT_5m_sam")
    with pytest.raises(ValueError, match=r"unknown model 'resnet50'\. List them"):
        get_variant("resnet50")
    with pytest.raises(ValueError, match="unknown model"):
        list_checkpoints("nothing")


def test_rows_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        VARIANTS[0].name = "x"  # type: ignore[misc]


def test_the_catalog_loads_no_torch() -> None:
    code = "import sys, tinyvit.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_variant_is_found_by_its_sizes():
    arguments = get_variant("tiny_vit_5m_224").arguments()
    listed = {name: list(v) if isinstance(v, tuple) else v for name, v in arguments.items()}
    assert find_variant(listed) == find_variant(arguments) == "tiny_vit_5m_224"
    assert find_variant({**arguments, "depths": (1, 1, 1, 1)}) is None
