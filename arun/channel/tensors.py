"""torch tensors over channels: dense ones in the CPU's memory. Who receives one owns the bytes that arrived."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from arun.channel.extensions import Buffers, register_type

__all__ = ("register",)

_DTYPES = frozenset({
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
})


def register() -> None:
    """Let torch's tensors go over channels."""
    import torch

    register_type(torch.Tensor, name="torch", pack=_pack, unpack=_unpack)


def _pack(tensor: Any) -> tuple[Any, Buffers]:
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.device.type != "cpu":
        raise TypeError(f"a tensor on {tensor.device} can't be sent; copy it to the CPU first: tensor.cpu()")
    if tensor.layout is not torch.strided or name not in _DTYPES:
        raise TypeError(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype} can't be sent")
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (name, tuple(tensor.shape)), [flat.view(torch.uint8).numpy()] if flat.numel() else []


def _unpack(described: Any, memory: memoryview) -> Any:
    import torch

    name, shape = described
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is none that is sent")
    dtype: Any = getattr(torch, name)
    if not all(type(length) is int and length >= 0 for length in shape) or len(shape) > 32:
        raise ValueError(f"shape {shape!r}")
    if math.prod(shape) * dtype.itemsize != len(memory):
        raise ValueError(f"shape {shape!r} of dtype {name} needs {math.prod(shape) * dtype.itemsize} bytes")
    if not len(memory):
        return torch.empty(shape, dtype=dtype)
    flat = torch.from_numpy(np.asarray(_Owned(memory)))
    if flat.data_ptr() % dtype.itemsize:  # what a sender other than ours may do
        flat = flat.clone()
    return flat.view(dtype).reshape(shape)


class _Owned:
    """Memory as numpy takes it, to be written to: a tensor can't be read-only. msgspec shows it so, but it is ours."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        at = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
        self.__array_interface__ = {"shape": (len(memory),), "typestr": "|u1", "data": (at, False), "version": 3}
