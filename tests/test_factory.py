from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tinyvit
from checkpoints.families import FAMILIES, SMALL, full, small
from checkpoints.server import serving
from tinyvit.catalog import CHECKPOINTS, VARIANTS, Checkpoint, Variant, get_variant
from tinyvit.checkpoints import file_sha256, read_state_dict, write_state_dict
from tinyvit.checkpoints.families import LAYOUTS, key_from_canonical, part_of, to_canonical
from tinyvit.checkpoints.files import header_for
from tinyvit.checkpoints.open import find_checkpoint, open_checkpoint
from tinyvit.errors import CheckpointError, DownloadError
from tinyvit.factory import LoadReport, create_model, load_checkpoint
from tinyvit.image_spec import ImageSpec
from tinyvit.modules import TinyViT

State = dict[str, Tensor]

# A variant of every kind with some 20 000 parameters, and rows of files for them.
SIZES: dict[str, Any] = {
    "embed_dims": (8, 12, 16, 24),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 3),
    "parameters": 0,
    "gmacs": 0.0,
    "num_classes": 5,
}
TINY_64 = Variant(
    "tiny_64", window_sizes=(3, 3, 5, 2), strides=(2, 2, 2), img_size=64, task="classification",
    image_spec=ImageSpec.timm(64), drop_path_rate=0.1, **SIZES,
)  # fmt: skip
TINY_96 = replace(
    TINY_64, name="tiny_96", window_sizes=(4, 4, 7, 3), img_size=96, image_spec=ImageSpec.timm(96)
)
TINY_SAM = Variant(
    "tiny_sam", window_sizes=(3, 3, 5, 2), strides=(2, 2, 1), img_size=64, task="sam",
    image_spec=ImageSpec.sam(64), neck_dim=16, **SIZES,
)  # fmt: skip
ROWS = (
    Checkpoint(
        "tiny_cream_1k", "tiny_64", "cream", "tiny_cream_1k.pth", "torch", "MIT", "a page",
        num_classes=5, image_spec=ImageSpec.cream(64),
    ),
    Checkpoint(
        "tiny_64.in1k", "tiny_64", "timm", "tiny_64.in1k.safetensors", "safetensors", "MIT",
        "a page", num_classes=5,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tiny variants and rows stand in the catalog; nothing of the environment counts."""
    variants = (*VARIANTS, TINY_64, TINY_96, TINY_SAM)
    monkeypatch.setattr("tinyvit.catalog.VARIANTS", variants)
    monkeypatch.setattr("tinyvit.checkpoints.detection.VARIANTS", variants)
    monkeypatch.setattr("tinyvit.catalog.CHECKPOINTS", (*CHECKPOINTS, *ROWS))
    for name in ("TINYVIT_OFFLINE", "HF_HUB_OFFLINE", "TINYVIT_MIRROR", "TINYVIT_REQUIRE_SHA256"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def build(make_tiny_vit: Callable[..., TinyViT]) -> Callable[..., TinyViT]:
    """``build(variant, seed=0, **changes)``: a model of a tiny variant with lively weights."""

    def make(variant: Variant, seed: int = 0, **changes: Any) -> TinyViT:
        return make_tiny_vit(seed, **{**variant.arguments(), **changes})

    return make


def write(path: Path, state: State, family: str) -> Path:
    """A canonical state as a file of the family, in its spelling and container."""
    layout = LAYOUTS[family]
    container = "safetensors" if path.suffix == ".safetensors" else "torch"
    spelt = {key_from_canonical(key, LAYOUTS[family]): tensor for key, tensor in state.items()}
    return write_state_dict(
        path, spelt, container, layout.wrapper if container == "torch" else None
    )


def assert_same(model: TinyViT, state: State) -> None:
    """The model has exactly these values, whatever their dtype was."""
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value.to(own[key].dtype)), key


def image(side: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(side))


# --- every family ---------------------------------------------------------------------------------

ENCODERS = [family for family in FAMILIES if family != "mobile_sam_v2_decoder"]
SMALL_ARGUMENTS = {
    name: value
    for name, value in vars(SMALL).items()
    if name not in ("stem", "neck_dim", "neck_size")
}


def small_model(family: str, randomise: Callable[..., TinyViT]) -> TinyViT:
    """A network by hand, with the parts that the family's files hold."""
    layout = LAYOUTS[family]
    parts = layout.required if family == "tinyvit_sam" else (*layout.required, *layout.optional)
    model = TinyViT(
        **SMALL_ARGUMENTS,
        strides=layout.strides if "neck" in parts else (2, 2, 2),
        stem=layout.stem or "conv",
        neck_dim=16 if "neck" in parts else None,
        neck_size=layout.neck_size,
        head="head" in parts,
    )
    return randomise(model, seed=3).eval()


@pytest.mark.parametrize("family", ENCODERS)
def test_every_family_gives_what_the_state_loaded_by_hand_gives(
    family: str, tmp_path: Path, randomise: Callable[..., TinyViT]
) -> None:
    by_hand = small_model(family, randomise)
    spelt = {key_from_canonical(key, LAYOUTS[family]): t for key, t in by_hand.state_dict().items()}
    layout = LAYOUTS[family]
    assert spelt.keys() <= small(family).keys()
    suffix = ".safetensors" if layout.container == "safetensors" else ".pth"
    path = write_state_dict(
        tmp_path / f"weights{suffix}",
        {**small(family), **spelt},
        layout.container,
        layout.wrapper if layout.container == "torch" else None,
    )
    model = create_model(checkpoint=path)
    assert_same(model, by_hand.state_dict())
    assert (model.strides, model.stem, model.neck_dim, model.mlp_ratio) == (
        by_hand.strides, by_hand.stem, by_hand.neck_dim, 2.0,
    )  # fmt: skip
    assert not any(module.training for module in model.modules())
    with torch.inference_mode():
        out, wanted = model(image()), by_hand(image())
    assert torch.isfinite(out).all()
    assert torch.equal(out, wanted)
    assert model.image_spec is not None
    way = "squash" if model.neck_size is not None else "longest_side"
    assert model.image_spec.resize == ("crop" if model.neck is None else way)

    report = load_checkpoint(randomise(TinyViT(**model.arguments()), seed=4), path)
    assert report.untrained == ()
    there = {part_of(key) for key in to_canonical(small(family), family)}
    assert report.left_out == tuple(sorted(there - {"trunk", "head", "neck"}))


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, randomise: Callable[..., TinyViT]
) -> tuple[TinyViT, dict[str, Path]]:
    """A 5M encoder with all parts, and files of the main families with its weights."""
    model = randomise(TinyViT(**get_variant("tiny_vit_5m_sam").arguments()), seed=1).eval()
    folder = tmp_path_factory.mktemp("published")
    state = model.state_dict()
    paths = {}
    for family, name in (
        ("cream", "cream.pth"),
        ("timm", "timm.safetensors"),
        ("mobile_sam", "mobile_sam.pt"),
    ):
        layout = LAYOUTS[family]
        parts = (*layout.required, *layout.optional)
        spelt = {key_from_canonical(k, layout): t for k, t in state.items() if part_of(k) in parts}
        rest = {key: t.clone() for key, t in full(family).items() if key not in spelt}
        everything = {**spelt, **rest}
        assert everything.keys() == full(family).keys()
        assert all(everything[k].shape == t.shape for k, t in full(family).items())
        wrapper = layout.wrapper if layout.container == "torch" else None
        paths[family] = write_state_dict(folder / name, everything, layout.container, wrapper)
    return model, paths


@pytest.mark.parametrize("family", ["cream", "timm", "mobile_sam"])
def test_published_sizes(family: str, published: tuple[TinyViT, dict[str, Path]]) -> None:
    by_hand, paths = published
    model = create_model(checkpoint=paths[family])
    variant = get_variant("tiny_vit_5m_sam" if family == "mobile_sam" else "tiny_vit_5m_224")
    assert sum(p.numel() for p in model.parameters()) == variant.parameters
    assert model.image_spec == variant.image_spec
    wanted = {k: t for k, t in by_hand.state_dict().items() if k in model.state_dict()}
    assert_same(model, wanted)
    assert model.strides == variant.strides
    by_hand = TinyViT(**variant.arguments()).eval()
    by_hand.load_state_dict(wanted)
    with torch.inference_mode():
        assert torch.equal(model(image()), by_hand(image()))


# --- names ----------------------------------------------------------------------------------------


def test_a_variant_has_its_sizes_and_random_weights() -> None:
    model = create_model("tiny_sam")
    assert {k: v for k, v in model.arguments().items() if k in TINY_SAM.arguments()} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in TINY_SAM.arguments().items()
    }
    assert model.image_spec == ImageSpec.sam(64)
    assert not any(module.training for module in model.modules())
    assert next(model.parameters()).device.type == "cpu"
    torch.manual_seed(1)
    one = create_model("tiny_64").state_dict()
    torch.manual_seed(1)
    assert_same(create_model("tiny_64"), one)


