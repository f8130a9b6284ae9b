"""numpy arrays over channels. Who receives one gets a read-only view of the bytes that arrived."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from arun.channel.extensions import Buffers, register_type

__all__ = ("register",)

_Array: TypeAlias = "np.ndarray[Any, Any]"

# Numbers, truth values, times, and texts of a fixed length: no objects, and nothing with fields.
_KINDS = "biufcmMSU"


def register() -> None:
    """Let numpy arrays go over channels."""
    register_type(np.ndarray, name="numpy", pack=_pack, unpack=_unpack)


def _pack(array: _Array) -> tuple[Any, Buffers]:
    if array.dtype.kind not in _KINDS:
        raise TypeError(
            f"an array of dtype {array.dtype} can't be sent; its elements must be of one of numpy's own types"
        )
    transposed = array.flags.f_contiguous and not array.flags.c_contiguous
    flat = np.ascontiguousarray(array.T if transposed else array).reshape(-1)
    return (array.dtype.str, array.shape, transposed), [flat.view(np.uint8)] if flat.size else []


def _unpack(described: Any, memory: memoryview) -> _Array:
    kind, shape, transposed = described
    dtype: np.dtype[Any] | None = np.dtype(kind) if isinstance(kind, str) else None
    if dtype is None or dtype.kind not in _KINDS or dtype.fields is not None:
        raise ValueError(f"dtype {kind!r} is not one of numpy's own")
    if not all(type(length) is int and length >= 0 for length in shape) or len(shape) > 32:
        raise ValueError(f"shape {shape!r}")
    if math.prod(shape) * dtype.itemsize != len(memory):
        raise ValueError(f"shape {shape!r} of dtype {kind} needs {math.prod(shape) * dtype.itemsize} bytes")
    array: _Array = np.frombuffer(memory, dtype) if len(memory) else np.empty(0, dtype)
    if not array.flags.aligned:  # what a sender other than ours may do
        array = array.copy()
    array = array.reshape(shape[::-1]).T if transposed else array.reshape(shape)
    array.flags.writeable = False
    return array
