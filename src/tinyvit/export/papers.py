"""The files that a consumer or its user wants beside the graphs: README.txt, configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .presets import Preset


def papers(row: Preset, facts: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Text by file name.

    Args:
        row: Who the folder is for.
        facts: Of the export.
        folder: Where the graphs are.
    """
    sides = f"Inputs of {facts['side']} x {facts['side']} pixels."
    lines = [f"For {row.consumer}.", sides, row.note]
    found = {"README.txt": "\n".join(line for line in lines if line) + "\n"}
    if row.name == "tensorrt" and facts.get("decoder"):
        found["README.txt"] += _shapes(facts)
    if row.name == "osam":
        found["README.txt"] += _class_for_osam(facts, folder)
    elif row.name in ("x-anylabeling", "samexporter"):
        own = row.name == "x-anylabeling"
        found[f"{facts['name']}.yaml" if own else "config.yaml"] = _labelling(facts, own)
    elif row.style == "transformers":
        found.update(_configurations(facts))
    return found


def _shapes(facts: Mapping[str, Any]) -> str:
    """What trtexec must be told of the decoder; nothing where all shapes are fixed."""
    most_prompts, rows = (64, "N") if facts["many_prompts"] else (1, "1")
    if facts["num_points"] and most_prompts == 1:
        return (
            f"All shapes are fixed: give {facts['num_points']} points in every prompt, and fill "
            "up with points 0, 0 of label -1.\n"
        )
    lines = [f"Shapes for trtexec (point_coords {rows} x P x 2, point_labels {rows} x P):"]
    for kind, prompts, points in (("min", 1, 1), ("opt", 1, 2), ("max", most_prompts, 10)):
        points = facts["num_points"] or points
        shape = f"{prompts}x{points}"
        lines.append(f"--{kind}Shapes=point_coords:{shape}x2,point_labels:{shape}")
    return "\n".join(lines) + "\n"


def _labelling(facts: Mapping[str, Any], is_x: bool) -> str:
    """The model's page of AnyLabeling, or of X-AnyLabeling, which names a provider too."""
    name = facts["name"]
    named = [f"name: {name}-tinyvit", "provider: tinyvit"] if is_x else [f"name: {name}"]
    return "\n".join([
        "type: segment_anything", *named, f"display_name: {name} (tinyvit)",
        f"encoder_model_path: {facts['encoder']}", f"decoder_model_path: {facts['decoder']}",
        "input_size: 1024", "max_width: 1024", "max_height: 682", "",
    ])  # fmt: skip


def _class_for_osam(facts: Mapping[str, Any], folder: Path) -> str:
    """The lines that make osam know the files, which it finds by their hash."""
    sha = {part: hashlib.sha256((folder / facts[part]).read_bytes()).hexdigest()
           for part in ("encoder", "decoder")}  # fmt: skip
    return f"""
osam finds files by their sha256. Copy them to

~/.cache/osam/models/blobs/sha256-{sha["encoder"]}  (encoder.onnx)
~/.cache/osam/models/blobs/sha256-{sha["decoder"]}  (decoder.onnx)

and register a class before osam is used:

from osam import apis, types
from osam._models.sam._models import Sam

class TinyViT(Sam):
    name = "{facts["name"]}:latest"
    _blobs = {{
        "encoder": types.Blob(url="", hash="sha256:{sha["encoder"]}"),
        "decoder": types.Blob(url="", hash="sha256:{sha["decoder"]}"),
    }}

apis.registered_model_types.append(TinyViT)
"""


def _configurations(facts: Mapping[str, Any]) -> dict[str, str]:
    """config.json and preprocessor_config.json as transformers.js reads them."""
    spec, side = facts["image_spec"], facts["side"]
    config = {
        "model_type": "sam", "architectures": ["SamModel"],
        "vision_config": {"image_size": side, "patch_size": 16},
        "prompt_encoder_config": {"image_size": side}, "mask_decoder_config": {},
    }  # fmt: skip
    processor = {
        "image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor",
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [value / 255 for value in spec["mean"]],
        "image_std": [value / 255 for value in spec["std"]], "rescale_factor": 1 / 255,
        "pad_size": {"height": side, "width": side}, "resample": 2,
        "size": {"longest_edge": side},
    }  # fmt: skip
    return {
        "config.json": json.dumps(config, indent=1),
        "preprocessor_config.json": json.dumps(processor, indent=1),
    }
