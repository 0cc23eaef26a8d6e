"""A tiny task for the trainer's tests, and a program that trains it in a process of its own.

    python toy_task.py FOLDER [name=value ...]

Images are noise, labels say whether their mean is above zero; with ``noise`` each sample and each
loss also takes chance from the generators it is given.
"""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tinyvit.checkpoints.files import write_state_dict
from tinyvit.modules import TinyViT
from tinyvit.train import TrainSettings, train

SIDE, CLASSES = 16, 2


def make_model(seed=0, drop_path=0.0, drop=0.0):
    """A classifier of some 10 000 parameters with lively weights and learnt batch statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyViT(
            img_size=SIDE,
            num_classes=CLASSES,
            embed_dims=(4, 8, 8, 12),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 3),
            window_sizes=(2, 2, 2, 2),
            drop_path_rate=drop_path,
            drop_rate=drop,
            neck_dim=None,
        )
        model.spare = torch.nn.Linear(2, 2)  # as a head that no loss uses: it gets no gradient
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("conv3.bn.weight"):
            tensor.fill_(0.5)  # else the branch starts closed
        elif name.endswith("attention_biases"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


class ToyTask:
    """Bright or dark: a classifier of noise."""

    name = "toy"
    goal = ("accuracy", "max")

    def __init__(self, model=None, samples=22, noise=0.0, slow=0.0, is_double=False):
        self.model = make_model() if model is None else model
        self.samples, self.noise, self.slow = samples, noise, slow
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(samples, 3, SIDE, SIDE, generator=generator)
        self.images += torch.randn(samples, 1, 1, 1, generator=generator)
        self.labels = (self.images.mean((1, 2, 3)) > 0).long()
        if is_double:  # where rounding must not hide a mistake
            self.model.double()
            self.images = self.images.double()

    def __len__(self):
        return self.samples

    def sample(self, index, rng):
        chance = rng.standard_normal((3, SIDE, SIDE)).astype(np.float32)
        return index, self.images[index] + self.noise * torch.from_numpy(chance)

    def collate(self, samples):
        indices = torch.tensor([index for index, _ in samples])
        return {
            "index": indices,
            "images": torch.stack([image for _, image in samples]),
            "labels": self.labels[indices],
        }

    def loss(self, model, batch, generator):
        time.sleep(self.slow)
        images = batch["images"]
        images = images + self.noise * torch.randn(images.shape, generator=generator)
        logits = model(images)
        loss = F.cross_entropy(logits, batch["labels"])
        right = (logits.argmax(1) == batch["labels"]).float().mean()
        return loss, {"accuracy": right.detach()}

    def validate(self, model):
        logits = model(self.images)
        right = (logits.argmax(1) == self.labels).float().mean()
        return {"accuracy": float(right), "loss": float(F.cross_entropy(logits, self.labels))}

    def save(self, model, path):
        write_state_dict(path, model.state_dict())


def interrupt(number=signal.SIGINT):
    """Call the handler of a signal, as Python does between two instructions.

    A real signal could end a worker of pytest-xdist; those are sent in processes of their own.
    """
    handler = signal.getsignal(number)
    assert callable(handler), f"there is no handler for {number!r}"
    handler(number, None)


def numbers(folder):
    """The log's lines without what a clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def main(folder, *pairs):
    values = dict(pair.split("=") for pair in pairs)
    slow = float(values.pop("slow", 0))
    noise = float(values.pop("noise", 0))
    is_double = bool(values.pop("is_double", ""))
    shown = {name: eval(value) for name, value in values.items()}
    drop = 0.2 if noise else 0.0
    task = ToyTask(
        make_model(drop_path=drop, drop=drop), noise=noise, slow=slow, is_double=is_double
    )
    settings = TrainSettings(folder=folder, device="cpu", tensorboard=False, **shown)

    def report(progress):
        print(progress.phase, progress.step, flush=True)

    train(task, settings, resume=True, report=report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
