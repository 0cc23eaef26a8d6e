from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints.families import FAMILIES, assert_same, full, small, table, values
from tinyvit.checkpoints import (
    convert,
    convert_tensors,
    detect,
    inspect,
    read_state_dict,
    write_state_dict,
)
from tinyvit.checkpoints.families import LAYOUTS, part_of, to_canonical
from tinyvit.checkpoints.files import IMAGE_SPEC, THRESHOLDS, header_for, weights_sha256
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec


@pytest.mark.parametrize("family", FAMILIES)
def test_reports_are_plain_data(tmp_path: Path, family: str) -> None:
    layout = LAYOUTS[family]
    wrapper = layout.wrapper if layout.container == "torch" else None
    path = write_state_dict(tmp_path / "a.bin", small(family), layout.container, wrapper)
    report = inspect(path)
    assert family == report.detection.family or family in report.detection.also
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.tensors == len(small(family))
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["size"] == path.stat().st_size
    assert facts["detection"]["strides"] == list(report.detection.strides)


def test_remarks(tmp_path: Path) -> None:
    state = small("cream")
    del state["head.bias"]
    state["layers.1.blocks.0.mlp.norm.bias"] = torch.zeros(3)
    state["layers.1.blocks.0.attn.attention_bias_idxs"] = torch.zeros(9, 9)
    state["left.over"] = torch.zeros(1)
    for block in range(8):
        state[f"extra.{block}"] = torch.zeros(1)
    path = tmp_path / "a.pth"
    torch.save({"model": state, "epoch": 3}, path)
    report = inspect(path)
    assert report.remarks == (
        "1 tensors have a shape that does not fit the others, for example "
        "layers.1.blocks.0.mlp.norm.bias: [3] instead of [16]",
        "missing: head (head.bias)",
        "left over: unknown (9 tensors)",
        "1 index tables (attention_bias_idxs) are not needed and dropped",
        "files of tinyvit have the very same keys and shapes",
        "strides 2,2,2 assumed: no tensor shows strides, and Cream TinyViT is a classification "
        "network",
        "the sizes are those of no variant in the catalog",
        "there is no neck: as a SAM encoder its neck would be untrained",
        "not used: epoch = 3",
    )
    wrong = report.to_dict()["detection"]["wrong_shapes"]  # type: ignore[index]
    assert wrong == {"layers.1.blocks.0.mlp.norm.bias": {"wanted": [16], "found": [3]}}


def test_remarks_on_a_sam_file(tmp_path: Path) -> None:
    path = write_state_dict(tmp_path / "mobile_sam.pt", small("mobile_sam"), "torch")
    remarks = inspect(path).remarks
    assert "the classification head of a SAM encoder was never trained" in remarks
    assert not any("no neck" in remark for remark in remarks)


