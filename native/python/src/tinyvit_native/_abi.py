"""The C interface of ``include/tinyvit.h`` as ctypes; nothing here knows numpy.

Every structure mirrors one of the header, field by field; the library compares their sizes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

ABI_VERSION = 2
MAX_STAGES = 8
MAX_CHANNELS = 16


class Error(Structure):
    """``tinyvit_error``."""

    _fields_ = [("status", c_int32), ("message", c_char * 508)]


class _Sized(Structure):
    """A structure whose first field is its size."""

    def __init__(self, **values: object) -> None:
        super().__init__(struct_size=ctypes.sizeof(self), **values)


class ConfigStruct(_Sized):
    """``tinyvit_config``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("in_chans", c_int32),
        ("num_stages", c_int32),
        ("embed_dims", c_int32 * MAX_STAGES),
        ("depths", c_int32 * MAX_STAGES),
        ("num_heads", c_int32 * MAX_STAGES),
        ("window_sizes", c_int32 * MAX_STAGES),
        ("strides", c_int32 * MAX_STAGES),
        ("stem", c_int32),
        ("end", c_int32),
        ("end_size", c_int32),
        ("head", c_int32),
        ("precision", c_int32),
        ("threads", c_int32),
        ("isa", c_char_p),
    ]


class Tensor(Structure):
    """``tinyvit_tensor``."""

    _fields_ = [
        ("name", c_char_p),
        ("data", c_void_p),
        ("ndim", c_int32),
        ("shape", c_int64 * 4),
    ]


class Info(_Sized):
    """``tinyvit_info``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("isa", c_char * 16),
        ("precision", c_int32),
        ("threads", c_int32),
        ("is_native", c_int32),
        ("weight_bytes", c_uint64),
        ("workspace_bytes", c_uint64),
    ]


class Sizes(_Sized):
    """``tinyvit_sizes``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("embedding", c_int32 * 3),
        ("num_stages", c_int32),
        ("stages", c_int32 * 3 * MAX_STAGES),
        ("early", c_int32 * 3),
        ("num_logits", c_int32),
        ("workspace_bytes", c_uint64),
    ]


class Images(_Sized):
    """``tinyvit_images``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("pixels", c_int32),
        ("data", c_void_p),
        ("batch", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("padded_height", c_int32),
        ("padded_width", c_int32),
        ("mean", c_float * MAX_CHANNELS),
        ("std", c_float * MAX_CHANNELS),
    ]


class Outputs(_Sized):
    """``tinyvit_outputs``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layout", c_int32),
        ("embedding", c_void_p),
        ("logits", c_void_p),
        ("stages", c_void_p * MAX_STAGES),
        ("early", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_uint64),
    ]


class DecoderConfig(_Sized):
    """``tinyvit_decoder_config``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("num_heads", c_int32),
        ("grid_height", c_int32),
        ("grid_width", c_int32),
        ("input_height", c_int32),
        ("input_width", c_int32),
        ("threads", c_int32),
        ("isa", c_char_p),
    ]


class Embedding(_Sized):
    """``tinyvit_embedding``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("features", c_void_p),
        ("early_channels", c_int32),
        ("early", c_void_p),
    ]


class Prompts(_Sized):
    """``tinyvit_prompts``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("count", c_int32),
        ("num_points", c_int32),
        ("multimask", c_int32),
        ("hq_only", c_int32),
        ("points", c_void_p),
        ("labels", c_void_p),
        ("boxes", c_void_p),
        ("masks", c_void_p),
        ("min_score", POINTER(c_float)),
    ]


class Placement(_Sized):
    """``tinyvit_placement``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("covered_height", c_int32),
        ("covered_width", c_int32),
        ("resized_height", c_int32),
        ("resized_width", c_int32),
        ("original_height", c_int32),
        ("original_width", c_int32),
    ]


class Search(_Sized):
    """``tinyvit_search``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("threshold", c_float),
        ("offset", c_float),
        ("min_stability", c_float),
        ("frame_height", c_int32),
        ("frame_width", c_int32),
        ("top", c_int32),
        ("left", c_int32),
    ]


class Region(Structure):
    """``tinyvit_region``."""

    _fields_ = [
        ("prompt", c_int32),
        ("mask", c_int32),
        ("score", c_float),
        ("stability", c_float),
        ("box", c_int32 * 4),
        ("area", c_uint64),
        ("counts", POINTER(c_int64)),
        ("num_counts", c_uint64),
    ]


def find_library() -> Path:
    """The library beside this file, or the one that ``TINYVIT_NATIVE_LIBRARY`` names."""
    named = os.environ.get("TINYVIT_NATIVE_LIBRARY")
    if named:
        return Path(named)
    ending = {"win32": "tinyvit.dll", "darwin": "libtinyvit.dylib"}
    return Path(__file__).parent / ending.get(sys.platform, "libtinyvit.so")


def load(path: Path) -> ctypes.CDLL:
    """Open the library and declare its functions.

    Raises:
        ImportError: There is no such library, or it has another ABI version.
    """
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as err:
        raise ImportError(f"tinyvit's native library cannot be loaded: {err}") from err
    lib.tinyvit_abi_version.restype = c_uint32
    if lib.tinyvit_abi_version() != ABI_VERSION:
        raise ImportError(
            f"{path} has ABI version {lib.tinyvit_abi_version()}, this package wants "
            f"{ABI_VERSION}; reinstall tinyvit-native"
        )
    lib.tinyvit_version.restype = c_char_p
    lib.tinyvit_has_bf16.restype = c_int32
    handle, error = c_void_p, POINTER(Error)
    lib.tinyvit_create.argtypes = [
        POINTER(ConfigStruct), POINTER(Tensor), c_size_t, POINTER(handle), error,
    ]  # fmt: skip
    lib.tinyvit_destroy.argtypes = [handle]
    lib.tinyvit_destroy.restype = None
    lib.tinyvit_trim.argtypes = [handle]
    lib.tinyvit_trim.restype = None
    lib.tinyvit_describe.argtypes = [handle, POINTER(Info), error]
    lib.tinyvit_measure.argtypes = [handle, c_int32, c_int32, POINTER(Sizes), error]
    lib.tinyvit_encode.argtypes = [handle, POINTER(Images), POINTER(Outputs), error]
    lib.tinyvit_decoder_create.argtypes = [
        POINTER(DecoderConfig), POINTER(Tensor), c_size_t, POINTER(handle), error,
    ]  # fmt: skip
    lib.tinyvit_prepare.argtypes = [handle, POINTER(Embedding), POINTER(handle), error]
    lib.tinyvit_decode.argtypes = [
        handle, handle, POINTER(Prompts), c_void_p, c_void_p, POINTER(c_int32), error,
    ]  # fmt: skip
    lib.tinyvit_enlarge.argtypes = [
        c_void_p, c_int32, c_int32, c_int32, POINTER(Placement), c_float, c_void_p, c_void_p, error,
    ]  # fmt: skip
    lib.tinyvit_find.argtypes = [
        handle, handle, POINTER(Prompts), POINTER(Placement), POINTER(Search), POINTER(handle),
        c_void_p, error,
    ]  # fmt: skip
    lib.tinyvit_regions_list.argtypes = [handle, POINTER(c_uint64)]
    lib.tinyvit_regions_list.restype = POINTER(Region)
    for name in ("decoder", "prepared", "regions"):
        destroy = getattr(lib, f"tinyvit_{name}_destroy")
        destroy.argtypes, destroy.restype = [handle], None
    lib.tinyvit_prepared_bytes.argtypes = [handle]
    lib.tinyvit_prepared_bytes.restype = c_uint64
    return lib
