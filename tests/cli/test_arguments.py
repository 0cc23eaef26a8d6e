from __future__ import annotations

import re
from typing import get_args

import pytest
import typer

from tinyvit.catalog import list_checkpoints, list_models
from tinyvit.checkpoints.download import cache_folder
from tinyvit.cli.arguments import (
    MAX_PIXELS,
    SHARED,
    EngineOptions,
    announce,
    check_checkpoint,
    file_of,
    load_classifier,
    load_encoder,
    matching_checkpoints,
    matching_models,
    one_of,
    variant_of,
)
from tinyvit.cli.console import Console
from tinyvit.errors import CheckpointError
from tinyvit.factory import create_model
from tinyvit.hub import save_pretrained
from tinyvit.image_spec import ImageSpec
from tinyvit.images import decode
from tinyvit.inference.backend import BackendName, Precision

QUIET = Console(is_quiet=True)
TORCH = EngineOptions(backend="torch")


def test_a_name_a_file_or_a_folder_is_a_file(tmp_path, make_tiny_vit, monkeypatch):
    save_pretrained(make_tiny_vit(), tmp_path / "saved")
    cached = cache_folder() / "mobile_sam.pt"
    cached.touch()
    assert file_of("tinyvit_sam_2m").name == "sam_2m.safetensors"
    assert file_of("mobile_sam") == cached
    assert file_of(str(tmp_path / "saved")) == tmp_path / "saved" / "model.safetensors"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").touch()
    assert str(file_of("bare")) == "bare"


def test_what_is_neither_a_name_nor_there_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").touch()
    for good in (None, "mobile_sam", "bare", str(tmp_path)):
        check_checkpoint(good)
    for wrong, words in (
        ("", "the name of the checkpoint is empty"),
        ("none.pt", "no such file: none.pt"),
        ("a/none", "no such file: a/none"),
        ("nofile", "unknown checkpoint 'nofile', and there is no file 'nofile'. List"),
        ("mobilesam", "did you mean 'mobile_sam'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_checkpoint(wrong)


def test_an_unknown_or_absent_name_is_an_error():
    with pytest.raises(CheckpointError, match="did you mean 'mobile_sam'"):
        file_of("mobilesam")
    with pytest.raises(CheckpointError, match="fetch it with: tinyvit download tinysam"):
        file_of("tinysam")


def test_an_encoder_gives_maps_whatever_it_was(checkpoints, image):
    for name, channels in [("encoder", 16), ("both", 16), ("five", 24)]:
        model = load_encoder(QUIET, str(checkpoints / f"{name}.safetensors"), None, None, TORCH)
        assert model(image(1, 32, 32)).shape[:2] == (1, channels)
    assert variant_of(load_encoder(QUIET, None, None, None, TORCH)) == "tiny_vit_2m_sam"
    assert load_encoder(QUIET, None, "tiny_vit_2m_sam", 128, TORCH).image_spec.size == (128, 128)


def test_a_variant_without_its_checkpoint_names_one():
    for variant, words in [
        ("tiny_vit_5m_sam", "for example sam_hq_vit_tiny"),
        ("tiny_vit_11m_sam", "for example a file of your own"),
        ("tiny_vit_5m_sm", "did you mean 'tiny_vit_5m_sam'"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_encoder(QUIET, None, variant, None, TORCH)


def test_a_folder_says_itself_how_it_is_used(tmp_path, make_tiny_vit):
    model = make_tiny_vit(neck_dim=None, strides=(2, 2, 2))
    model.image_spec = ImageSpec.timm(64)
    folder = str(save_pretrained(model, tmp_path / "saved"))
    assert load_classifier(QUIET, folder, None, None, TORCH).num_classes == 5
    assert load_encoder(QUIET, folder, None, None, TORCH).head is None
    for variant, size in [("tiny_vit_5m_224", None), (None, 96)]:
        with pytest.raises(ValueError, match="leave --model and --size out"):
            load_encoder(QUIET, folder, variant, size, TORCH)


def test_a_classifier_needs_a_trained_head(checkpoints):
    good = str(checkpoints / "five.safetensors")
    assert load_classifier(QUIET, good, None, None, TORCH).num_classes == 5
    hint = r"for example tiny_vit_5m_224\.dist_in22k_ft_in1k \('tinyvit models' lists all\)"
    with pytest.raises(ValueError, match=f"tinyvit_sam_2m has no classification head.*{hint}"):
        load_classifier(QUIET, None, None, None, TORCH)
    with pytest.raises(ValueError, match=r"for example tiny_vit_21m_384\.dist_in22k_ft_in1k"):
        load_classifier(QUIET, None, "tiny_vit_21m_384", None, TORCH)
    with pytest.raises(CheckpointError, match=f"mobile_sam is a SAM encoder.*{hint}"):
        load_classifier(QUIET, "mobile_sam", None, None, TORCH)
    with pytest.raises(CheckpointError, match=f"has no classification head; .*{hint}"):
        load_classifier(QUIET, str(checkpoints / "encoder.safetensors"), None, None, TORCH)
    with pytest.warns(UserWarning, match="never trained"):
        load_classifier(QUIET, str(checkpoints / "both.safetensors"), None, None, TORCH)


@pytest.mark.parametrize("name", list_models())
def test_every_variant_knows_itself(name):
    assert variant_of(create_model(name)) == name


def test_other_sizes_are_no_variant(make_tiny_vit):
    assert variant_of(make_tiny_vit()) is None


def test_only_a_download_is_announced(capsys):
    for name in list_checkpoints():
        announce(Console(), name)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(list_checkpoints()) - 2  # one embedded file has two names
    assert lines[0].startswith("fetching mobile_sam (Apache-2.0), published at https://")
    (cache_folder() / "mobile_sam.pt").touch()
    announce(Console(), "mobile_sam")
    assert capsys.readouterr().err == ""


def test_words_and_limits_are_the_library_s():
    for name, kind in (("precision", Precision), ("backend", BackendName)):
        (words,) = re.findall(rf"^{name} \(\[(.*)\]\)", SHARED, re.MULTILINE)
        assert set(words.split("|")) == set(get_args(kind))
    assert MAX_PIXELS == decode.MAX_PIXELS


def test_words_are_parsed():
    parse = one_of("fp32", "bf16", "auto")
    assert [parse(name) for name in ("fp32", "bf16", "auto")] == ["fp32", "bf16", "auto"]
    with pytest.raises(
        typer.BadParameter, match=r"^'half' is not one of 'fp32', 'bf16', 'auto'\.$"
    ):
        parse("half")


@pytest.mark.parametrize("verb", [["encode", "a.jpg", "-o", "x"], ["classify", "a.jpg"], ["bench"]])
def test_fp16_is_refused_with_the_reason(run, verb):
    result = run(*verb, "--precision", "fp16")
    assert result.code == (1 if verb == ["bench"] else 2)
    last = result.err.strip().splitlines()[-1]
    assert "precision 'fp16' is refused: it ends at 65504, and sums of squares" in last
    assert "use 'bf16', which is fast and has the range of 'fp32'" in last


def test_names_are_completed():
    assert matching_checkpoints("mob") == ["mobile_sam"]
    assert matching_models("tiny_vit_2") == [
        *("tiny_vit_21m_224", "tiny_vit_21m_384", "tiny_vit_21m_512"),
        *("tiny_vit_2m_sam", "tiny_vit_21m_sam", "tiny_vit_21m_sam3"),
    ]
    assert matching_models("x") == []
