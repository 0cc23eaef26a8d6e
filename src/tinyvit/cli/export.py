"""``tinyvit export`` and ``tinyvit verify``: write a model for other programs, prove it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyvit.cli import console
from tinyvit.cli.arguments import announce, check_checkpoint, check_folder, one_of
from tinyvit.cli.console import Console

if TYPE_CHECKING:
    from tinyvit.export import Verified
    from tinyvit.modules import TinyViT
    from tinyvit.sam import Sam

NAMES = (  # tinyvit.export's PRESETS, whose package loads numpy
    "tinyvit", "sam", "samexporter", "x-anylabeling", "osam", "cvat", "transformers.js", "web",
    "tensorrt", "openvino", "torch",
)  # fmt: skip
Preset = Annotated[
    str, typer.Option(parser=one_of(*NAMES), help=f"Who will load it: {', '.join(NAMES)}.")
]
LACKING, DIFFERS, CHANGED = 2, 3, 4
"""Exit codes: a package is missing; values differ; a file was changed or is not ours."""


def export(
    own: Console,
    checkpoint: str,
    output: Path,
    preset: Preset = "tinyvit",
    part: str | None = None,
    size: int | None = None,
    opset: int = 17,
    storage: str | None = None,
    single_mask: bool | None = None,
    box_padding: str = "keep",
    num_points: int | None = None,
    prompts: str = "one",
    is_reproducible: bool = False,
    keep_failed: bool = False,
    as_json: bool = False,
) -> None:
    """Write a model for another program, with a certificate.

    The folder holds the graphs, what its consumer wants beside them, and a certificate that
    'tinyvit verify' checks again, anywhere, without torch. Exit code 3: the graphs differ from the
    model, and the folder is not left behind.

    Options:
        checkpoint: Name, file or folder of a SAM, an image encoder or a classifier.
        output (-o --output): Folder to write; new or empty.
        preset (--for CONSUMER):
        part ([encoder|classifier|features]): An encoder, a classifier or features (the maps of all
            stages) alone, as model.onnx. By default all that the checkpoint holds.
        size (--input-size): Run the network at this input size instead of adapting weights of
            another size in the graph.
        opset: ONNX opset, 16 to 20.
        storage ([fp32|fp16]): How weights are stored; arithmetic stays in fp32.
        single_mask (--single-mask/--all-masks): The best mask alone, or all four.
        box_padding ([keep|drop]): Padding points beside a box: keep or drop them in the
            graph.
        num_points: Take this number of points in every prompt, padding included: for accelerators
            that want fixed shapes.
        prompts ([one|dynamic]): One prompt in a call, or any number of them on one embedding.
        is_reproducible (--reproducible): Two exports are equal byte for byte.
        keep_failed: Leave a folder whose comparison failed.

    Examples:
        tinyvit export mobile_sam -o exported/
        tinyvit export tinyvit_sam_2m -o labels/ --for x-anylabeling
        tinyvit export model.safetensors -o web/ --for web --storage fp16
        tinyvit export tiny_vit_5m_224.dist_in22k_ft_in1k -o classifier/
    """
    check_folder(output, "-o")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is there and not empty; choose another folder")
    from tinyvit.catalog import CHECKPOINTS
    from tinyvit.export import ParityError, export_model

    model = _load(own, checkpoint, part)
    licence = next((row.licence for row in CHECKPOINTS if row.name == checkpoint), "")
    try:
        verified = export_model(
            model, output, preset=preset, part=part,  # type: ignore[arg-type]
            name=Path(checkpoint).stem, licence=licence, side=size,
            opset=opset, storage=storage, single_mask=single_mask,  # type: ignore[arg-type]
            drop_padding=box_padding == "drop", num_points=num_points,
            many_prompts=prompts == "dynamic", is_reproducible=is_reproducible,
            keep_failed=keep_failed, progress=own.say,
        )  # fmt: skip
    except ParityError as err:
        _report(own, err.verified, as_json)
        console.complain(f"error: {err}")
        raise typer.Exit(DIFFERS) from err
    _report(own, verified, as_json)
    own.say(f"written to {output}; prove it again with: tinyvit verify {output}")


def verify(
    own: Console,
    path: Path,
    backend: str | None = None,
    against: str | None = None,
    as_json: bool = False,
) -> None:
    """Prove an exported folder again, without torch.

    Hashes first, then every case of its certificate. Only --against and programs of torch.export
    need torch. Exit codes: 0 passed, 2 wrong usage or a missing package, 3 values differ, 4 a file
    was changed or was not written by 'tinyvit export'.

    Options:
        path: Folder of 'tinyvit export', or a file in it; with --against any file with such inputs
            and outputs.
        backend ([onnx|openvino]): What runs the graphs.
        against (NAME_OR_FILE): Compare with this checkpoint anew; needs torch.

    Examples:
        tinyvit verify exported/
        tinyvit verify exported/ --backend openvino
    """
    from tinyvit.errors import CheckpointError, MissingExtraError
    from tinyvit.export import verify as run

    try:
        if against is None:
            with own.progress("verifying", things="comparisons") as update:
                verified = run(path, backend=backend, progress=update)  # type: ignore[arg-type]
        else:
            from tinyvit.export.comparing import verify_against

            model = _load(own, against, None)
            verified = verify_against(path, model, backend=backend)  # type: ignore[arg-type]
    except MissingExtraError as err:
        console.complain(f"error: {err}")
        raise typer.Exit(LACKING) from err
    except CheckpointError as err:
        console.complain(f"error: {err}")
        raise typer.Exit(CHANGED) from err
    _report(own, verified, as_json)
    if not verified.passed:
        raise typer.Exit(DIFFERS)


def _load(own: Console, checkpoint: str, part: str | None) -> Sam | TinyViT:
    """All that a checkpoint holds: a SAM, an encoder or a classifier; for a part its network."""
    from tinyvit.checkpoints.open import open_checkpoint
    from tinyvit.factory import create_model
    from tinyvit.hub import from_pretrained
    from tinyvit.sam import build_sam

    check_checkpoint(checkpoint)
    if (Path(checkpoint) / "config.json").is_file():
        return from_pretrained(checkpoint)
    announce(own, checkpoint)
    with own.progress("downloading", counts_bytes=True) as update:
        opened = open_checkpoint(checkpoint, progress=update)
    is_whole = {"prompt_encoder", "mask_decoder"} <= set(opened.found.parts)
    return build_sam(checkpoint) if is_whole and part is None else create_model(None, opened)


def _report(own: Console, verified: Verified, as_json: bool) -> None:
    """Every comparison as JSON, or what failed and the worst in words."""
    if as_json:
        console.write_json(verified.to_dict())
        return
    for case in verified.cases:
        if not case.passed:
            console.write(f"FAILED {case.id}: {case.value:.2g}, allowed {case.allowed:.2g}")
    facts: dict[str, Any] = {}
    for case in verified.cases:
        facts[case.output] = max(facts.get(case.output, 0.0), case.value)
    rows = [(name, f"{value:.1e}") for name, value in facts.items()]
    if verified.masks:
        rows.append(("IoU of masks", "mean {mean:.5f}, least {least:.5f}".format(**verified.masks)))
    console.write(console.table(("output", "largest error"), rows))
    word = "passed" if verified.passed else "FAILED"
    console.write(f"{word}: {len(verified.cases)} comparisons by {verified.backend}")
