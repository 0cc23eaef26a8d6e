"""Files of weights: read, recognise, convert, resize and download them.

One loader for TinyViT's whole lineage. The steps are functions of their own, each dict to dict or
file to file, and no step builds a model::

    fetch / path -> read_state_dict -> detect -> to_canonical -> resize_bias_tables -> your model

``inspect`` and ``convert`` put them together for people.
"""

from tinyvit.checkpoints.conversion import ConversionReport, convert, convert_tensors
from tinyvit.checkpoints.detection import Detection, detect
from tinyvit.checkpoints.download import cached_path, fetch
from tinyvit.checkpoints.files import StateFile, file_sha256, read_state_dict, write_state_dict
from tinyvit.checkpoints.inspection import Inspection, inspect
from tinyvit.checkpoints.keymap import from_canonical, to_canonical
from tinyvit.checkpoints.resize import resize_bias_table, resize_bias_tables
from tinyvit.checkpoints.transfer import Patience

__all__ = [
    "ConversionReport",
    "Detection",
    "Inspection",
    "Patience",
    "StateFile",
    "cached_path",
    "convert",
    "convert_tensors",
    "detect",
    "fetch",
    "file_sha256",
    "from_canonical",
    "inspect",
    "read_state_dict",
    "resize_bias_table",
    "resize_bias_tables",
    "to_canonical",
    "write_state_dict",
]
