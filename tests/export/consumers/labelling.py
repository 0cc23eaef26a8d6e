"""Run the labelling tools' own classes on exported files; it knows no tinyvit.

Usage: labelling.py CLIENT FOLDER INPUT.npz OUTPUT.npz; CLIENT is samexporter, samexporter-rgb
(which is wrong: it wants BGR), anylabeling, x_anylabeling_cvhub or osam.
"""

import importlib
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np


def class_of(client):
    """``SegmentAnythingONNX``; packages with Qt in their ``__init__`` are left out."""
    if client.startswith("samexporter"):
        return importlib.import_module("samexporter.sam_onnx").SegmentAnythingONNX
    root = Path(os.environ["TINYVIT_CONSUMERS"]) / client
    for name in ("anylabeling", "anylabeling.services", "anylabeling.services.auto_labeling"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(root / name.replace(".", "/"))]
    return importlib.import_module(f"{name}.sam_onnx").SegmentAnythingONNX


def run_labelling(client, folder, image, clicks):
    encoder, decoder = (str(next(folder.glob(f"*.{part}.onnx"))) for part in ("encoder", "decoder"))
    model = class_of(client)(encoder, decoder)
    given = image[..., ::-1].copy() if client == "samexporter" else image
    embedding = model.encode(given)
    found = []
    for x, y in clicks.tolist():
        masks = model.predict_masks(embedding, [{"type": "point", "data": [x, y], "label": 1}])
        found.append(masks[0][0] > 0)
    return found, embedding["image_embedding"].shape


def run_osam(folder, image, clicks):
    """As README.txt says: files under their hashes, its class, then osam's own interface."""
    import hashlib

    blobs = Path.home() / ".cache" / "osam" / "models" / "blobs"
    blobs.mkdir(parents=True)
    for path in folder.glob("*.onnx"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / f"sha256-{digest}")
    text = (folder / "README.txt").read_text()
    scope = {"__name__": "readme"}
    exec(text[text.index("from osam import") :], scope)
    from osam import apis
    from osam.types import GenerateRequest, Prompt

    found, embedding = [], None
    for click in clicks:
        prompt = Prompt(points=click[None], point_labels=np.ones(1, np.int32))
        name = scope["TinyViT"].name
        request = GenerateRequest(model=name, image=image, image_embedding=embedding, prompt=prompt)
        answer = apis.generate(request)
        embedding = answer.image_embedding
        mask = np.zeros(image.shape[:2], bool)
        one, box = answer.annotations[0], answer.annotations[0].bounding_box
        mask[box.ymin : box.ymax + 1, box.xmin : box.xmax + 1] = one.mask
        found.append(mask)
    return found, (1, *embedding.embedding.shape)


def main():
    client, folder, source, target = sys.argv[1:]
    given = np.load(source)
    arguments = (Path(folder), given["image"], given["clicks"])
    if client == "osam":
        masks, shape = run_osam(*arguments)
    else:
        masks, shape = run_labelling(client, *arguments)
    np.savez(target, masks=np.array(masks), shape=shape)


if __name__ == "__main__":
    main()
