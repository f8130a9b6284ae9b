"""Sources read whole, and sinks written in one go, as the tests of files do it."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from arun.data.sink import Part, Sink
from arun.data.source import Source

__all__ = ("read", "rows", "write")


def read(source: Source) -> pa.Table:
    """All rows, in order; every block must be of the source's schema."""
    blocks = [block for fragment in source.fragments() for block in source.read(fragment)]
    schema = source.schema()
    assert all(block.num_rows for block in blocks)
    return pa.Table.from_batches(blocks, schema)


def rows(source: Source) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read(source).to_pylist()
    return found


def write(sink: Sink, *blocks: pa.RecordBatch) -> Part:
    """Write one part of these blocks."""
    sink.begin()
    part = sink.part("part-00000")
    for block in blocks:
        part.write(block)
    committed = part.commit()
    sink.end()
    return committed
