"""What tests of operations on blocks share: rows cut into blocks, and back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import pyarrow as pa

__all__ = ("cut", "rows_of", "table_of")


async def cut(table: pa.Table, *rows: int) -> AsyncIterator[pa.RecordBatch]:
    """The rows of ``table`` in blocks of ``rows``, the last number again and again; each after a task switch."""
    sizes = list(rows or [len(table)])
    start = 0
    while start < len(table):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        await anyio.lowlevel.checkpoint()
        for block in table.slice(start, size).combine_chunks().to_batches():
            yield block
        start += size


async def table_of(blocks: AsyncIterator[pa.RecordBatch]) -> pa.Table | None:
    """All blocks as one table; None if there is none."""
    gathered = [block async for block in blocks]
    return pa.Table.from_batches(gathered) if gathered else None


async def rows_of(blocks: AsyncIterator[pa.RecordBatch]) -> Sequence[dict[str, Any]]:
    """All rows, as Python knows them."""
    return [row async for block in blocks for row in block.to_pylist()]
