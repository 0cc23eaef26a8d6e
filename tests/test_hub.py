from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.families import full
from tinyvit.catalog import get_variant
from tinyvit.checkpoints import detect, read_state_dict, write_state_dict
from tinyvit.checkpoints.conversion import convert_checkpoint
from tinyvit.checkpoints.families import LAYOUTS, key_from_canonical
from tinyvit.errors import CheckpointError, DownloadError
from tinyvit.factory import create_model
from tinyvit.hub import from_pretrained, push_to_hub, save_pretrained
from tinyvit.image_spec import ImageSpec
from tinyvit.modules import TinyViT
from tinyvit.sam.model import Sam, build_sam
from tinyvit.train.tasks.classify import save_classifier

MakeModel = Callable[..., TinyViT]
COMMIT = "0123456789" * 4


def assert_same(left: TinyViT, right: TinyViT) -> None:
    """Architecture, weights bit for bit, and preparation."""
    assert left.arguments() == right.arguments()
    assert left.image_spec == right.image_spec
    assert repr(left) == repr(right)
    one, other = left.state_dict(), right.state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert (value.dtype, value.shape) == (other[key].dtype, other[key].shape), key
        assert torch.equal(value, other[key]), key


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"neck_dim": None, "strides": (2, 2, 2)},
        {"head": False, "stem": "pointwise"},
        {"neck_dim": None, "head": False, "strides": (1, 2, 1)},
        {"num_classes": 0, "in_chans": 4, "img_size": (48, 80)},
        {"mlp_ratio": 1.5, "mbconv_expand_ratio": 2.0, "local_conv_size": 5},
        {"drop_rate": 0.1, "drop_path_rate": 0.2, "use_checkpoint": True, "layer_lr_decay": 0.7},
        {
            "embed_dims": (8, 16),
            "depths": (0, 2),
            "num_heads": (1, 2),
            "window_sizes": (3, 3),
            "strides": (1,),
        },
    ],
    ids=lambda changes: ",".join(changes) or "all parts",
)
def test_round_trip(changes: dict[str, Any], make_tiny_vit: MakeModel, tmp_path: Path) -> None:
    model = make_tiny_vit(**changes)
    folder = tmp_path / "new" / "folder"
    assert save_pretrained(model, str(folder)) == folder
    assert names(folder) == {"config.json", "model.safetensors"}
    again = from_pretrained(folder)
    assert_same(again, model)
    assert not any(module.training for module in again.modules())
    x = torch.ones(1, model.in_chans, 32, 48)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))
    save_pretrained(from_pretrained(str(folder)), tmp_path / "second")
    for name in names(folder):  # equal models give equal bytes
        assert (folder / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize(
    "spec",
    [None, ImageSpec.cream(64), ImageSpec.litemedsam(64), ImageSpec((48, 80), "squash", "bicubic")],
    ids=["none", "cream", "litemedsam", "squash"],
)
def test_the_preparation_makes_the_round_trip(
    spec: ImageSpec | None, make_tiny_vit: MakeModel, tmp_path: Path
) -> None:
    model = make_tiny_vit()
    model.image_spec = spec
    assert_same(from_pretrained(save_pretrained(model, tmp_path)), model)


def test_a_model_in_training_is_saved_as_it_is(make_tiny_vit: MakeModel, tmp_path: Path) -> None:
    model = make_tiny_vit().train()
    save_pretrained(model, tmp_path)
    assert all(module.training for module in model.modules())
    assert_same(from_pretrained(tmp_path), model.eval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_values(
    dtype: torch.dtype, make_tiny_vit: MakeModel, tmp_path: Path
) -> None:
    model = make_tiny_vit().to(dtype)
    save_pretrained(model, tmp_path)
    assert read_state_dict(tmp_path / "model.safetensors").tensors["head.bias"].dtype == dtype
    again = from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert_same(again.to(dtype), model)


def test_what_the_files_hold(make_tiny_vit: MakeModel, tmp_path: Path) -> None:
    from tinyvit import __version__

    model = make_tiny_vit(img_size=(48, 80))
    model.image_spec = ImageSpec.timm(64)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config == {
        "format": 1,
        "library_name": "tinyvit",
        "tinyvit_version": __version__,
        "architectures": ["TinyViT"],
        "arguments": {
            "img_size": [48, 80],
            "in_chans": 3,
            "num_classes": 5,
            "embed_dims": [8, 12, 16, 24],
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 2, 2, 3],
            "window_sizes": [4, 3, 5, 2],
            "mlp_ratio": 4.0,
            "drop_rate": 0.0,
            "drop_path_rate": 0.0,
            "use_checkpoint": False,
            "mbconv_expand_ratio": 4.0,
            "local_conv_size": 3,
            "layer_lr_decay": 1.0,
            "strides": [2, 2, 1],
            "stem": "conv",
            "neck_dim": 16,
            "neck_size": None,
            "head": True,
        },
        "image_spec": ImageSpec.timm(64).to_dict(),
        "thresholds": {},
        "classes": [],
    }
    assert (tmp_path / "config.json").read_text().endswith("}\n")
    file = read_state_dict(tmp_path / "model.safetensors")
    assert file.metadata == {
        "format": "pt",
        "tinyvit.family": "tinyvit",
        "tinyvit.strides": "2,2,1",
    }
    found = detect(file.tensors, metadata=file.metadata)
    assert (found.family, found.strides, found.is_complete) == ("tinyvit", (2, 2, 1), True)
    assert file.tensors.keys() == model.state_dict().keys()


def test_a_folder_that_was_there(make_tiny_vit: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(make_tiny_vit(seed=1), tmp_path)
    save_pretrained(make_tiny_vit(seed=2), tmp_path)
    assert names(tmp_path) == {"README.md", "config.json", "model.safetensors"}
    assert_same(from_pretrained(tmp_path), make_tiny_vit(seed=2))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_each_file_is_replaced_whole_or_not_at_all(
    file: str, make_tiny_vit: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(make_tiny_vit(seed=1, num_classes=3), tmp_path)
    before = (tmp_path / file).read_bytes()
    really = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if Path(target).name == file:
            raise OSError(28, "No space left on device")
        really(source, target)

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(CheckpointError, match=rf"{file} could not be written: .*No space left"):
        save_pretrained(make_tiny_vit(seed=2), tmp_path)
    assert (tmp_path / file).read_bytes() == before
    assert names(tmp_path) == {"config.json", "model.safetensors"}


def test_a_folder_that_cannot_be(make_tiny_vit: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError) as caught:
            save_pretrained(make_tiny_vit(), folder)
        assert str(caught.value).startswith(f"{folder} cannot be made a folder: ")
        assert str(caught.value).endswith("; choose another")


# --- folders that are damaged ---------------------------------------------------------------------


@pytest.fixture
def saved(make_tiny_vit: MakeModel, tmp_path: Path) -> Path:
    model = make_tiny_vit()
    model.image_spec = ImageSpec.sam(64)
    return save_pretrained(model, tmp_path / "saved")


def rewrite(folder: Path, **changes: Any) -> Path:
    """Change entries of config.json; those of ``arguments`` by a prefix ``arguments_``."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        target = config["arguments"] if key.startswith("arguments_") else config
        target[key.removeprefix("arguments_")] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    assert not isinstance(caught.value, DownloadError)
    return str(caught.value)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert str(saved / "model.safetensors") in refused(saved)
    (saved / "config.json").unlink()
    assert refused(saved) == (
        f"{saved} has no config.json; a folder of save_pretrained holds config.json and "
        "model.safetensors"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"arguments": {', "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b"{}", "does not describe a TinyViT (KeyError: 'arguments')"),
        (b'{"architecture": "vit_base_patch16_224"}', "does not describe a TinyViT (KeyError"),
        (b'{"arguments": [1]}', "does not describe a TinyViT (TypeError: "),
        (b'{"arguments": {"layers": 3}}', "unexpected keyword argument 'layers'"),
    ],
)
def test_a_damaged_config(text: bytes, words: str, saved: Path) -> None:
    (saved / "config.json").write_bytes(text)
    message = refused(saved)
    assert message.startswith(str(saved / "config.json"))
    assert words in message
    if "describe" in message:
        assert message.endswith(
            "; it wants 'arguments' and 'image_spec' as tinyvit.save_pretrained writes them"
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arguments_stem": "round"}, "stem must be 'conv' or 'pointwise', got 'round'"),
        ({"arguments_depths": [1, 1, 2]}, "wants 2 numbers (1 or 2), one for each merge"),
        ({"arguments_strides": "222"}, "strides wants 3 numbers"),
        ({"arguments_img_size": "big"}, "img_size must be a whole number"),
        ({"arguments_embed_dims": 8}, "TypeError"),
        ({"image_spec": {"size": [64, 64]}}, "an ImageSpec has exactly the keys"),
        ({"image_spec": "sam"}, "ValueError"),
        ({"image_spec": 64}, "TypeError"),
    ],
)
def test_a_config_that_contradicts_itself(changes: dict[str, Any], words: str, saved: Path) -> None:
    message = refused(rewrite(saved, **changes))
    assert message.startswith(f"{saved / 'config.json'} does not describe a TinyViT (")
    assert words in message


@pytest.mark.parametrize(
    "changes", [{"arguments_embed_dims": [8, -12, 16, 24]}, {"arguments_mlp_ratio": -1.0}]
)
def test_a_config_that_torch_refuses(changes: dict[str, Any], saved: Path) -> None:
    assert "does not describe a TinyViT" in refused(rewrite(saved, **changes))


def test_a_config_without_a_preparation(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config["image_spec"]
    (saved / "config.json").write_text(json.dumps(config))
    assert from_pretrained(saved).image_spec is None


def test_weights_that_do_not_fit(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = read_state_dict(path).tensors
    state = {key: t.clone() for key, t in tensors.items()}
    state["surprise"] = state.pop("head.weight")
    state["neck.1.bias"] = torch.zeros(3)
    write_state_dict(path, state)
    message = refused(saved)
    assert message.startswith(f"{path} does not fit {saved / 'config.json'}: ")
    for key in ("surprise", "head.weight", "neck.1.bias"):
        assert key in message
    path.write_bytes(path.read_bytes()[:-5])
    assert "model.safetensors" in refused(saved)
    path.write_text("<html>")
    assert "model.safetensors" in refused(saved)


@pytest.mark.parametrize(
    "name", ["nothing", "./a/b", "~/a", "a/b/c", "/a/b", "", "owner/", "/name", "mobile_sam.pt"]
)
def test_neither_a_folder_nor_a_repository(name: str, tmp_path: Path) -> None:
    message = refused(name if not name.startswith("/a") else str(tmp_path / "a" / "b"))
    if name:
        assert "is neither a folder nor a repository 'owner/name' on the Hub; files of" in message
        assert message.endswith("load with tinyvit.create_model(checkpoint=...)")


def test_a_file_of_weights_is_no_folder(saved: Path) -> None:
    assert "create_model(checkpoint=...)" in refused(saved / "model.safetensors")


# --- timm's repositories --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_folder(
    tmp_path_factory: pytest.TempPathFactory, randomise: Callable[..., TinyViT]
) -> tuple[Path, dict[str, Tensor]]:
    """A folder as timm publishes it, and its weights under canonical keys."""
    folder = tmp_path_factory.mktemp("timm")
    state = randomise(TinyViT(**get_variant("tiny_vit_5m_224").arguments())).state_dict()
    spelt = {key_from_canonical(key, LAYOUTS["timm"]): tensor for key, tensor in state.items()}
    assert spelt.keys() == full("timm").keys()
    write_state_dict(folder / "model.safetensors", spelt)
    config = {
        "architecture": "tiny_vit_5m_224",
        "num_classes": 1000,
        "num_features": 320,
        "pretrained_cfg": {"tag": "in1k", "input_size": [3, 224, 224], "crop_pct": 0.95},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, state


def test_a_folder_of_timms(timm_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = timm_folder
    model = from_pretrained(folder)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert (model.strides, model.neck, model.training) == ((2, 2, 2), None, False)
    assert model.image_spec == ImageSpec.timm(224)


def test_a_folder_of_timms_without_weights(
    timm_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((timm_folder[0] / "config.json").read_bytes())
    assert str(tmp_path / "model.safetensors") in refused(tmp_path)


# --- the Hub --------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Answers as the Hub does for the files of repositories."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {}  # "owner/name/revision/file" -> content
        self.requests: list[tuple[str, str, str | None]] = []

    def publish(self, repository: str, folder: Path, revision: str = "main") -> None:
        for path in folder.iterdir():
            self.files[f"{repository}/{revision}/{path.name}"] = path.read_bytes()


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        token = self.headers.get("Authorization")
        match = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", self.path)
        if match is None:
            self.send(404, b"")
            return
        self.server.requests.append((self.command, self.path, token))
        repository, revision, file = match.groups()
        content = self.server.files.get(f"{repository}/{revision}/{file}")
        known = any(name.startswith(f"{repository}/") for name in self.server.files)
        if content is None:
            code = "EntryNotFound" if known else "RepoNotFound"
            self.send(404, b"", {"X-Error-Code": code, "X-Error-Message": f"{code} here"})
            return
        etag = hashlib.sha256(content).hexdigest()
        self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which reads its environment when imported, find the Hub at ``url``."""
    from huggingface_hub import constants, file_download

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # huggingface_hub 0.25 has copies in the second
        monkeypatch.setattr(module, "ENDPOINT", url, raising=False)
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its attempts to connect


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.utils

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    try:
        yield server
    finally:
        close = getattr(huggingface_hub.utils, "close_session", None)
        if close is not None:
            close()
        server.shutdown()
        server.server_close()
        thread.join()


def test_from_the_hub(hub: Hub, saved: Path, tmp_path: Path) -> None:
    hub.publish("someone/tiny", saved)
    wanted = from_pretrained(saved)
    cache = tmp_path / "cache"
    assert_same(from_pretrained("someone/tiny", cache_dir=cache), wanted)
    fetched = [path for command, path, _ in hub.requests if command == "GET"]
    assert sorted(fetched) == [
        "/someone/tiny/resolve/main/config.json",
        "/someone/tiny/resolve/main/model.safetensors",
    ]
    assert (cache / "models--someone--tiny").is_dir()
    assert_same(from_pretrained("someone/tiny", cache_dir=str(cache)), wanted)
    assert [path for command, path, _ in hub.requests if command == "GET"] == fetched
    hub.requests.clear()
    again = from_pretrained("someone/tiny", cache_dir=cache, local_files_only=True)
    assert_same(again, wanted)
    assert hub.requests == []


def test_revision_and_token_reach_the_hub(hub: Hub, saved: Path, tmp_path: Path) -> None:
    hub.publish("someone/tiny", saved, "v2")
    from_pretrained("someone/tiny", revision="v2", cache_dir=tmp_path, token="hf_secret")
    assert {token for _, _, token in hub.requests} == {"Bearer hf_secret"}
    hub.requests.clear()
    from_pretrained("someone/tiny", revision="v2", cache_dir=tmp_path / "b", token=False)
    assert {token for _, _, token in hub.requests} == {None}
    with pytest.raises(DownloadError, match=r"cannot fetch config\.json of 'someone/tiny'"):
        from_pretrained("someone/tiny", revision="v3", cache_dir=tmp_path)


def test_a_repository_of_timms(
    hub: Hub, timm_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, state = timm_folder
    hub.publish("timm/tiny_vit_5m_224.in1k", folder)
    model = from_pretrained("timm/tiny_vit_5m_224.in1k", cache_dir=tmp_path)
    assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])
    assert model.image_spec == ImageSpec.timm(224)


def test_what_the_hub_does_not_have(hub: Hub, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        from_pretrained("someone/nothing", cache_dir=tmp_path)
    text = str(caught.value)
    assert text.startswith("cannot fetch config.json of 'someone/nothing': ")
    assert text.endswith("; check the name, the network and the token")
    assert "404" in text
    assert "\n" not in text
    (saved / "model.safetensors").unlink()
    hub.publish("someone/tiny", saved)
    with pytest.raises(DownloadError, match=r"cannot fetch model\.safetensors of 'someone/tiny'"):
        from_pretrained("someone/tiny", cache_dir=tmp_path)


def test_a_damaged_config_on_the_hub(hub: Hub, saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").write_text("{")
    hub.publish("someone/tiny", saved)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        from_pretrained("someone/tiny", cache_dir=tmp_path)


def test_nothing_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot fetch config\.json of 'someone/tiny'"):
        from_pretrained("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert hub.requests == []


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(DownloadError, match=r"cannot fetch config\.json of 'someone/tiny'"):
        from_pretrained("someone/tiny", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["some one/tiny", "someone/--tiny..x"])
def test_names_that_the_hub_does_not_allow(name: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot fetch config\.json of 'some"):
        from_pretrained(name, cache_dir=tmp_path)


# --- upload ---------------------------------------------------------------------------------------


class Api:
    """Stands for huggingface_hub.HfApi; keeps what it is asked."""

    calls: list[tuple[str, dict[str, Any]]]
    fault: Exception | None = None

    def __init__(self, **arguments: Any) -> None:
        self.note("HfApi", arguments)

    def note(self, name: str, arguments: dict[str, Any]) -> None:
        type(self).calls.append((name, arguments))

    def create_repo(self, repo_id: str, **arguments: Any) -> None:
        self.note("create_repo", {"repo_id": repo_id, **arguments})
        if self.fault is not None:
            raise self.fault

    def upload_folder(self, *, folder_path: str, **arguments: Any) -> Any:
        folder = Path(folder_path)
        content = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.note("upload_folder", {"content": content, "folder": folder, **arguments})
        return f"https://hub/{arguments['repo_id']}/1"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    fake = type("FreshApi", (Api,), {"calls": [], "fault": None})
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    return fake


def test_push(api: type[Api], make_tiny_vit: MakeModel, saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved)
    address = push_to_hub(
        model, "someone/tiny", private=True, commit_message="First", token="hf_secret"
    )
    assert address == "https://hub/someone/tiny/1"
    made, created, (name, uploaded) = api.calls
    assert made == ("HfApi", {"token": "hf_secret"})
    assert created == (
        "create_repo",
        {"repo_id": "someone/tiny", "private": True, "exist_ok": True},
    )
    assert name == "upload_folder"
    assert (uploaded["repo_id"], uploaded["commit_message"]) == ("someone/tiny", "First")
    assert uploaded["content"] == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert not uploaded["folder"].exists()


def test_push_by_default(api: type[Api], make_tiny_vit: MakeModel) -> None:
    push_to_hub(make_tiny_vit(), "someone/tiny")
    (_, made), (_, created), (_, uploaded) = api.calls
    assert made == {"token": None}
    assert created == {"repo_id": "someone/tiny", "private": False, "exist_ok": True}
    assert uploaded["commit_message"] == "Upload TinyViT"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ConnectionError("no route\nmore"), "no route"),
        (ValueError("Repo id must be"), "Repo id must be"),
        (OSError(), "OSError"),
        ("HfHubHTTPError", "401 Unauthorized"),
    ],
)
def test_push_that_is_refused(
    fault: Exception | str, reason: str, api: type[Api], make_tiny_vit: MakeModel
) -> None:
    if isinstance(fault, str):
        from huggingface_hub.errors import HfHubHTTPError

        fault = HfHubHTTPError.__new__(HfHubHTTPError)
        Exception.__init__(fault, "401 Unauthorized\nRequest ID: 1")
    api.fault = fault
    with pytest.raises(DownloadError) as caught:
        push_to_hub(make_tiny_vit(), "someone/tiny")
    assert str(caught.value) == (
        f"cannot upload to 'someone/tiny': {reason}; log in with 'hf auth login' or give token="
    )
    assert caught.value.__cause__ is fault


def test_push_without_a_network(monkeypatch: pytest.MonkeyPatch, make_tiny_vit: MakeModel) -> None:
    at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(DownloadError, match="cannot upload to 'someone/tiny'"):
        push_to_hub(make_tiny_vit(), "someone/tiny", token="hf_secret")


def test_thresholds_are_kept(make_tiny_vit: MakeModel, tmp_path: Path) -> None:
    model = make_tiny_vit()
    model.thresholds = {"mask_threshold": -1.0}
    folder = save_pretrained(model, tmp_path / "a")
    assert from_pretrained(folder).thresholds == {"mask_threshold": -1.0}
    assert create_model(checkpoint=folder / "model.safetensors").thresholds == model.thresholds


def test_classes_are_kept(make_tiny_vit: MakeModel, tmp_path: Path) -> None:
    """Names of a fine-tuned classifier, which were lost on the way to a folder."""
    names = ("ant", "bee", "cat", "dög", "eel")
    file = save_classifier(make_tiny_vit(num_classes=5), tmp_path / "a.safetensors", names)
    model = create_model(checkpoint=file)
    assert model.classes == names
    folder = save_pretrained(model, tmp_path / "folder")
    assert json.loads((folder / "config.json").read_text())["classes"] == list(names)
    for again in (from_pretrained(folder), create_model(checkpoint=folder / "model.safetensors")):
        assert isinstance(again, TinyViT)
        assert again.classes == names
    assert create_model(checkpoint=file, num_classes=3).classes == ()
    model.reset_classifier(5)
    assert model.classes == ()


def test_classes_of_a_whole_sam_are_kept(tmp_path: Path) -> None:
    sam = build_sam("tinyvit_sam_2m", img_size=64)
    sam.image_encoder.reset_classifier(2)
    sam.image_encoder.classes = ("cell", "none")
    folder = save_pretrained(sam, tmp_path / "sam")
    assert json.loads((folder / "config.json").read_text())["classes"] == ["cell", "none"]
    assert from_pretrained(folder).image_encoder.classes == ("cell", "none")  # type: ignore


FORMATS = Path(__file__).parent / "data" / "formats"


@pytest.mark.parametrize("number", [0, 1])
def test_every_format_of_config_json_is_read(number: int) -> None:
    folder = FORMATS / f"config_{number}"
    model = from_pretrained(folder)
    assert model.embed_dims == (8, 8) and model.neck_dim == 8
    assert model.image_spec == ImageSpec.sam(32)
    assert model.thresholds == ({"pred_iou_thresh": 0.7} if number else {})


def test_a_newer_format_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"format": 2, "tinyvit_version": "9.0"}
    (saved / "config.json").write_text(json.dumps(config))
    wanted = r"config\.json was written by tinyvit 9\.0, format 2; this reads up to 1; upgrade"
    with pytest.raises(CheckpointError, match=wanted):
        from_pretrained(saved)


def test_a_whole_sam_makes_the_round_trip(tmp_path: Path) -> None:
    """A fine-tuned SAM is what people publish; saving one ended in torch's AttributeError."""
    sam = build_sam("tinyvit_sam_2m", img_size=64)
    sam.thresholds = {"pred_iou_thresh": 0.5}
    folder = save_pretrained(sam, tmp_path / "sam")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Sam"]
    assert config["thresholds"] == sam.thresholds
    assert config["image_spec"]["size"] == [64, 64]
    assert read_state_dict(folder / "model.safetensors").tensors.keys() == sam.state_dict().keys()
    for again in (from_pretrained(folder), build_sam(folder)):
        assert isinstance(again, Sam)
        assert again.thresholds == sam.thresholds
        assert again.image_encoder.image_spec == sam.image_encoder.image_spec
        for key, value in sam.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
    encoder = create_model(checkpoint=folder)
    assert encoder.image_spec == sam.image_encoder.image_spec
    convert_checkpoint(folder / "model.safetensors", tmp_path / "a.safetensors", "tinyvit")
    with pytest.raises(TypeError, match="wanted a TinyViT or a Sam to save, came Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
