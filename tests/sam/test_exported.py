"""Exported folders in the place of a model: the same masks as torch's, by the same classes."""

import copy
import pickle
import shutil
import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tiny import make_tiny_sam, noise
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec
from tinyvit.sam import ImageEmbedding, Prompt, SamAutomaticMaskGenerator, SamPredictor, Segmenter
from tinyvit.sam.upscale import upscale
from without import run_without

onnx = pytest.importorskip("onnx")
BACKENDS = ("onnx", "openvino")


@pytest.fixture(scope="module")
def sam():
    return make_tiny_sam()


@pytest.fixture(scope="module")
def theirs(sam):
    return Segmenter(sam, backend="torch")


@pytest.fixture(scope="module")
def ours(exported):
    folder = exported()
    return {name: Segmenter(folder, backend=name, threads=1) for name in BACKENDS}


def random_image(rng):
    """An image of any size and kind that a caller may have."""
    height, width = (int(2 ** rng.uniform(0, 11)) for _ in range(2))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    kind = rng.integers(5)
    if kind == 1:
        return pixels[:, :, 0]
    if kind == 2:
        return np.concatenate([pixels, pixels[:, :, :1]], axis=2)
    if kind == 3:
        return Image.fromarray(pixels).convert("LA")
    if kind == 4:
        turned, file = Image.Exif(), BytesIO()
        turned[0x0112] = int(rng.integers(2, 9))
        Image.fromarray(pixels).save(file, "PNG", exif=turned)
        return file.getvalue()
    return pixels


def random_prompts(rng, size, low_res_size):
    """One prompt of each kind."""
    height, width = size
    far = np.array([width, height])
    points, x, y = rng.random((5, 2)) * far, rng.random(2) * width / 2, rng.random(2) * height / 2
    box = [x[0], y[0], x[0] + x[1] + 0.1, y[0] + y[1] + 0.1]
    logits = rng.normal(0, 6, low_res_size)
    mask = rng.random(size) > 0.5
    return [
        Prompt(points[:1]),
        Prompt(points[:2], [1, 0]),
        Prompt(points, [1, 0, 0, 1, 1]),
        Prompt(box=box),
        Prompt(points[:1], [0], box=box),
        Prompt(points[:3], mask=logits),
        Prompt(box=box, mask=mask),
        Prompt(mask=logits),
    ]


def assert_alike(mine, its):
    assert mine.shape == its.shape and mine.placement == its.placement
    for prompt in range(len(its)):
        near = np.abs(mine.predicted_ious[prompt] - its.predicted_ious[prompt]).max()
        assert near < 1e-4
        scale = np.abs(its.low_res_logits[prompt]).max()
        error = np.abs(mine.low_res_logits[prompt] - its.low_res_logits[prompt]).max()
        assert error < 1e-4 * scale
        for number in range(len(its.predicted_ious[prompt])):
            a, b = mine.mask(prompt, number), its.mask(prompt, number)
            either, wrong = np.count_nonzero(a | b), a != b
            # an edge that moves by one pixel is a whole line of an image as narrow as 5 pixels
            assert np.count_nonzero(wrong) <= max(1, 0.0005 * either, min(a.shape))
            if wrong.any():
                logits = its.low_res_logits[prompt][number]
                near = upscale(logits, its.placement, its.logit_stride)[wrong] - its.threshold
                assert np.abs(near).max() < 1e-4 * scale


@pytest.mark.parametrize(
    "backend, count",
    [
        ("onnx", 10),
        ("openvino", 5),
        pytest.param("onnx", 100, marks=pytest.mark.slow),  # 60 s of CPU
        pytest.param("openvino", 100, marks=pytest.mark.slow),
    ],
)
def test_any_image_and_any_prompt_as_by_torch(backend, count, ours, theirs):
    rng = np.random.default_rng(7)
    for _ in range(count):
        image = random_image(rng)
        (embedding,) = theirs.embed([image])
        prompts = [random_prompts(rng, embedding.original_size, embedding.low_res_size)]
        multimask = (True, False, "auto")[int(rng.integers(3))]
        (its,) = theirs.segment([embedding], prompts, multimask)
        (mine,) = ours[backend].segment([image], prompts, multimask)
        assert_alike(mine, its)


