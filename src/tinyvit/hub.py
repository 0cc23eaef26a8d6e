"""Models as folders: config.json and model.safetensors, on the disk or on the Hugging Face Hub.

The folder has the layout of huggingface_hub's model mixin. config.json holds the constructor
arguments and the preparation of images as plain data, so a folder of one's own sizes loads
anywhere. Repositories that timm publishes load too. huggingface_hub is imported only where the
Hub is really asked.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tinyvit.checkpoints import write_state_dict
from tinyvit.checkpoints.files import check_thresholds, header_for, make_folder, write_text
from tinyvit.checkpoints.unwrap import first_line
from tinyvit.errors import CheckpointError, DownloadError
from tinyvit.factory import CONFIG, FOLDER_FORMAT, WEIGHTS, load_folder, read_config
from tinyvit.lazy import need
from tinyvit.modules import TinyViT

if TYPE_CHECKING:
    from tinyvit.sam.model import Sam


def save_pretrained(model: TinyViT | Sam, folder: str | os.PathLike[str]) -> Path:
    """Write a model's config.json and model.safetensors.

    Of a ``Sam`` the weights have MobileSAM's keys; ``build_sam``, ``create_model`` (its encoder),
    ``inspect_checkpoint``, ``convert_checkpoint`` and the command line take the folder, too.

    Args:
        model: The model.
        folder: Made if need be; files of the same names in it are replaced, each whole or not
            at all.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written.
        TypeError: Neither a ``TinyViT`` nor a ``Sam``.
    """
    folder = Path(folder)
    is_sam = not isinstance(model, TinyViT)
    encoder = model if isinstance(model, TinyViT) else getattr(model, "image_encoder", None)
    if not isinstance(encoder, TinyViT):
        raise TypeError(f"wanted a TinyViT or a Sam to save, came {type(model).__name__}")
    spec, thresholds = encoder.image_spec, check_thresholds(model.thresholds)
    config = {
        "format": FOLDER_FORMAT,
        "library_name": "tinyvit",
        "tinyvit_version": version("tinyvit"),
        "architectures": ["Sam" if is_sam else "TinyViT"],
        "arguments": encoder.arguments(),
        "image_spec": None if spec is None else spec.to_dict(),
        "thresholds": thresholds,
        "classes": list(encoder.classes),
    }
    family, own_spec = ("tinyvit_sam", spec) if is_sam else ("tinyvit", None)
    classes = encoder.classes or None
    metadata = header_for(family, encoder.strides, own_spec, classes, thresholds)
    make_folder(folder)
    write_state_dict(folder / WEIGHTS, model.state_dict(), metadata=metadata)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def from_pretrained(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> TinyViT | Sam:
    """Load a model from a folder of ``save_pretrained``, or from a repository on the Hub.

    Args:
        name_or_folder: A folder, or "owner/name" on the Hub. timm's TinyViT repositories are
            understood too.
        revision: Branch, tag or commit on the Hub.
        cache_dir: The Hub's cache; None for its default.
        local_files_only: Use only what the Hub's cache holds already.
        token: The Hub's access token; None for the one that is logged in.

    Returns:
        The model, in eval mode on the CPU: a ``Sam`` where a whole one was saved.

    Raises:
        CheckpointError: No such folder, or its files are damaged or do not fit each other.
        DownloadError: The repository or its files cannot be fetched.
    """
    folder, name = Path(name_or_folder), os.fspath(name_or_folder)
    paths = [folder / CONFIG, folder / WEIGHTS]
    if re.fullmatch(r"[^/.~][^/]*/[^/]+", name) and not folder.is_dir():
        need("huggingface_hub", f"fetching {name!r} from the Hub")
        from huggingface_hub import hf_hub_download

        for number, file in enumerate((CONFIG, WEIGHTS)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = hf_hub_download(
                        name,
                        file,
                        revision=revision,
                        cache_dir=None if cache_dir is None else Path(cache_dir),
                        local_files_only=local_files_only,
                        token=token,
                    )
            except (OSError, ValueError) as err:  # the Hub's own errors are among these
                raise DownloadError(
                    f"cannot fetch {file} of {name!r}: {first_line(err)}; check the name, the "
                    f"network and the token"
                ) from err
            paths[number] = Path(found)
    elif not folder.is_dir():
        raise CheckpointError(
            f"{name_or_folder} is neither a folder nor a repository 'owner/name' on the Hub; "
            f"files of weights load with tinyvit.create_model(checkpoint=...)"
        )
    if read_config(paths[0]).get("architectures") == ["Sam"]:
        from tinyvit.sam.model import build_sam

        return build_sam(paths[1])
    return load_folder(*paths)


def push_to_hub(
    model: TinyViT | Sam,
    repo_id: str,
    *,
    private: bool = False,
    commit_message: str = "Upload TinyViT",
    token: str | bool | None = None,
) -> str:
    """Upload a model to a repository on the Hugging Face Hub, which is made if need be.

    Args:
        model: The model.
        repo_id: "owner/name".
        private: Make a new repository private.
        commit_message: Message of the commit.
        token: The Hub's access token; None for the one that is logged in.

    Returns:
        The address of the commit.

    Raises:
        DownloadError: The Hub cannot be reached or refuses.
    """
    need("huggingface_hub", "push_to_hub")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message
            )
        except Exception as err:  # the Hub's library lets its transport's own errors through
            raise DownloadError(
                f"cannot upload to {repo_id!r}: {first_line(err)}; log in with 'hf auth login' or "
                f"give token="
            ) from err
    return str(commit)
