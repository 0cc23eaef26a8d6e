"""Measure training throughput against timm's TinyViT: forward, backward, AdamW's step.

Run it with the environment that ``scripts/peers`` makes. Each contestant runs in a process of its
own, with the same random images and labels, and they take turns round by round
(``tinyvit.bench``). ``training.md`` and ``training.json`` are written beside this file:

    .venv-peers/bin/python benchmarks/training.py
    .venv-peers/bin/python benchmarks/training.py --batch 8 --rounds 2 --threads 1

``+mallopt`` is the same project with ``tinyvit.tune_allocator()``, one line that has the C library
keep the memory that large tensors give back.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from tinyvit.bench import Spread, Worker, machine_facts, serve, take_turns

HERE = Path(__file__).parent
COMMAND = (sys.executable, str(HERE / "training.py"), "--serve")
CONTESTANTS = ("timm", "timm+mallopt", "tinyvit", "tinyvit+mallopt")
BASELINES = ("timm", "timm+mallopt")
PRECISIONS = ("fp32", "bf16")
LEARNING_RATE = 1e-4


def make(spec: Mapping[str, object]) -> tuple[Callable[[], object], dict[str, object]]:
    """From {"name", "model", "size", "batch", "precision", "threads"} to one training step."""
    project, _, setting = str(spec["name"]).partition("+")
    if project not in ("timm", "tinyvit") or setting not in ("", "mallopt"):
        raise ValueError(f"unknown contestant {spec['name']!r}; there are {', '.join(CONTESTANTS)}")
    import torch

    import tinyvit

    if setting and not tinyvit.tune_allocator():
        raise ValueError("this C library has no mallopt")
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    model = _timm(spec["model"]) if project == "timm" else _tinyvit(spec["model"])
    images = torch.randn(spec["batch"], 3, spec["size"], spec["size"])
    labels = torch.randint(0, 1000, (spec["batch"],))
    model.train()
    # Both as their own trainers have it: tinyvit's model and maps are channels-last by themselves.
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    is_bf16 = spec["precision"] == "bf16"

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step, {"parameters": sum(p.numel() for p in model.parameters())}


def _timm(name):
    import torchvision_stub  # noqa: F401  (before anything that imports torchvision)

    import timm  # isort: skip

    return timm.create_model(name, num_classes=1000, drop_path_rate=0.0)


def _tinyvit(name):
    import tinyvit

    return tinyvit.create_model(name, num_classes=1000, drop_path_rate=0.0)


def run_case(options: argparse.Namespace, precision: str) -> dict:
    """Measure all contestants in one precision; everything about it as plain data."""
    spec = {
        "model": options.model, "size": options.size, "batch": options.batch,
        "precision": precision, "threads": options.threads,
    }  # fmt: skip
    with ExitStack() as stack:
        workers, left_out = {}, {}
        for name in options.contestant or CONTESTANTS:
            try:
                workers[name] = stack.enter_context(Worker(COMMAND, {**spec, "name": name}))
            except (ImportError, ValueError, OSError) as err:
                left_out[name] = str(err)
        turns = take_turns(list(workers.values()), options.rounds)
        rows = [
            {
                "name": name,
                "rounds": [turn.seconds for turn in own],
                "seconds": vars(Spread.of([turn.seconds for turn in own])),
                "page_faults": own[-1].page_faults,
                "peak_memory": own[-1].peak_memory,
            }
            for name, own in zip(workers, turns, strict=True)
        ]
    compare(rows, options.batch)
    machine = machine_facts("timm")
    return {
        **spec,
        "rounds": options.rounds,
        "rows": rows,
        "left_out": left_out,
        "machine": machine,
    }


def compare(rows: Sequence[dict], batch: int) -> None:
    """Add images per second, and how many times as fast as each baseline in the same round."""
    by_name = {row["name"]: row["rounds"] for row in rows}
    for row in rows:
        row["images_per_s"] = batch / row["seconds"]["median"]
        row["times_as_fast"] = {}
        for baseline in BASELINES:
            if baseline in by_name:
                pairs = zip(by_name[baseline], row["rounds"], strict=True)
                ratios = [theirs / ours for theirs, ours in pairs]
                row["times_as_fast"][baseline] = vars(Spread.of(ratios))


def markdown(cases: Sequence[Mapping]) -> str:
    """The page of results."""
    lines = [
        "# Training throughput",
        "",
        "One step is forward, backward and AdamW's step on random images, all contestants in one",
        "interleaved run. `+mallopt` is with `tinyvit.tune_allocator()`, one line at the start.",
        "Written by `benchmarks/training.py`.",
    ]
    for case in cases:
        machine = case["machine"]
        lines += [
            "",
            f"## {case['model']}, {case['size']} px, batch {case['batch']}, {case['precision']}",
            "",
            f"{machine['cpu']}; threads: {case['threads'] or 'torch' + chr(39) + 's choice'}; "
            f"{case['rounds']} rounds; torch {machine['torch']}, timm {machine['timm']}; "
            f"{machine['date']}",
            "",
            "| | ms | quartiles | images/s | x timm | x timm+mallopt | faults | peak MB |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_line(row) for row in case["rows"]]
        lines += [f"\nLeft out {name}: {reason}" for name, reason in case["left_out"].items()]
    return "\n".join(lines) + "\n"


def _line(row: Mapping) -> str:
    spread = row["seconds"]
    ratios = [row["times_as_fast"].get(name, {}).get("median") for name in BASELINES]
    shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    faults = "-" if row["page_faults"] is None else f"{row['page_faults']:.0f}"
    memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:.0f}"
    cells = [
        row["name"],
        f"{1000 * spread['median']:.0f}",
        f"{1000 * spread['lower']:.0f}-{1000 * spread['upper']:.0f}",
        f"{row['images_per_s']:.2f}",
        *shown,
        faults,
        memory,
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_vit_5m_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="torch's own choice by default")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--contestant", action="append", help="all by default")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    options = parser.parse_args(arguments)
    cases = [run_case(options, precision) for precision in options.precision or PRECISIONS]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "training.json").write_text(json.dumps({"cases": cases}, indent=1) + "\n")
    (options.output / "training.md").write_text(markdown(cases))
    print(markdown(cases))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve(make)
    else:
        main(sys.argv[1:])