@pytest.mark.parametrize("name", ["tiny_vit_11m_224", "tiny_vit_21m_384", "tiny_vit_5m_litemedsam"])
def test_published_variants_have_their_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == get_variant(name).parameters
    assert model.image_spec == get_variant(name).image_spec


def test_the_embedded_checkpoint_by_either_argument() -> None:
    model = create_model("tinyvit_sam_2m")
    assert create_model(checkpoint="tinyvit_sam_2m").arguments() == model.arguments()
    file = read_state_dict(find_checkpoint("tinyvit_sam_2m")[0]).tensors
    prefix = "image_encoder."
    state = {k.removeprefix(prefix): t for k, t in file.items() if k.startswith(prefix)}
    assert any(tensor.dtype == torch.float16 for tensor in state.values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    own = model.state_dict()
    assert {key for key in own if not key.endswith("num_batches_tracked")} <= state.keys()
    assert all(torch.equal(own[key], state[key].to(own[key].dtype)) for key in state)
    assert (model.strides, model.neck_dim, model.head) == ((2, 2, 1), 256, None)
    assert model.image_spec == get_variant("tiny_vit_2m_sam").image_spec


def test_a_full_name_of_timms_from_a_mirror(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    published: tuple[TinyViT, dict[str, Path]],
) -> None:
    by_hand, paths = published
    name = "tiny_vit_5m_224.dist_in22k_ft_in1k"
    file = paths["timm"]
    seen: list[tuple[int, int | None]] = []
    with serving() as server:
        server.files[f"{name}.safetensors"] = file.read_bytes()
        monkeypatch.setenv("TINYVIT_MIRROR", server.url(""))
        model = create_model(
            name, sha256=file_sha256(file), progress=lambda *step: seen.append(step)
        )
        assert len(server.requests) == 1
    size = file.stat().st_size
    assert seen[-1] == (size, size)
    assert file_sha256(tmp_path / "cache" / f"{name}.safetensors") == file_sha256(file)
    assert torch.equal(model.state_dict()["head.weight"], by_hand.state_dict()["head.weight"])
    assert model.image_spec == ImageSpec.timm(224)


def served(build: Callable[..., TinyViT], tmp_path: Path) -> Iterator[State]:
    """A server that holds both rows' files; gives the weights in them."""
    state = build(TINY_64, seed=5).state_dict()
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for row in ROWS:
            file = write(tmp_path / row.file, state, row.family)
            server.files[row.file] = file.read_bytes()
        patch.setenv("TINYVIT_MIRROR", server.url(""))
        yield state


served_files = pytest.fixture(served, name="served_files")


def digest(folder: Path, row: Checkpoint) -> str:
    return hashlib.sha256((folder / row.file).read_bytes()).hexdigest()


def test_rows_of_the_catalog_by_name(
    tmp_path: Path, served_files: State, build: Callable[..., TinyViT]
) -> None:
    sums = [digest(tmp_path, row) for row in ROWS]
    cream = create_model("tiny_cream_1k", sha256=sums[0])
    assert_same(cream, served_files)
    assert cream.image_spec == ImageSpec.cream(64)  # the row's, since Cream crops in its own way
    timm = create_model("tiny_64.in1k", sha256=sums[1])
    assert_same(timm, served_files)
    assert timm.image_spec == ImageSpec.timm(64)
    sized = create_model("tiny_cream_1k", sha256=sums[0], img_size=128)
    assert sized.image_spec == ImageSpec.cream(128)
    model = build(TINY_64)
    report = load_checkpoint(model, "tiny_cream_1k", sha256=sums[0])
    assert_same(model, served_files)
    assert report.path == tmp_path / "cache" / "tiny_cream_1k.pth"
    with pytest.raises(DownloadError, match="wanted " + "0" * 64):
        create_model("tiny_64.in1k", sha256="0" * 64)


def test_find_checkpoint(tmp_path: Path, served_files: State) -> None:
    path, row = find_checkpoint("tiny_64.in1k", sha256=digest(tmp_path, ROWS[1]))
    assert (path.name, row) == ("tiny_64.in1k.safetensors", ROWS[1])
    assert find_checkpoint(str(tmp_path / ROWS[0].file)) == (tmp_path / ROWS[0].file, None)
    assert find_checkpoint("no/such/file.pth") == (Path("no/such/file.pth"), None)
    plain = tmp_path / "no_suffix"
    plain.touch()
    assert find_checkpoint(plain) == (plain, None)


def test_an_opened_checkpoint_needs_its_file_no_more(encoder: tuple[State, Path]) -> None:
    state, path = encoder
    opened = open_checkpoint(path)
    assert (opened.path, opened.row, opened.found.family) == (path, None, "mobile_sam")
    heads = {key for key in opened.tensors if part_of(key) in ("prompt_encoder", "mask_decoder")}
    assert heads
    assert opened.tensors.keys() == state.keys() | heads
    wanted = create_model(checkpoint=path).state_dict()
    path.unlink()
    found = create_model(checkpoint=opened).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_another_variants_preparation_does_not_follow_the_file(
    tmp_path: Path, served_files: State
) -> None:
    larger = create_model("tiny_96", "tiny_64.in1k", sha256=digest(tmp_path, ROWS[1]))
    assert larger.image_spec == ImageSpec.timm(96)


@pytest.mark.filterwarnings("ignore:the neck of this model is untrained")
@pytest.mark.parametrize("variant", [TINY_96, TINY_SAM])
def test_the_rows_preparation_does_not_go_into_another_variant(
    variant: Variant, tmp_path: Path, served_files: State
) -> None:
    model = create_model(variant.name, "tiny_cream_1k", sha256=digest(tmp_path, ROWS[0]))
    assert model.image_spec is not None
    assert model.image_spec.size == (variant.img_size, variant.img_size)
    assert model.image_spec.resize == variant.image_spec.resize


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"name": "tiny_vit_5m"},
            ValueError,
            "unknown model 'tiny_vit_5m'; did you mean 'tiny_vit_5m_224'",
        ),
        (
            {"name": "tiny_vit_5m_224.in1"},
            ValueError,
            r"did you mean 'tiny_vit_5m_224\.in1k'\? List them with tinyvit\.list_models\(\)",
        ),
        (
            {"checkpoint": "mobilesam"},
            CheckpointError,
            r"unknown checkpoint 'mobilesam'; did you mean 'mobile_sam'\? List them with "
            r"tinyvit\.list_checkpoints\(\)",
        ),
        (
            {"checkpoint": "no/such/file.pt"},
            CheckpointError,
            r"no such file: no/such/file\.pt; check",
        ),
        ({"checkpoint": Path("nothing")}, CheckpointError, "unknown checkpoint 'nothing'"),
    ],
)
def test_names_that_are_none(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        create_model(**arguments)


def test_without_a_name_the_embedded_weights_are_taken() -> None:
    """The README says so of every way in; create_model() was an error."""
    assert_same(create_model(), create_model("tinyvit_sam_2m").state_dict())


def test_an_untrained_sam_encoder_says_so() -> None:
    """Masks of random weights are noise, and nothing said so."""
    for make in (lambda: create_model("tiny_vit_2m_sam"), lambda: create_model("tiny_vit_5m_sam3")):
        with pytest.warns(UserWarning, match="has random weights: it is untrained") as told:
            make()
        assert len(told) == 1
    with pytest.warns(UserWarning, match="this SAM is untrained") as told:
        tinyvit.build_sam(img_size=64)
    assert len(told) == 1


def test_timms_features_only() -> None:
    whole = create_model("tinyvit_sam_2m")
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = whole.forward_intermediates(x, (0, 2), intermediates_only=True)
        for indices, stages in (((0, 2), [0, 2]), (None, [0, 1, 2, 3]), (1, [3]), ((-2,), [2])):
            maps = create_model("tinyvit_sam_2m", features_only=True, out_indices=indices)
            assert list(maps.out_indices) == stages and not maps.training
            found = maps(x)
            assert [m.shape[1] for m in found] == maps.feature_info.channels()
            assert maps.encoder.head is maps.encoder.neck is None
            assert len(maps.encoder.stages()) == max(stages) + 1
            if stages == [0, 2]:
                assert all(map(torch.equal, found, wanted))
    assert maps.encoder.image_spec == whole.image_spec


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pretrained", r"has no argument pretrained, came pretrained=True; name weights instead"),
        ("out_indices", r"out_indices=True; it goes with features_only=True"),
        ("global_pool", r"global_pool=True; the head takes the mean"),
        ("img_sz", r"create_model has no argument img_sz, came img_sz=True$"),
    ],
)
def test_arguments_of_timm_that_are_none_here(name: str, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        create_model("tiny_64", **{name: True})  # type: ignore[call-overload]


def test_a_checkpoints_name_beside_a_file(classifier: tuple[State, Path]) -> None:
    with pytest.raises(ValueError, match=r"'tiny_64\.in1k' names a checkpoint, .* is 'tiny_64'"):
        create_model("tiny_64.in1k", classifier[1])


def test_paths_that_are_no_files_of_weights(
    tmp_path: Path, build: Callable[..., TinyViT], randomise: Callable[..., TinyViT]
) -> None:
    folder = tinyvit.save_pretrained(build(TINY_64), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"is a folder written by save_pretrained; load it w"):
        create_model(checkpoint=folder)
    with pytest.raises(CheckpointError, match=rf"tinyvit\.from_pretrained\('{folder}'\)"):
        load_checkpoint(build(TINY_64), folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        create_model(checkpoint=tmp_path / "empty")
    (tmp_path / "cut.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        create_model(checkpoint=tmp_path / "cut.safetensors")
    decoder = write_state_dict(tmp_path / "d.pt", small("mobile_sam_v2_decoder"), "torch")
    with pytest.raises(CheckpointError) as caught:
        create_model(checkpoint=decoder)
    assert str(caught.value) == (
        f"{decoder} holds no image encoder (mobile_sam_v2_decoder: prompt_encoder, mask_decoder); "
        "give the file with the encoder"
    )


# --- what create_model may change -----------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path: Path, build: Callable[..., TinyViT]) -> tuple[State, Path]:
    """A Cream file of ``tiny_64`` and its weights."""
    state = build(TINY_64, seed=6).state_dict()
    return state, write(tmp_path / "cream.pth", state, "cream")


@pytest.fixture
def encoder(tmp_path: Path, build: Callable[..., TinyViT]) -> tuple[State, Path]:
    """A MobileSAM file of ``tiny_sam`` and the encoder's weights."""
    state = build(TINY_SAM, seed=7).state_dict()
    rest = {k: t for k, t in small("mobile_sam").items() if "image_encoder" not in k}
    spelt = {key_from_canonical(k, LAYOUTS["mobile_sam"]): t for k, t in state.items()}
    return state, write_state_dict(tmp_path / "mobile_sam.pt", {**spelt, **rest}, "torch")


def test_every_argument_arrives(classifier: tuple[State, Path]) -> None:
    model = create_model(
        "tiny_64",
        classifier[1],
        img_size=80,
        drop_rate=0.1,
        drop_path_rate=0.3,
        use_checkpoint=True,
        layer_lr_decay=0.8,
    )
    arguments = model.arguments()
    assert (arguments["img_size"], arguments["drop_rate"], arguments["drop_path_rate"]) == (
        80, 0.1, 0.3,
    )  # fmt: skip
    assert (arguments["use_checkpoint"], arguments["layer_lr_decay"]) == (True, 0.8)
    assert arguments["num_classes"] == 5
    again = TinyViT(**arguments)
    assert again.arguments() == arguments
    again.load_state_dict(model.state_dict())
    assert str(again) == str(model.train())
    assert create_model("tiny_64").drop_path_rate == 0.1
    assert create_model("tiny_64", drop_path_rate=0.0).drop_path_rate == 0.0
    with pytest.raises(ValueError, match="strides wants 3 numbers"):
        create_model("tiny_64", strides=(2, 2))


def test_preparation_follows_img_size() -> None:
    assert create_model("tiny_64", img_size=128).image_spec == ImageSpec.timm(128)
    assert create_model("tiny_sam", img_size=96).image_spec == ImageSpec.sam(96)
    with torch.device("meta"):
        squashed = create_model("tiny_vit_21m_512", img_size=640).image_spec
    assert squashed == replace(ImageSpec.timm(512), size=(640, 640))


def test_preparation_of_sizes_of_no_variant(
    tmp_path: Path, build: Callable[..., TinyViT], encoder: tuple[State, Path]
) -> None:
    plain = write(
        tmp_path / "a.pth", build(TINY_64, window_sizes=(2, 2, 3, 2)).state_dict(), "cream"
    )
    model = create_model(checkpoint=plain)
    assert (model.img_size, model.image_spec) == (64, ImageSpec.timm(64))  # one window of 2 at /32
    state = build(TINY_SAM, window_sizes=(2, 2, 3, 2)).state_dict()
    sam = create_model(checkpoint=write(tmp_path / "b.safetensors", state, "tinyvit"))
    assert (sam.img_size, sam.image_spec) == (1024, ImageSpec.sam(1024))
    assert create_model(checkpoint=plain, img_size=32).image_spec == ImageSpec.timm(32)


@pytest.mark.parametrize("num_classes", [None, 5])
def test_the_files_own_number_of_classes_keeps_its_head(
    num_classes: int | None, classifier: tuple[State, Path]
) -> None:
    model = create_model("tiny_64", classifier[1], num_classes=num_classes)
    assert_same(model, classifier[0])


def test_another_number_of_classes_gives_a_fresh_head(classifier: tuple[State, Path]) -> None:
    state, path = classifier
    model = create_model("tiny_64", path, num_classes=7)  # and no warning: it was asked for
    own = model.state_dict()
    assert own["head.weight"].shape == (7, 24)
    assert not own["head.bias"].any()
    assert 0 < own["head.weight"].std() < 0.04  # a truncated normal of 0.02, not the file's
    for key in state:
        assert key.startswith("head.") or torch.equal(own[key], state[key]), key
    assert model.arguments()["num_classes"] == 7
    with torch.inference_mode():
        assert model(image()).shape == (1, 7)


def test_a_number_of_classes_gives_a_head_to_a_file_without_one(
    tmp_path: Path, build: Callable[..., TinyViT]
) -> None:
    state = build(TINY_SAM, head=False).state_dict()
    path = write(tmp_path / "encoder.safetensors", state, "tinyvit")
    assert create_model(checkpoint=path).head is None
    model = create_model(checkpoint=path, num_classes=3)
    assert model.classify(image()).shape == (1, 3)
    with pytest.warns(UserWarning) as caught:
        model = create_model(checkpoint=path, head=True)
    assert [str(w.message) for w in caught] == [
        "the head of this model is untrained: encoder.safetensors (tinyvit) holds no weights for it"
    ]
    assert caught[0].filename == __file__
    assert model.head is not None


def test_no_classes_leave_the_linear_layer_out(classifier: tuple[State, Path]) -> None:
    model = create_model("tiny_64", classifier[1], num_classes=0)
    assert "head.weight" not in model.state_dict()
    assert "norm_head.weight" in model.state_dict()
    with pytest.raises(ValueError, match="num_classes=3 wants a head, but head=False"):
        create_model("tiny_64", classifier[1], num_classes=3, head=False)


def test_without_a_head(classifier: tuple[State, Path]) -> None:
    state, path = classifier
    model = create_model("tiny_64", path, head=False)
    assert (model.head, model.norm_head) == (None, None)
    assert_same(model, {key: t for key, t in state.items() if "head" not in key})
    with torch.inference_mode():
        assert model(image()).shape == (1, 24, 2, 2)


def test_other_strides(classifier: tuple[State, Path], build: Callable[..., TinyViT]) -> None:
    state, path = classifier
    model = create_model("tiny_64", path, strides=(2, 2, 1))
    assert model.strides == (2, 2, 1)
    by_hand = build(TINY_64, strides=(2, 2, 1))
    by_hand.load_state_dict(state)
    with torch.inference_mode():
        assert torch.equal(model(image()), by_hand(image()))
        assert not torch.equal(model(image()), create_model("tiny_64", path)(image()))


def resized_by_hand(table: Tensor, window: int, antialias: bool) -> Tensor:
    side = round(table.shape[1] ** 0.5)
    image = table.view(1, -1, side, side)
    large = F.interpolate(image, size=(window, window), mode="bicubic", antialias=antialias)
    return large.flatten(2)[0]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("there", ["by name", "by window_sizes"])
def test_tables_are_resized_to_other_windows(
    there: str, antialias: bool, tmp_path: Path, build: Callable[..., TinyViT]
) -> None:
    old, new = (TINY_64, TINY_96) if there == "by name" else (TINY_96, TINY_64)
    state = build(old, seed=8).state_dict()
    path = write(tmp_path / "timm.safetensors", state, "timm")
    if there == "by name":
        model = create_model(new.name, path, antialias=antialias)
    else:
        model = create_model(
            old.name, path, window_sizes=new.window_sizes, img_size=64, antialias=antialias
        )
    assert model.window_sizes == new.window_sizes
    wanted = {}
    for key, value in state.items():
        if key.endswith("attention_biases"):
            stage = int(key.split(".")[1])
            value = resized_by_hand(value, new.window_sizes[stage], antialias)
        wanted[key] = value
    assert_same(model, wanted)
    target = build(new, seed=9)
    report = load_checkpoint(target, path, antialias=antialias)
    assert report.resized == tuple(key for key in state if key.endswith("attention_biases"))
    assert_same(target, wanted)


def test_the_two_manners_differ_where_a_table_shrinks(
    tmp_path: Path, build: Callable[..., TinyViT]
) -> None:
    path = write(tmp_path / "a.pth", build(TINY_96).state_dict(), "cream")
    plain, smooth = (create_model("tiny_64", path, antialias=flag) for flag in (False, True))
    key = "layers.2.blocks.0.attn.attention_biases"
    assert not torch.allclose(plain.state_dict()[key], smooth.state_dict()[key], atol=1e-3)


def test_name_none_takes_the_files_channels(tmp_path: Path, build: Callable[..., TinyViT]) -> None:
    state = build(TINY_SAM, in_chans=1).state_dict()
    path = write(tmp_path / "grey.safetensors", state, "tinyvit")
    assert create_model(checkpoint=path).in_chans == 1


def test_channels_by_argument(tmp_path: Path, build: Callable[..., TinyViT]) -> None:
    by_hand = build(TINY_SAM, in_chans=1)
    path = write(tmp_path / "grey.safetensors", by_hand.state_dict(), "tinyvit")
    model = create_model(checkpoint=path, in_chans=1)
    assert_same(model, by_hand.state_dict())
    assert_same(create_model("tiny_sam", path), by_hand.state_dict())
    with pytest.raises(CheckpointError, match=r"has shape \[4, 1, 3, 3\] instead of \[4, 3, "):
        create_model("tiny_sam", path, in_chans=3)


# --- one job's file, another job's model ----------------------------------------------------------


def test_a_classifiers_file_in_a_sam_encoder(
    classifier: tuple[State, Path], build: Callable[..., TinyViT]
) -> None:
    state, path = classifier
    with pytest.warns(UserWarning) as caught:
        model = create_model("tiny_sam", path)
    assert [str(w.message) for w in caught] == [
        "the neck of this model is untrained: cream.pth (cream) holds no weights for it"
    ]
    assert caught[0].filename == __file__
    assert model.strides == (2, 2, 1)
    assert model.image_spec == ImageSpec.sam(64)
    own = model.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in state)
    target = build(TINY_SAM, head=False)
    neck = {key: t.clone() for key, t in target.state_dict().items() if "neck" in key}
    with pytest.warns(UserWarning, match="the neck of this model is untrained"):
        report = load_checkpoint(target, path)
    assert (report.untrained, report.left_out) == (("neck",), ("head",))
    assert all(torch.equal(target.state_dict()[key], neck[key]) for key in neck)


def test_both_parts_untrained(tmp_path: Path, build: Callable[..., TinyViT]) -> None:
    trunk = build(TINY_64, head=False).state_dict()
    path = write(tmp_path / "trunk.safetensors", trunk, "tinyvit")
    with pytest.warns(UserWarning, match="the head and the neck of this model are untrained"):
        report = load_checkpoint(build(TINY_SAM), path)
    assert report.untrained == ("head", "neck")


def test_a_sam_file_in_a_classifier(encoder: tuple[State, Path]) -> None:
    state, path = encoder
    model = create_model("tiny_64", path)
    assert (model.neck, model.strides) == (None, (2, 2, 2))
    assert_same(model, {key: t for key, t in state.items() if not key.startswith("neck.")})
    assert model.image_spec == ImageSpec.timm(64)
    with torch.inference_mode():
        assert model(image()).shape == (1, 5)


def test_a_whole_sam_file(encoder: tuple[State, Path], build: Callable[..., TinyViT]) -> None:
    state, path = encoder
    model = create_model(checkpoint=path)
    assert_same(model, state)
    assert (model.strides, model.image_spec) == ((2, 2, 1), ImageSpec.sam(64))
    assert model.arguments() == create_model("tiny_sam").arguments()
    headless = create_model("tiny_sam", path, head=False)
    assert headless.head is None
    target = build(TINY_SAM)
    report = load_checkpoint(target, str(path))
    assert report == LoadReport(
        path=path,
        family="mobile_sam",
        strides_reason=report.strides_reason,
        left_out=("mask_decoder", "prompt_encoder"),
        untrained=(),
        resized=(),
    )
    assert "no tensor shows strides" in report.strides_reason
    assert_same(target, state)


def test_half_precision_into_single_and_back(tmp_path: Path, build: Callable[..., TinyViT]) -> None:
    half = {
        k: t.half() if t.is_floating_point() else t for k, t in build(TINY_64).state_dict().items()
    }
    path = write(tmp_path / "half.safetensors", half, "timm")
    model = create_model("tiny_64", path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same(model, half)
    target = build(TINY_64, seed=3).half()
    load_checkpoint(target, path)
    assert {p.dtype for p in target.parameters()} == {torch.float16}
    assert_same(target, half)


def test_a_training_model_stays_in_training(
    classifier: tuple[State, Path], build: Callable[..., TinyViT]
) -> None:
    target = build(TINY_64).train()
    parameters = [id(p) for p in target.parameters()]
    load_checkpoint(target, classifier[1])
    assert target.training
    assert [id(p) for p in target.parameters()] == parameters  # an optimiser still holds them


def test_counters_may_be_missing(
    classifier: tuple[State, Path], tmp_path: Path, build: Callable[..., TinyViT]
) -> None:
    state = {k: t for k, t in classifier[0].items() if not k.endswith("num_batches_tracked")}
    path = write(tmp_path / "no_counters.pth", state, "cream")
    model = create_model("tiny_64", path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


# --- files that do not fit ------------------------------------------------------------------------


def refused(model: TinyViT, path: Path) -> str:
    """The words of the refusal, after which the model is as it was."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    assert_same(model, before)
    return str(caught.value)


def test_everything_wrong_in_a_file_is_named_at_once(
    classifier: tuple[State, Path], tmp_path: Path, build: Callable[..., TinyViT]
) -> None:
    state = dict(classifier[0])
    del state["layers.2.blocks.1.attn.qkv.bias"]
    del state["patch_embed.seq.0.bn.weight"]
    state["norm_head.bias"] = torch.zeros(3)
    state["surprise"] = torch.zeros(1)
    path = write(tmp_path / "damaged.pth", state, "cream")
    text = (
        f"{path} looks like cream, but does not add up: "
        "2 missing: patch_embed.seq.0.bn.weight, layers.2.blocks.1.attn.qkv.bias; "
        "1 unexpected: surprise; norm_head.bias has shape [3] instead of [24]"
    )
    assert refused(build(TINY_64), path) == text
    with pytest.raises(CheckpointError) as caught:
        create_model("tiny_64", path)
    assert str(caught.value) == text


def test_everything_that_does_not_fit_the_model_is_named_at_once(
    classifier: tuple[State, Path], build: Callable[..., TinyViT]
) -> None:
    state, path = classifier
    deeper = build(TINY_64, depths=(1, 1, 3, 1), num_classes=9)
    text = refused(deeper, path)
    new = [
        key
        for key in deeper.state_dict()
        if key.startswith("layers.2.blocks.2.") and not key.endswith("num_batches_tracked")
    ]
    assert text == (
        f"{path} (cream, tiny_64) does not fit this TinyViT of widths (8, 12, 16, 24): "
        f"{len(new)} missing: {', '.join(new)}; "
        "head.weight has shape [5, 24] instead of [9, 24]; "
        "head.bias has shape [5] instead of [9]"
    )
    shallower = build(TINY_64, depths=(1, 1, 1, 1))
    text = refused(shallower, path)
    gone = [key for key in state if key.startswith("layers.2.blocks.1.")]
    assert f"{len(gone)} unexpected: {', '.join(gone)}" in text
    wider = build(TINY_64, embed_dims=(8, 12, 16, 48))
    text = refused(wider, path)
    wrong = [k for k, t in wider.state_dict().items() if t.shape != state[k].shape]
    assert all(f"{key} has shape {list(state[key].shape)} in" in text for key in wrong)
    with pytest.raises(CheckpointError, match=r"\(cream, tiny_64\) does not fit this TinyViT of w"):
        create_model("tiny_vit_2m_sam", path)


def test_sizes_of_their_own_are_named_so(tmp_path: Path, build: Callable[..., TinyViT]) -> None:
    small_windows = build(TINY_64, mlp_ratio=2.0).state_dict()
    path = write(tmp_path / "own.pth", small_windows, "cream")
    assert "(cream, sizes of its own) does not fit this" in refused(build(TINY_64), path)


def test_another_stem(tmp_path: Path, build: Callable[..., TinyViT]) -> None:
    state = build(TINY_SAM, stem="pointwise", head=False).state_dict()
    path = write(tmp_path / "pointwise.safetensors", state, "tinyvit")
    text = refused(build(TINY_SAM, head=False), path)
    assert "patch_embed.seq.0.c.weight has shape [4, 3, 1, 1] instead of [4, 3, 3, 3]" in text
    assert create_model(checkpoint=path).stem == "pointwise"


def test_fewer_stages_in_the_file(tmp_path: Path, build: Callable[..., TinyViT]) -> None:
    path, model = three_and_four_stages(tmp_path, build)[:2]
    assert "layers.3.blocks.0.attn.qkv.weight" in refused(model, path)


def test_more_stages_in_the_file(tmp_path: Path, build: Callable[..., TinyViT]) -> None:
    path, model = three_and_four_stages(tmp_path, build)[2:]
    words = refused(model, path)
    assert "unexpected: layers.2.downsample" in words
    assert "layers.2.downsample.conv1.c.weight" in words
    assert "layers.3.blocks.0.attn.attention_biases" in words


def three_and_four_stages(
    tmp_path: Path, build: Callable[..., TinyViT]
) -> tuple[Path, TinyViT, Path, TinyViT]:
    """A file of three stages for a model of four, and the other way round."""
    cut = {name: SIZES[name][:3] for name in ("embed_dims", "depths", "num_heads")}
    three = build(TINY_64, **cut, window_sizes=(3, 3, 5), strides=(2, 2), head=False)
    four = build(TINY_64, head=False)
    return (
        write(tmp_path / "three.safetensors", three.state_dict(), "tinyvit"),
        four,
        write(tmp_path / "four.safetensors", four.state_dict(), "tinyvit"),
        three,
    )


def test_the_files_own_preparation_counts(
    tmp_path: Path, build: Callable[..., TinyViT], served_files: State
) -> None:
    spec = replace(ImageSpec.timm(32), mean=(1.0, 2.0, 3.0))
    header = header_for("tinyvit", (2, 2, 2), spec)
    path = write_state_dict(tmp_path / "own.safetensors", served_files, metadata=header)
    model = create_model(checkpoint=path)
    assert (model.image_spec, model.img_size) == (spec, 32)
    larger = create_model(checkpoint=path, img_size=64)
    assert larger.image_spec is not None
    assert (larger.image_spec.size, larger.image_spec.mean) == ((64, 64), spec.mean)
    assert create_model("tiny_64", path).image_spec == spec
    assert create_model("tiny_96", path).image_spec == ImageSpec.timm(96)
