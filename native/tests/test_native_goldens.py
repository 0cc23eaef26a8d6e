"""The golden vectors of encoders and classifiers, through the native library, fp32, every ISA.

``TINYVIT_GOLDENS`` names another folder of the same kind.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from kernel_door import ISAS, _library
from native_models import Student, config_of, tensors_of
from tinyvit_native import Net
from torch import nn

from tinyvit.modules import TinyViT

FOLDER = Path(os.environ.get("TINYVIT_GOLDENS", Path(__file__).parents[2] / "tests" / "golden"))
sys.path.insert(0, str(FOLDER))
_spec = importlib.util.spec_from_file_location("golden_verify", FOLDER / "verify.py")
verify = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(verify)


def adapter_of(isa: str) -> verify.Adapter:
    """What makes models whose ``forward`` runs in the native library."""

    def net_of(model: TinyViT) -> Net:
        return Net(config_of(model), tensors_of(model), isa=isa)

    class Encoder(TinyViT):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(net_of(self).encode(x.numpy()))

    class Classifier(TinyViT):
        def __init__(self, **ctor: object) -> None:
            super().__init__(**ctor, strides=(2,) * (len(ctor["depths"]) - 1), neck_dim=None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(net_of(self).logits(x.numpy()))

    class HQEncoder(TinyViT):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = net_of(self).run(x.numpy(), embedding=True, early=True)
            return torch.from_numpy(out["embedding"]), torch.from_numpy(out["early"])

    class NativeStudent(Student):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self.native(isa=isa).encode(x.numpy()))

    class Adapter(verify.Adapter):
        def __init__(self) -> None:
            super().__init__(None)

        def encoder(self, ctor: dict) -> nn.Module:
            return Encoder(**ctor)

        def classifier(self, ctor: dict) -> nn.Module:
            return Classifier(**ctor)

        def hq(self, ctor: dict) -> nn.Module:
            return HQEncoder(**ctor)

        def litemed(self, ctor: dict) -> nn.Module:
            return Encoder(**ctor, stem="pointwise", head=False)

        def efficientsam3(self, variant: str, img_size: int, embed_size: int) -> nn.Module:
            return NativeStudent(variant, embed_size)

    return Adapter()


PRESENT = [isa for isa in ISAS if _library.door_has(isa.encode(), 0)]
KINDS = ("classifier", "anysize", "encoder", "hq", "litemed", "efficientsam3")
# The lower ISAs take the quick kinds: the rest of the code is the same for all.
CASES = [(isa, kind) for isa in PRESENT for kind in (KINDS if isa == PRESENT[-1] else KINDS[:2])]


# verify.py leaves closing its files to the interpreter
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("isa", "kind"), CASES)
def test_goldens(isa, kind):
    results = verify.check(adapter_of(isa), str(FOLDER), kind=kind, optional=True)
    bad = [(name, worst, text) for name, state, worst, text in results if state == "FAIL"]
    assert not bad
    assert kind == "efficientsam3" or all(state == "ok" for _, state, _, _ in results)
