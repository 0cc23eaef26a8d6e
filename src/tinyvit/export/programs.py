"""Programs of torch.export: written, read and run; only with torch.

Reading such a file with ``torch.export.load`` can run code that somebody put into it: it may hold
pickled objects, names of functions, and formulas that are evaluated. ``check_program`` refuses all
but plain tensors, operators of torch and sums and products of sizes, before torch sees the file.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyvit.errors import CheckpointError
from tinyvit.inference.backend import first_words

MOST_POINTS = 64
_METADATA = "tinyvit.json"
_TARGET = re.compile(
    r"torch\.ops\.aten\.\w+(\.\w+)?|torch\.sym_\w+"
    r"|_operator\.(add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge|getitem)"
)
_SIZES = {"Add", "Mul", "Integer", "Symbol"}
_PIECES = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.Constant, ast.UnaryOp,
           ast.USub)  # fmt: skip
_TENSOR_FILE = re.compile(r"(weight|tensor)_\d+")


def save_program(
    module: nn.Module,
    example: Sequence[Tensor],
    points: Sequence[int | None],
    metadata: Mapping[str, str],
) -> bytes:
    """A module as the bytes of a .pt2 file.

    Args:
        module: In eval mode, float32, on the CPU.
        example: Its inputs, whose sizes the program keeps.
        points: Of each input the axis that counts points, of 1 to 64; None for none.
        metadata: Texts to keep in the file.

    Raises:
        ValueError: The module cannot be exported.
    """
    count = torch.export.Dim("points", min=1, max=MOST_POINTS)
    shapes = tuple(None if axis is None else {axis: count} for axis in points)
    stream = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")  # of its own use of itself
        try:
            program = torch.export.export(module, tuple(example), dynamic_shapes=shapes)
        except Exception as err:  # its errors have no common class of their own
            words = f"the model cannot be made into a program: {first_words(err)}"
            raise ValueError(words) from err
        torch.export.save(program, stream, extra_files={_METADATA: json.dumps(dict(metadata))})
    return stream.getvalue()


class Program:
    """A program of a .pt2 file: inputs by name -> outputs in order.

    Args:
        path: Of the file.

    Attributes:
        metadata: Texts that ``save_program`` kept.

    Raises:
        CheckpointError: It cannot be read, or holds more than tensors and torch's operators.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_program(path)
        extra = {_METADATA: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as above
                program = torch.export.load(path, extra_files=extra)
        except Exception as err:  # as above
            raise CheckpointError(f"{path} cannot be read as a program: {str(err)[:300]}") from err
        self.metadata: dict[str, str] = json.loads(extra[_METADATA] or "{}")
        self._module = program.module()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Arrays by name, in the order of the program's inputs -> arrays."""
        with torch.no_grad():
            given = [torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values()]
            found = self._module(*given)
        return [one.numpy() for one in (found if isinstance(found, (tuple, list)) else [found])]


def check_program(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could run code when it is read.

    Raises:
        CheckpointError: It could, or it is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".json") and "/extra/" not in name:
                    for fault in _faults(json.loads(archive.read(name))):
                        raise CheckpointError(
                            f"{path} holds {fault}, which could run code; a program of 'tinyvit "
                            "export' does not"
                        )
                elif name.endswith(".pt"):  # tensors that it was made with
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except CheckpointError:
        raise
    except Exception as err:  # what zipfile, json and torch raise for damaged files
        raise CheckpointError(f"{path} cannot be read as a program: {str(err)[:300]}") from err


def _faults(value: object) -> Iterator[str]:
    """What in a program's description is no tensor, operator of torch or sum of sizes."""
    if isinstance(value, list):
        for item in value:
            yield from _faults(item)
    if not isinstance(value, dict):
        return
    if value.get("use_pickle"):
        yield "a pickle"
    if not _TENSOR_FILE.fullmatch(str(value.get("path_name", "tensor_0"))):
        yield f"the object {value['path_name']!r}"
    if isinstance(value.get("target"), str) and not _TARGET.fullmatch(value["target"]):
        yield f"the operator {value['target']!r}"
    if isinstance(value.get("expr_str"), str) and not _is_size(value["expr_str"]):
        yield f"the formula {value['expr_str']!r}"
    for item in value.values():
        yield from _faults(item)


def _is_size(formula: str) -> bool:
    """Whether it is made of sums and products of numbers and named sizes, which torch evaluates."""
    nodes = list(ast.walk(ast.parse(formula, mode="eval")))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names <= _SIZES and all(isinstance(node, _PIECES) for node in nodes)
