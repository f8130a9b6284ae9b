"""Extension types: values that msgspec can't encode, whose memory goes over a channel as it is.

In a payload such a value is a msgpack extension: the name of its type, what else its type says about it, and its
memory, at a multiple of 64 bytes from the payload's beginning. The sender never copies that memory into the payload,
which stays in pieces until they are written; the receiver's value is a view of the bytes that arrived.

numpy arrays, torch tensors and Arrow tables and record batches are known; nothing of theirs is imported before one of
them is sent or has arrived. numpy's numbers, which the mean of an array is, go as Python's.
:func:`register_type` adds others.
"""

from __future__ import annotations

import functools
import importlib
import secrets
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec
import msgspec.inspect
from msgspec.msgpack import Encoder, Ext

from arun.errors import MisuseError, PayloadError

__all__ = ("Buffers", "Scattered", "encode_scattered", "register_type", "unpack")

Buffers = list[Any]
"""What has the buffer interface: C-contiguous bytes."""

T = TypeVar("T")

_CODE = 97
_ALIGNMENT = 64
# An extension's own head in msgpack; then the bytes of the description, and where after this head the memory begins.
_EXT = struct.Struct(">BIb")
_HEAD = struct.Struct(">II")
# An array that is smaller is copied: it would keep a whole frame in memory, and lies anywhere in it.
_COPIED_BYTES = 2**16

# Modules whose register() does it, by the type's own name and by its name on the wire: of ours only.
_OURS = {
    "numpy.ndarray": "arun.channel.arrays",
    "numpy": "arun.channel.arrays",
    "torch.Tensor": "arun.channel.tensors",
    "torch": "arun.channel.tensors",
    "pyarrow.lib.Table": "arun.channel.tables",
    "pyarrow.lib.RecordBatch": "arun.channel.tables",
    "arrow": "arun.channel.tables",
    "arrow.batch": "arun.channel.tables",
}


class Scattered:
    """An encoded payload in pieces, some of which are the memory of what was sent."""

    __slots__ = ("_size", "pieces")

    def __init__(self, pieces: list[bytes | memoryview]) -> None:
        self.pieces = pieces
        self._size = sum(map(len, pieces))

    def __len__(self) -> int:
        return self._size


class _Type(NamedTuple):
    name: str
    pack: Callable[[Any], tuple[Any, Buffers]]
    unpack: Callable[[Any, memoryview], Any]


_by_class: dict[type, _Type] = {}
_by_name: dict[str, _Type] = {}


def register_type(
    cls: type[T],
    *,
    name: str,
    pack: Callable[[T], tuple[Any, Buffers]],
    unpack: Callable[[Any, memoryview], T],
) -> None:
    """Let values of a type go over channels, in this process; do the same in the others.

    :param cls: exactly this class, no subclass of it.
    :param name: on the wire; the same in every process.
    :param pack: gives what msgspec can encode, and the value's memory: bytes, memoryviews, arrays. It is read later,
        so it must not change until the value has been sent.
    :param unpack: makes a value of those again: of the former as msgspec's builtins and of the memory in one piece,
        which it need not copy. It may be anything that a peer wrote: raise ValueError for what can't be.
    :raises MisuseError: the name is taken by another class, or msgspec needs no help with this one.
    """
    if not isinstance(msgspec.inspect.type_info(cls), msgspec.inspect.CustomType):
        raise MisuseError(f"msgspec encodes a {cls.__qualname__} itself, so what it is registered with is never asked")
    known = _by_name.get(name)
    if known is not None and _by_class.get(cls) is not known:
        raise MisuseError(f"a type of the name {name!r} is registered already; give {cls.__qualname__} another name")
    _by_class[cls] = _by_name[name] = _Type(name, pack, unpack)


def encode_scattered(value: object) -> bytes | Scattered:
    """Encode a value that holds extension types; in one piece if it is small.

    :raises TypeError: it holds a value of a type that is not known.
    """
    # msgspec writes a token for each of them, which can be in no value by accident, and is replaced afterwards.
    found: list[tuple[bytes, Buffers]] = []
    token = secrets.token_bytes(16)
    encoded = Encoder(enc_hook=functools.partial(_pack, found, token)).encode(value)
    pieces: list[bytes | memoryview] = []
    at = size = 0
    for number, (described, buffers) in enumerate(found):
        marker = _marker(token, number)
        start = encoded.index(marker, at)
        pieces.append(encoded[at:start])
        at = start + len(marker)
        size += len(pieces[-1])
        views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        head = _HEAD.size + len(described)
        padding = -(size + _EXT.size + head) % _ALIGNMENT
        length = head + padding + sum(map(len, views))
        pieces += (
            _EXT.pack(0xC9, length, _CODE) + _HEAD.pack(len(described), head + padding) + described + bytes(padding),
            *views,
        )
        size += _EXT.size + length
    pieces.append(encoded[at:])
    scattered = Scattered([piece for piece in pieces if piece])
    return b"".join(scattered.pieces) if len(scattered) <= _COPIED_BYTES else scattered


def unpack(code: int, data: memoryview) -> Any:
    """Make a value of a msgpack extension; the ``ext_hook`` of every payload's decoder.

    :raises PayloadError: its type is not known here, or it is no such value.
    """
    if code != _CODE:
        return Ext(code, bytes(data))
    try:
        size, offset = _HEAD.unpack_from(data)
        if not _HEAD.size + size <= offset <= len(data):
            raise ValueError(f"{size} bytes of description, memory from byte {offset} on")
        name, described = _DESCRIBED.decode(data[_HEAD.size : _HEAD.size + size])
    except (ValueError, RecursionError, msgspec.MsgspecError, struct.error) as exc:
        raise PayloadError(f"an extension of {len(data)} bytes is malformed: {exc}") from exc
    known = _known(_by_name, name, name)
    if known is None:
        raise PayloadError(f"a value of the type {name!r} arrived, which this process knows nothing about")
    memory = data[offset:]
    if len(data) <= _COPIED_BYTES:
        memory = memoryview(bytearray(memory))
    try:
        return known.unpack(described, memory)
    except Exception as exc:  # libraries raise all sorts of things for what can't be
        raise PayloadError(
            f"a value of the type {name!r} can't be made of the {len(memory)} bytes sent: {exc}"
        ) from exc


def _pack(found: list[tuple[bytes, Buffers]], token: bytes, value: Any) -> object:
    cls = type(value)
    known = _known(_by_class, cls, f"{cls.__module__}.{cls.__qualname__}")
    if known is None:
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in "biuf":
            number: object = value.item()
            if type(number) is not cls:  # a longdouble is its own
                return number
        raise TypeError(f"Encoding objects of type {cls.__qualname__} is unsupported")
    described, buffers = known.pack(value)
    found.append((msgspec.msgpack.encode((known.name, described)), buffers))
    return Ext(_CODE, _marker(token, len(found) - 1)[3:])


def _marker(token: bytes, number: int) -> bytes:
    """How msgspec encodes the extension that stands for a value."""
    return bytes((0xC7, len(token) + 4, _CODE)) + token + number.to_bytes(4, "big")


def _known(registry: dict[Any, _Type], key: Any, name: str) -> _Type | None:
    known = registry.get(key)
    if known is None and name in _OURS:
        try:
            importlib.import_module(_OURS[name]).register()
        except ImportError as exc:
            raise PayloadError(f"a value of the type {name!r} needs a package that is missing here: {exc}") from exc
        known = registry.get(key)
    return known


_DESCRIBED = msgspec.msgpack.Decoder(tuple[str, Any])
