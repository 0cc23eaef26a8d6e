"""What runs in a contestant's process. Started by ``against_peers.py``, one process for each.

Each function makes one contestant ready and returns the call to time. It imports only what that
contestant needs, since the time to the first result counts. Weights come from one folder that was
made before, in the form that each project's own files have.
"""

import ctypes
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tinyvit.bench import serve
from tinyvit.catalog import get_variant

Call = Callable[[], object]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> str:
    """Tell the C library to keep what is freed, in this process; says how."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        raise ValueError("this C library has no mallopt")
    trims = libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    if trims and libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        return "mallopt: trim and mmap threshold"
    if trims and libc.mallopt(_M_MMAP_MAX, 0):
        return "mallopt: trim threshold, no mmap"
    raise ValueError("mallopt refused")


def make(spec: Mapping[str, object]) -> tuple[Call, dict[str, object]]:
    """From {"name", "model", "size", "batch", "threads", "folder"} to a call and facts."""
    name, _, setting = spec["name"].partition("+")
    facts = {"allocator": keep_freed_memory()} if setting == "mallopt" else {}
    if setting not in ("", "mallopt"):
        raise ValueError(f"unknown setting {setting!r} of {spec['name']}; there is mallopt")
    batch = np.load(Path(spec["folder"]) / "pictures.npy")
    kind, _, rest = name.partition("-")
    if kind not in MAKERS:
        raise ValueError(f"unknown contestant {name!r}; there are {', '.join(MAKERS)}")
    return MAKERS[kind](spec, batch, rest), facts


def _ultralytics(spec, batch, rest):
    from ultralytics.models.sam.modules.tiny_encoder import TinyViT

    return _eager(TinyViT(**_constructor(spec)), spec, batch, "ultralytics")


def _mobile_sam(spec, batch, rest):
    importlib.import_module("torchvision_stub")  # before anything that imports torchvision
    from mobile_sam.modeling.tiny_vit_sam import TinyViT

    return _eager(TinyViT(**_constructor(spec)), spec, batch, "mobile_sam")


def _timm(spec, batch, rest):
    importlib.import_module("torchvision_stub")  # before anything that imports torchvision
    import timm

    return _eager(timm.create_model(spec["model"], num_classes=1000), spec, batch, "timm")


def _constructor(spec):
    """Arguments of the encoder in MobileSAM's own builder, at the size asked for."""
    row = get_variant(spec["model"])
    return {
        "img_size": spec["size"],
        "in_chans": 3,
        "num_classes": row.num_classes,
        "embed_dims": list(row.embed_dims),
        "depths": list(row.depths),
        "num_heads": list(row.num_heads),
        "window_sizes": list(row.window_sizes),
        "mlp_ratio": 4.0,
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "use_checkpoint": False,
        "mbconv_expand_ratio": 4.0,
        "local_conv_size": 3,
        "layer_lr_decay": 0.8,
    }


def _eager(model, spec, batch, family):
    """The project's own module as it is, with its own file's keys, in eager mode."""
    import torch
    from safetensors.torch import load_file

    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    state = load_file(Path(spec["folder"]) / f"{family}.safetensors")
    state = {key.removeprefix("image_encoder."): value for key, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("attention_bias_idxs")]
    if missing or unexpected:
        raise ValueError(f"{family} wants other keys: {missing[:5]} missing, {unexpected[:5]} over")
    model.train().eval()  # some keep a table of biases, which eval() makes from the new weights
    tensor = torch.from_numpy(batch)

    def call():
        with torch.inference_mode():
            return model(tensor)

    return call


def _onnxruntime(spec, batch, rest):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if spec["threads"]:
        options.intra_op_num_threads = spec["threads"]
    session = onnxruntime.InferenceSession(
        Path(spec["folder"]) / "plain.onnx", options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: batch})[0]


def _openvino(spec, batch, rest):
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[rest],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if spec["threads"]:
        hints["INFERENCE_NUM_THREADS"] = spec["threads"]
    path = Path(spec["folder"]) / "plain.onnx"
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    request = compiled.create_infer_request()
    return lambda: request.infer([batch], share_inputs=True)[0]


def _tinyvit(spec, batch, rest):
    """This package: ``tinyvit-BACKEND-PRECISION``, or a graph of it that needs no torch."""
    backend, _, precision = rest.partition("-")
    if backend == "openvinograph":
        from tinyvit.inference.graphs import OpenVINOGraph

        path = Path(spec["folder"]) / "tinyvit.onnx"
        graph = OpenVINOGraph(path, precision=precision, threads=spec["threads"])
        return lambda: graph(batch)

    if backend == "native":  # of the file; torch is not loaded
        from tinyvit.factory import open_stored
        from tinyvit.inference.native_backend import NativeBackend

        stored = open_stored(Path(spec["folder"]) / "tinyvit.safetensors", spec["size"])
        native = NativeBackend(stored, precision=precision, threads=spec["threads"])
        return lambda: native(batch)

    import torch

    import tinyvit

    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    engine = tinyvit.Engine(
        _our_model(spec),
        backend=backend,
        precision=precision,
        device="cpu",
        threads=None if backend == "torch" else spec["threads"],
    ).backend
    tensor = torch.from_numpy(batch)
    return lambda: engine(tensor)


def _reference(spec, batch, rest):
    """The plain model in double precision on the first images; not timed."""
    import torch

    model = _our_model(spec).double()
    tensor = torch.from_numpy(batch[: spec["compared"]]).double()

    with torch.inference_mode():
        output = model(tensor)
    return lambda: output


def _our_model(spec):
    import tinyvit

    path = Path(spec["folder"]) / "tinyvit.safetensors"
    return tinyvit.create_model(spec["model"], path, img_size=spec["size"])


def _prepare(spec, batch, rest):
    """Write the weights in each project's form, the images, and the plain export."""
    import torch
    from weights import images, weights

    import tinyvit
    from tinyvit.checkpoints import from_canonical, write_state_dict

    folder = Path(spec["folder"])
    model = tinyvit.create_model(spec["model"], img_size=spec["size"])
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    state = {key: torch.from_numpy(value) for key, value in weights(shapes).items()}
    is_sam = model.neck is not None
    for family in ("tinyvit", "mobile_sam", "ultralytics") if is_sam else ("tinyvit", "timm"):
        strides = {"tinyvit.strides": ",".join(map(str, model.strides))}
        path = folder / f"{family}.safetensors"
        write_state_dict(path, from_canonical(state, family), metadata=strides)
    np.save(folder / "pictures.npy", images(spec["batch"], spec["size"]))
    if spec["export"]:
        from tinyvit.inference.graph_backend import export_onnx

        model.load_state_dict(state)
        (folder / "tinyvit.onnx").write_bytes(export_onnx(model))
        example = torch.from_numpy(images(spec["batch"], spec["size"]))
        with torch.no_grad():
            torch.onnx.export(model.eval(), (example,), folder / "plain.onnx", dynamo=False)
    return lambda: None


MAKERS = {
    "ultralytics": _ultralytics,
    "mobile_sam": _mobile_sam,
    "timm": _timm,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tinyvit": _tinyvit,
    "reference": _reference,
}


def _make_any(spec):
    if spec["name"] == "prepare":
        return _prepare(spec, None, ""), {}
    return make(spec)


if __name__ == "__main__":
    serve(_make_any)
