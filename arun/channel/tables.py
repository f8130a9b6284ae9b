"""Arrow tables and record batches over channels, as Arrow's own IPC stream: the columns are views of what arrived.

What a peer wrote is validated in full before anybody sees it: offsets and indices out of their range would let a column
read any memory of this process. Compressed columns are refused: a few bytes could ask for gigabytes.
"""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from arun.channel.extensions import Buffers, register_type

__all__ = ("register",)

_RECORD_BATCH_COMPRESSION, _DICTIONARY_DATA, _MESSAGE_HEADER = 3, 1, 2
_ALIGNMENT = 8


def register() -> None:
    """Let Arrow tables and record batches go over channels."""
    register_type(pa.Table, name="arrow", pack=_pack, unpack=_unpack_table)
    register_type(pa.RecordBatch, name="arrow.batch", pack=_pack, unpack=_unpack_batch)


def _pack(data: Any) -> tuple[Any, Buffers]:
    sink = _Sink()
    with pa.ipc.new_stream(sink, data.schema, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write(data)
    return None, sink.buffers


def _unpack_table(described: Any, memory: memoryview) -> Any:
    reader, batches = _read(memory)
    table = pa.Table.from_batches(batches, reader.schema)
    table.validate(full=True)
    return table


def _unpack_batch(described: Any, memory: memoryview) -> Any:
    _, [batch] = _read(memory)
    batch.validate(full=True)
    return batch


def _read(memory: memoryview) -> tuple[Any, list[Any]]:
    data = pa.py_buffer(memory)
    if data.address % _ALIGNMENT:  # what a sender other than ours may do
        data = pa.py_buffer(bytearray(memory))
    for message in pa.ipc.MessageReader.open_stream(data):
        if _is_compressed(message):
            raise ValueError("its columns are compressed")
    reader = pa.ipc.open_stream(data)
    return reader, list(reader)


class _Sink:
    """A file that keeps what is written instead of copying it: the columns' own memory, and what describes them."""

    closed = False

    def __init__(self) -> None:
        self.buffers: Buffers = []

    def write(self, data: Any) -> int:
        self.buffers.append(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _is_compressed(message: Any) -> bool:
    """Whether a message of the IPC format says that its buffers are; pyarrow has verified that it is well-formed."""
    metadata: bytes = message.metadata.to_pybytes()
    [at] = struct.unpack_from("<I", metadata, 0)
    if message.type == "schema":
        return False
    at = _table(metadata, at, _MESSAGE_HEADER)
    if message.type == "dictionary":
        at = _table(metadata, at, _DICTIONARY_DATA)
    return _field(metadata, at, _RECORD_BATCH_COMPRESSION) is not None


def _table(metadata: bytes, at: int, number: int) -> int:
    """Where the table lies that a flatbuffers table at this place refers to by this field."""
    field = _field(metadata, at, number)
    if field is None:
        raise ValueError("a message without a body")
    return field + int(struct.unpack_from("<I", metadata, field)[0])


def _field(metadata: bytes, at: int, number: int) -> int | None:
    """Where a field of a flatbuffers table lies, or None if it is left out."""
    [back] = struct.unpack_from("<i", metadata, at)
    vtable = at - back
    [size] = struct.unpack_from("<H", metadata, vtable)
    if 4 + 2 * number >= size:
        return None
    [offset] = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)
    return at + offset if offset else None
