"""tiny_vit.py under torch.export, torch.jit.trace and torch.compile: any batch, any size."""

import shutil

import pytest
import torch

SHALLOW = {"depths": (1, 1, 1, 1)}
FORMS = {
    "sam": {**SHALLOW},
    "pointwise classifier": {
        **SHALLOW,
        "strides": (2, 2, 2),
        "neck_dim": None,
        "stem": "pointwise",
    },
}
TWO_STAGES = {
    "embed_dims": (8, 12),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "window_sizes": (4, 3),
    "neck_dim": None,
}
SIZES = [(1, 64, 64), (3, 50, 77), (2, 100, 33), (1, 41, 160)]

# Another compiler may fuse or reorder float32 additions: rounding, no more
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.export's own use of its parts
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_with_every_size_dynamic(make_tiny_vit, image, form):
    model = make_tiny_vit(**FORMS[form])
    # a map one wide is another program to torch.export: the last one stays at least two
    batch = torch.export.Dim("batch", min=1, max=64)
    height, width = (torch.export.Dim(name, min=33, max=2048) for name in ("height", "width"))
    exported = torch.export.export(
        model, (image(2, 70, 90),), dynamic_shapes=({0: batch, 2: height, 3: width},)
    ).module()
    with torch.no_grad():
        for size in SIZES:
            x = image(*size)
            torch.testing.assert_close(exported(x), model(x), **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # numbers that become constants
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch now prefers export
def test_trace_at_another_batch_and_size(make_tiny_vit, image, form):
    model = make_tiny_vit(**FORMS[form])
    with torch.no_grad():
        traced = torch.jit.trace(model, image(1, 64, 64))
        for size in [*SIZES, (2, 1, 1), (1, 7, 300)]:
            x = image(*size)
            torch.testing.assert_close(traced(x), model(x), **CLOSE)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compile_without_graph_breaks(fresh_compiler, make_tiny_vit, image):
    model = make_tiny_vit(**{**TWO_STAGES, "neck_dim": 6})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for size in SIZES[:3]:  # the second size makes it compile once more, for any size
            x = image(*size)
            torch.testing.assert_close(compiled(x), model(x), **CLOSE)


def test_compiled_training_with_checkpointing(fresh_compiler, make_tiny_vit, image):
    plain = make_tiny_vit(**TWO_STAGES).train()
    saving = make_tiny_vit(**TWO_STAGES, use_checkpoint=True).train()
    compiled = torch.compile(saving, backend="aot_eager", fullgraph=True)
    x = image(2, 32, 32)
    plain(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **CLOSE)
    for p, q in zip(plain.buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(q, p, **CLOSE)  # each batch counted once


@pytest.mark.slow  # 31 s of CPU, most of it g++'s
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ with g++")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own imports
def test_inductor_at_two_batch_sizes(fresh_compiler, make_tiny_vit, image):
    model = make_tiny_vit(**TWO_STAGES)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3):
            x = image(batch, 30, 26)
            torch._dynamo.mark_dynamic(x, 0)  # one program for every batch of this image size
            torch.testing.assert_close(compiled(x), model(x), **CLOSE)