def test_embeddings_go_both_ways(ours, theirs, exported, tmp_path):
    one, other = ours["onnx"], theirs
    image, prompts = noise(40, 70), [[Prompt([[30, 20]])]]
    for here, there in ((one, other), (other, one)):
        (embedding,) = here.embed(image)
        again = ImageEmbedding.from_bytes(embedding.to_bytes())
        assert_alike(*(next(s.segment([again], prompts)) for s in (there, here)))
    other_weights = shutil.copytree(exported(), tmp_path / "other")
    model = onnx.load(other_weights / "encoder.onnx")
    for entry in model.metadata_props:
        if entry.key == "tinyvit.weights_sha256":
            entry.value = "0" * 64
    onnx.save(model, other_weights / "encoder.onnx")
    changed = Segmenter(other_weights)
    with pytest.raises(ValueError, match="was made by an encoder with weights"):
        changed.predict(embedding, prompts[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_predictor_gives_what_torchs_gives(backend, sam, exported):
    mine = SamPredictor(exported(), backend=backend)
    its = SamPredictor(sam, backend="torch")
    assert str(mine.device) == "cpu" and mine.model.image_format == "RGB"
    image = noise(90, 60)
    for predictor in (mine, its):
        predictor.set_image(image[:, :, ::-1], "BGR")
    assert (mine.original_size, mine.input_size) == (its.original_size, its.input_size)
    np.testing.assert_allclose(mine.get_image_embedding(), its.get_image_embedding(), atol=1e-4)
    boxes = np.array([[5, 5, 40, 50], [10, 10, 50, 80]])
    calls = [
        {"point_coords": np.array([[30, 40]]), "point_labels": np.array([1])},
        {"box": boxes[0], "multimask_output": False},
        {"box": boxes, "multimask_output": False},
        {"point_coords": boxes[:, :2], "point_labels": np.array([1, 0]), "return_logits": True},
    ]
    for call in calls:
        for a, b in zip(mine.predict(**call), its.predict(**call), strict=True):
            if a.dtype == bool:
                assert (a != b).mean() < 0.0005
            else:
                np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))
    placed = its.transform.apply_boxes_torch(__import__("torch").tensor(boxes), image.shape[:2])
    for a, b in zip(
        mine.predict_torch(None, None, placed), its.predict_torch(None, None, placed), strict=True
    ):
        assert a.shape == b.shape and a.dtype == b.dtype
    mine.set_embedding(its.embedding)
    mine.features = mine.features + 1
    assert mine.predict(**calls[0])[0].shape == (3, 90, 60)
    with pytest.raises(ValueError, match="hq_token_only=True wants a model with Light HQ-SAM"):
        mine.predict(**calls[0], hq_token_only=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything(backend, sam, exported):
    options = {"points_per_side": 4, "pred_iou_thresh": 0.01, "stability_score_thresh": 0.0}
    mine = SamAutomaticMaskGenerator(exported(), **options, backend=backend)
    its = SamAutomaticMaskGenerator(sam, **options, backend="torch")
    for size in ((64, 64), (40, 90)):
        found, wanted = mine.generate(noise(*size)), its.generate(noise(*size))
        assert len(found) == len(wanted) > 0
        for a, b in zip(found, wanted, strict=True):
            assert abs(a["area"] - b["area"]) <= max(1, 0.001 * b["area"])
            assert a["point_coords"] == b["point_coords"]


def test_a_decoder_of_one_mask(sam, exported, theirs):
    folder = exported("samexporter", side=64)
    single = Segmenter(folder)
    assert single.candidates == 1 and theirs.candidates == 3
    image, points = noise(50, 64), [[10, 20], [30, 40], [50, 45]]
    prompts = [[Prompt(points[:1]), Prompt(points, [1, 0, 1])]]
    (mine,), (its,) = single.segment([image], prompts), theirs.segment([image], prompts)
    assert mine.shape == (2, 1, 50, 64)
    for number in range(2):
        assert (mine.mask(number) != its.mask(number)).mean() < 0.0005
    with pytest.raises(
        ValueError, match="everything mode wants all masks of a point, and this exp"
    ):
        SamAutomaticMaskGenerator(folder)


@pytest.mark.parametrize("preset", ["osam", "openvino", "tensorrt"])
def test_pairs_for_others_run_here_too(preset, exported, theirs):
    own = Segmenter(exported(preset, side=None if preset == "openvino" else 64))
    image = noise(64, 40)
    (mine,), (its,) = (s.segment([image], [[Prompt([[20, 30]])]]) for s in (own, theirs))
    assert (mine.mask(0) != its.mask(0)).mean() < 0.0005


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_of_many_prompts_takes_them_in_one_call(backend, exported, theirs, monkeypatch):
    own = Segmenter(exported(many_prompts=True), backend=backend)
    image, rng = noise(50, 64), np.random.default_rng(5)
    (embedding,) = theirs.embed([image])
    prompts = random_prompts(rng, (50, 64), embedding.low_res_size)
    prompts += [Prompt(rng.random((1, 2)) * (64, 50)) for _ in range(6)]
    (its,) = theirs.segment([image], [prompts])
    (mine,) = own.segment([image], [prompts])
    assert_alike(mine, its)
    sizes = []
    run = own._decoder._graph.run
    monkeypatch.setattr(own._decoder._graph, "run", lambda inputs: (
        sizes.append(len(inputs["point_coords"])), run(inputs))[1])  # fmt: skip
    next(own.segment([image], [prompts[-6:]]))
    assert sizes == [6]


def test_a_decoder_of_a_fixed_number_of_points(exported, theirs):
    own = Segmenter(exported(num_points=4))
    image, points = noise(50, 64), np.array([[10, 20], [30, 40], [50, 45]])
    full = [Prompt(points, [1, 0, 1]), Prompt(points[:2], [1, 0], box=[3, 4, 50, 40])]
    (its,), (mine,) = (s.segment([image], [full]) for s in (theirs, own))
    assert_alike(mine, its)
    (padded,) = own.segment([image], [[Prompt(points[:1])]])
    assert padded.shape == (1, 3, 50, 64)
    with pytest.raises(ValueError, match="exported for 4 points in a prompt, a box counted as two"):
        next(own.segment([image], [[Prompt(points, [1, 1, 1], box=[3, 4, 50, 40])]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_a_segmenter(backend, ours):
    segmenter = ours[backend]
    images = [noise(30 + 10 * i, 64) for i in range(3)]
    prompts = [[Prompt([[5 + i, 7]]), Prompt(box=[2, 2, 20, 20])] for i in range(3)]
    wanted = [next(segmenter.segment([a], [b])) for a, b in zip(images, prompts, strict=True)]
    wrong = []

    def work(offset):
        try:
            for step in range(6):
                i = (step + offset) % 3
                assert_alike(next(segmenter.segment([images[i]], [prompts[i]])), wanted[i])
        except AssertionError as err:
            wrong.append(err)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_pickles(backend, ours):
    image, prompts = noise(33, 44), [[Prompt([[20, 10]])]]
    (wanted,) = ours[backend].segment([image], prompts)
    for again in (copy.deepcopy(ours[backend]), pickle.loads(pickle.dumps(ours[backend]))):
        assert_alike(next(again.segment([image], prompts)), wanted)


# -- errors ----------------------------------------------------------------------------------------


def test_prompts_outside_and_too_large_images(exported):
    segmenter = Segmenter(exported())
    with pytest.raises(ValueError, match=r"lies outside the image of width 64 and height 48"):
        next(segmenter.segment([noise(48, 64)], [[Prompt([[100, 10]])]]))
    wide = Image.new("1", (20_000, 10_000))
    file = BytesIO()
    wide.save(file, "PNG")
    with pytest.raises(ValueError, match="200000000 pixels"):
        next(segmenter.embed([file.getvalue()]))


def test_values_that_are_not_finite(exported, tmp_path):
    from onnx import numpy_helper

    for part, call in (("encoder", "embed"), ("decoder", "segment")):
        broken = shutil.copytree(exported(), tmp_path / part)
        model = onnx.load(broken / f"{part}.onnx")
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.ndim > 1:
                tensor.CopyFrom(numpy_helper.from_array(values * np.float32("nan"), tensor.name))
        onnx.save(model, broken / f"{part}.onnx")
        segmenter = Segmenter(broken)
        more = [[[Prompt([[3, 3]])]]] if call == "segment" else []
        with pytest.raises(ValueError, match="backend onnx gave values that are not finite"):
            next(getattr(segmenter, call)([noise(9, 9)], *more))


def test_arguments_that_do_not_go_together(exported):
    folder = exported()
    pair = {"encoder": folder / "encoder.onnx", "decoder": folder / "decoder.onnx"}
    with pytest.raises(ValueError, match="give encoder= and decoder= together and no model"):
        Segmenter(encoder=pair["encoder"])
    with pytest.raises(ValueError, match="give encoder= and decoder= together and no model"):
        Segmenter(folder, **pair)
    with pytest.raises(ValueError, match=r"image_spec= is for encoder= and decoder="):
        Segmenter(folder, image_spec=ImageSpec.sam(64))
    with pytest.raises(ValueError, match="an exported decoder takes padded images"):
        Segmenter(folder, pad=False)
    with pytest.raises(ValueError, match="exported files run as they are, in fp32"):
        SamPredictor(folder, fast=False)
    (embedding,) = Segmenter(**pair).embed([noise(9, 9)])
    smaller = ImageEmbedding(embedding.features[:, :2], embedding.placement, embedding.image_spec)
    with pytest.raises(ValueError, match=r"takes embeddings \[32, 4, 4\], came \[32, 2, 4\]"):
        Segmenter(folder).prepare(smaller)
    with pytest.raises(ValueError, match=r"mask_input must be low-res logits|must be a bool mask"):
        Segmenter(folder).predict(embedding, [Prompt(mask=np.zeros((8, 8)))])
    with pytest.raises(
        CheckpointError, match="is no decoder as segment-anything's exporter writes"
    ):
        Segmenter(encoder=pair["encoder"], decoder=_without_name(folder), image_spec=None)


def _without_name(folder):
    """A decoder whose input has another name."""
    path = folder.parent / "renamed.onnx"
    model = onnx.load(folder / "decoder.onnx")
    model.graph.input[1].name = "points"
    for node in model.graph.node:
        node.input[:] = ["points" if name == "point_coords" else name for name in node.input]
    onnx.save(model, path)
    return path


def test_files_without_our_metadata(exported, theirs, tmp_path):
    bare = shutil.copytree(exported(), tmp_path / "bare")
    for part in ("encoder", "decoder"):
        model = onnx.load(bare / f"{part}.onnx")
        del model.metadata_props[:]
        onnx.save(model, bare / f"{part}.onnx")
    segmenter = Segmenter(
        encoder=bare / "encoder.onnx", decoder=bare / "decoder.onnx", image_spec=ImageSpec.sam(64)
    )
    image, prompts = noise(48, 64), [[Prompt([[20, 30]]), Prompt(box=[3, 4, 50, 40])]]
    assert_alike(next(segmenter.segment([image], prompts)), next(theirs.segment([image], prompts)))
    assert next(segmenter.embed([image])).weights_sha256 is None


# -- without torch ---------------------------------------------------------------------------------

WALK = """
import sys
import numpy as np
import tinyvit
from tinyvit import Engine, ImageEmbedding, Prompt, SamAutomaticMaskGenerator, SamPredictor
from tinyvit import Segmenter

folder, backend = sys.argv[1:]
image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
segmenter = Segmenter(folder, backend=backend, threads=1)
for masks in segmenter.segment([image], [[Prompt([[20, 30]]), Prompt(box=[3, 4, 50, 40])]]):
    print(masks, masks.to_numpy().shape, len(masks.to_coco(1)))
predictor = SamPredictor(folder, backend=backend)
predictor.set_image(image)
print([x.shape for x in predictor.predict(np.array([[20, 30]]), np.array([1]))])
predictor.set_embedding(ImageEmbedding.from_bytes(predictor.embedding.to_bytes()))
print(predictor.predict(box=np.array([3, 4, 50, 40]), multimask_output=False)[0].shape)
options = {"backend": backend, "pred_iou_thresh": 0, "stability_score_thresh": 0}
print(type(SamAutomaticMaskGenerator(folder, 2, **options).generate(image)))
print(next(Engine(folder, backend=backend).stream(image)))
for use in (
    lambda: predictor.features, lambda: predictor.get_image_embedding(), lambda: predictor.device,
    lambda: predictor.predict_torch(None, None), lambda: predictor.set_torch_image(None, (1, 1)),
    lambda: Engine(folder).embed(image), lambda: Segmenter("tinyvit_sam_2m"),
    lambda: tinyvit.create_model("tinyvit_sam_2m"), lambda: tinyvit.build_sam,
    lambda: tinyvit.TinyViT,
):
    try:
        use()
        print("no error")
    except tinyvit.MissingExtraError as err:
        print("\\n" in str(err), str(err).partition("pip install ")[2])
print({"torch", "onnx"} & set(sys.modules))
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_runs_where_there_is_no_torch(backend, exported):
    missing = ("torch", "onnx", "scipy", "huggingface_hub", "tinyvit_native")
    lines = run_without(missing, WALK, exported(), backend).splitlines()
    assert lines[:6] == [
        "Masks(2 prompts, up to 3 masks each, image 48x64) (2, 3, 48, 64) 2",
        "[(3, 48, 64), (3,), (3, 16, 16)]",
        "(1, 48, 64)",
        "<class 'list'>",
        "Encoded([32, 4, 4], image 48x64)",
        "False 'tinyvit[torch]'",
    ]
    assert lines[-1] == "set()"
    assert all(line.startswith("False '") for line in lines[5:-1]), lines
    assert len(lines) == 16


FLAT = """
import sys
import numpy as np
from tinyvit import Prompt, Segmenter

segmenter = Segmenter(sys.argv[1], threads=1)
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (300, 400, 3), np.uint8)

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

for number in range(500):
    one = image[: 200 + number % 100, : 300 + number % 70]
    next(segmenter.segment([one], [[Prompt([[20, 30]])]])).mask(0)
    if number == 100:
        before = memory()
print(memory() - before)
"""


@pytest.mark.skipif(not shutil.os.path.exists("/proc/self/status"), reason="Linux says it")
def test_memory_stays_flat_over_500_images(exported):
    assert int(run_without(("torch",), FLAT, exported())) < 16_000  # kB
