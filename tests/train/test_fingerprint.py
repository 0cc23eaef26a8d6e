import torch

from tinyvit.train.tasks.teachers import tensor_fingerprint as fingerprint


def test_it_sees_names_types_shapes_and_values():
    a = {"x": torch.arange(4.0), "y": torch.tensor(1)}
    same = fingerprint(a)
    assert len(same) == 64
    assert fingerprint(dict(reversed(a.items()))) == same
    assert fingerprint({**a, "x": torch.arange(4.0).view(2, 2)}) != same
    assert fingerprint({**a, "x": torch.arange(4)}) != same
    assert fingerprint({**a, "x": -torch.arange(4.0)}) != same
    assert fingerprint({"z": a["x"], "y": a["y"]}) != same


def test_memory_layout_does_not_matter():
    plain = torch.randn(2, 3, 4, 5)
    last = plain.contiguous(memory_format=torch.channels_last)
    assert fingerprint({"a": plain}) == fingerprint({"a": last})