def test_no_tinyvit(tmp_path: Path) -> None:
    path = write_state_dict(tmp_path / "a.safetensors", {"layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="looks like a ResNet"):
        inspect(path)


SAM_LIKE = {"mobile_sam", "mobile_sam_v2", "tinysam", "ultralytics", "micro_sam", "tinyvit_sam"}
SUFFIX = {"safetensors": ".safetensors", "torch": ".pt"}

CLASSIFIERS = {"cream", "timm", "mmpretrain", "tinyvit"}

POSSIBLE = {
    **dict.fromkeys(CLASSIFIERS, CLASSIFIERS),
    "efficientsam3": {"efficientsam3", "tinyvit"},
    "mobile_sam_v2_decoder": {"mobile_sam_v2_decoder"},
    "litemedsam": {"litemedsam", "tinyvit", "tinyvit_sam", "mobile_sam_v2_decoder"},
    "tinyvit_sam": {"tinyvit", "tinyvit_sam", "mobile_sam_v2_decoder"},
    "hq_sam": set(FAMILIES) - {"litemedsam", "efficientsam3"},
    **dict.fromkeys(
        SAM_LIKE - {"tinyvit_sam"}, set(FAMILIES) - {"litemedsam", "hq_sam", "efficientsam3"}
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small file of every family in its own container."""
    folder = tmp_path_factory.mktemp("sources")
    paths = {}
    for family, layout in LAYOUTS.items():
        path = folder / f"{family}{SUFFIX[layout.container]}"
        wrapper = layout.wrapper if layout.container == "torch" else None
        paths[family] = write_state_dict(path, small(family), layout.container, wrapper)
    return paths


def without_drops(state: dict[str, Tensor], family: str, other: str) -> dict[str, Tensor]:
    """The canonical tensors of a state that another family can hold."""
    parts = (*LAYOUTS[other].required, *LAYOUTS[other].optional)
    canonical = to_canonical(state, family)
    return {key: tensor for key, tensor in canonical.items() if part_of(key) in parts}


@pytest.mark.parametrize("to", FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_to_every_other(
    sources: dict[str, Path], tmp_path: Path, family: str, to: str
) -> None:
    target = tmp_path / f"target{SUFFIX[LAYOUTS[to].container]}"
    if to not in POSSIBLE[family]:
        with pytest.raises(CheckpointError, match=f"cannot become a {to} file: it has"):
            convert(sources[family], target, to)
        assert list(tmp_path.iterdir()) == []
        return
    report = convert(sources[family], target, to)
    kept = without_drops(small(family), family, to)
    written = read_state_dict(target)
    assert_same(to_canonical(written.tensors, to), kept)
    assert report.tensors == len(kept)
    dropped = [key for keys in report.dropped.values() for key in keys]
    assert len(dropped) == len(small(family)) - len(kept)
    found = detect(written.tensors, metadata=written.metadata)
    assert to == found.family or to in found.also
    assert found.is_complete
    assert json.loads(json.dumps(report.to_dict()))["family"] == to


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(sources: dict[str, Path], tmp_path: Path, family: str) -> None:
    for to in sorted(POSSIBLE[family] - {family}):
        if family not in POSSIBLE[to] or (family != "mobile_sam" and {family, to} <= SAM_LIKE):
            continue  # the SAM families' files are alike: one of them stands for all
        there, back = tmp_path / f"{to}.bin", tmp_path / f"{to}-back.bin"
        lossless = not convert(sources[family], there, to).dropped
        convert(there, back, family)
        if lossless:
            assert_same(read_state_dict(back).tensors, read_state_dict(sources[family]).tensors)


@pytest.mark.parametrize("to", ["timm", "tinyvit"])
def test_a_published_cream_file_there_and_back(tmp_path: Path, to: str) -> None:
    shapes = {key: shape for key, (shape, _) in table("cream_5m").items()}
    state = values(shapes)
    cream, other, back = tmp_path / "a.pth", tmp_path / "b.safetensors", tmp_path / "c.pth"
    write_state_dict(cream, state, "torch", wrapper="model")
    report = convert(cream, other, to)
    assert report.source_family == "cream"
    assert [len(keys) for keys in report.dropped.values()] == [10]
    assert "no loader needs" in next(iter(report.dropped))
    convert(other, back, "cream")
    plain = {key: t for key, t in state.items() if not key.endswith("attention_bias_idxs")}
    assert_same(read_state_dict(back).tensors, plain)
    assert read_state_dict(back).container == "torch zip, {'model': …}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", FAMILIES)
def test_published_sizes_pass_on_the_very_same_tensors(family: str, to: str) -> None:
    state = full(family)
    found = detect(state, metadata={"tinyvit.family": family})
    if to not in POSSIBLE[family]:
        with pytest.raises(CheckpointError, match="cannot become"):
            convert_tensors(state, found, to)
        return
    tensors, _ = convert_tensors(state, found, to)
    kept = without_drops(state, family, to)
    canonical = to_canonical(tensors, to)
    assert canonical.keys() == kept.keys()
    assert all(canonical[key] is kept[key] for key in kept)
    assert tensors.keys() <= full(to).keys() | {"decoder_state.out_conv.weight"} or "tinyvit" in to


def test_everything_that_lacks_is_said_at_once(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(sources["cream"], tmp_path / "a.pt", "mobile_sam")
    assert str(caught.value) == (
        "this cream file cannot become a mobile_sam file: it has no neck, no prompt encoder, "
        "no mask decoder. Convert to one of cream, timm, mmpretrain, tinyvit, or use a complete "
        "file"
    )
    with pytest.raises(CheckpointError, match="it has a pointwise stem where Cream TinyViT has a"):
        convert(sources["litemedsam"], tmp_path / "a.pth", "cream")
    with pytest.raises(CheckpointError, match="unknown checkpoint family 'keras'"):
        convert(sources["cream"], tmp_path / "a.h5", "keras")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_source_is_refused(tmp_path: Path) -> None:
    state = small("cream")
    del state["layers.2.blocks.1.attn.qkv.bias"]
    state["layers.1.blocks.0.mlp.norm.bias"] = torch.zeros(3)
    source = write_state_dict(tmp_path / "a.pth", state, "torch")
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "b.safetensors", "timm")
    assert "lacks trunk (layers.2.blocks.1.attn.qkv.bias)" in str(caught.value)
    assert "wrong shapes in trunk (layers.1.blocks.0.mlp.norm.bias)" in str(caught.value)
    assert "Convert to one of none" in str(caught.value)
    assert not (tmp_path / "b.safetensors").exists()


def test_damage_in_a_part_that_is_dropped_does_not_matter(tmp_path: Path) -> None:
    state = small("mobile_sam")
    del state["mask_decoder.iou_token.weight"]
    source = write_state_dict(tmp_path / "a.pt", state, "torch")
    convert(source, tmp_path / "b.safetensors", "tinyvit")
    with pytest.raises(CheckpointError, match=r"lacks mask_decoder \(mask_decoder\.iou_token"):
        convert(source, tmp_path / "c.safetensors", "tinyvit_sam")


def test_what_is_no_part_is_dropped_and_told(tmp_path: Path) -> None:
    state = {**small("timm"), "surprise": torch.zeros(1)}
    source = write_state_dict(tmp_path / "a.safetensors", state)
    report = convert(source, tmp_path / "b.pth", "cream")
    assert report.dropped == {
        "Cream TinyViT knows no such tensors, they are no part of TinyViT or SAM": ("surprise",)
    }


def test_the_suffix_decides_the_container(sources: dict[str, Path], tmp_path: Path) -> None:
    for name, container in (
        ("a.safetensors", "safetensors"),
        ("a.pth", "torch"),
        ("a.bin", "torch"),
        ("a.weights", "safetensors"),
    ):
        assert convert(sources["cream"], tmp_path / name, "timm").container == container
    convert(sources["timm"], tmp_path / "c.safetensors", "cream")
    found = read_state_dict(tmp_path / "c.safetensors")
    assert found.container == "safetensors"
    assert found.metadata == {
        "format": "pt",
        "tinyvit.family": "cream",
        "tinyvit.strides": "2,2,2",
    }
    convert(sources["hq_sam"], tmp_path / "d.safetensors", "mobile_sam_v2_decoder")
    assert "tinyvit.strides" not in read_state_dict(tmp_path / "d.safetensors").metadata


def test_strides_are_not_lost(sources: dict[str, Path], tmp_path: Path) -> None:
    encoder = tmp_path / "encoder.safetensors"
    assert convert(sources["mobile_sam"], encoder, "tinyvit").notes == ()
    file = read_state_dict(encoder)
    assert detect(file.tensors, metadata=file.metadata).strides == (2, 2, 1)
    notes = convert(encoder, tmp_path / "cream.pth", "cream").notes
    assert any("belong to strides (2, 2, 1), Cream TinyViT builds (2, 2, 2)" in n for n in notes)
    assert any("no published ones" in note for note in notes)
    assert any("head of a SAM encoder was never trained" in note for note in notes)
    notes = convert(sources["cream"], tmp_path / "b.safetensors", "tinyvit").notes
    assert notes == ("there is no neck: as a SAM encoder its neck would be untrained",)


def test_targets_that_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "a.pth"
    source.write_bytes(sources["cream"].read_bytes())
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for target in (source, tmp_path / "link.safetensors"):
        with pytest.raises(CheckpointError, match="is the source itself; name another file"):
            convert(source, target, "timm", overwrite=True)
    with pytest.raises(CheckpointError, match="is a folder; name the file to write"):
        convert(source, tmp_path, "timm")
    other = tmp_path / "b.safetensors"
    other.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already; remove it, or convert with"):
        convert(source, other, "timm")
    assert other.read_text() == "mine"
    convert(source, other, "timm", overwrite=True)
    assert read_state_dict(other).tensors.keys() == small("timm").keys()
    assert source.read_bytes() == before
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "nothing", tmp_path / "c", "timm")
    with pytest.raises(CheckpointError, match="no folder"):
        convert(source, tmp_path / "no" / "c.pt", "cream")


def test_preparation_and_thresholds_go_along_where_there_is_a_place(tmp_path: Path) -> None:
    thresholds = {"mask_threshold": -1.0}
    header = header_for("tinyvit_sam", (2, 2, 1), ImageSpec.sam(64), thresholds=thresholds)
    source = write_state_dict(tmp_path / "a.safetensors", small("tinyvit_sam"), metadata=header)
    convert(source, tmp_path / "b.safetensors", "tinyvit_sam")
    assert header.items() <= read_state_dict(tmp_path / "b.safetensors").metadata.items()
    convert(source, tmp_path / "c.safetensors", "tinyvit")
    metadata = read_state_dict(tmp_path / "c.safetensors").metadata
    assert IMAGE_SPEC in metadata and THRESHOLDS not in metadata
    report = convert(source, tmp_path / "d.pt", "mobile_sam_v2_decoder")
    assert report.notes == (
        "a torch file has no place for tinyvit.thresholds: give them to each call",
    )


def test_the_hash_of_weights_survives_conversion(tmp_path: Path) -> None:
    state = to_canonical(small("mobile_sam"), "mobile_sam")
    source = write_state_dict(tmp_path / "a.pt", small("mobile_sam"), "torch")
    for to in ("tinyvit_sam", "mobile_sam", "micro_sam"):
        target = tmp_path / f"{to}.x"
        convert(source, target, to)
        found = to_canonical(read_state_dict(target).tensors, to)
        encoder = {k: found[k] for k in found if part_of(k) in ("trunk", "neck")}
        assert weights_sha256(encoder) == weights_sha256({key: state[key] for key in encoder})


def test_a_student_goes_into_the_whole_of_sam_3_and_out_again(tmp_path: Path) -> None:
    student, rest = small("efficientsam3"), {"tracker.a.weight": torch.ones(2)}
    trunk = "detector.backbone.vision_backbone.trunk."
    other = {f"{trunk}model.{key}": t + 1 for key, t in student.items()}
    published = {f"{trunk}blocks.0.attn.qkv.weight": torch.ones(3)}  # SAM 3's own encoder
    write_state_dict(tmp_path / "student.pt", student, "torch")
    for name, content in (("efficient.pt", {**other, **rest}), ("sam3.pt", {**published, **rest})):
        write_state_dict(tmp_path / name, content, "torch", wrapper="model")
        merged = tmp_path / f"merged-{name}"
        report = convert(tmp_path / "student.pt", merged, "efficientsam3", into=tmp_path / name)
        assert "1 tensor of" in report.notes[-1]
        whole = torch.load(merged, weights_only=True)
        wanted = {**{f"{trunk}model.{key}": t for key, t in student.items()}, **rest}
        assert_same(whole["model"], wanted)
        out = tmp_path / f"out-{name}"
        convert(merged, out, "efficientsam3")
        assert_same(read_state_dict(out).tensors, student)
        assert inspect(merged).extras == ("tracker.a.weight (tensor)",)
    with pytest.raises(CheckpointError, match="holds no image encoder of SAM 3 to replace"):
        convert(
            tmp_path / "student.pt",
            tmp_path / "x.pt",
            "efficientsam3",
            into=tmp_path / "student.pt",
        )
    with pytest.raises(ValueError, match="into= is for to='efficientsam3'"):
        convert(tmp_path / "student.pt", tmp_path / "x.pt", "tinyvit", into=merged)
