"""Consumers: what becomes of the blocks of a run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import cast

import anyio
import pyarrow as pa

from arun.data.block import Block, Row, unify
from arun.data.sink import Part, PartWriter, Sink
from arun.hosting import GRACE
from arun.threads import run_in_thread

__all__ = ("count", "first_schema", "take", "to_table", "write")


async def to_table(blocks: AsyncIterator[Block]) -> pa.Table:
    """All of it."""
    batches = [block.batch async for block in blocks]
    if not batches:
        return pa.table({})
    schema = unify(dict.fromkeys(batch.schema for batch in batches))
    if all(batch.schema == schema for batch in batches):
        return pa.Table.from_batches(batches, schema)
    tables = [pa.Table.from_batches([batch]) for batch in batches]
    return pa.concat_tables(tables, promote_options="permissive").cast(schema)


async def count(blocks: AsyncIterator[Block]) -> int:
    """How many rows."""
    rows = 0
    async for block in blocks:
        rows += block.rows
    return rows


async def take(blocks: AsyncIterator[Block]) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    async for block in blocks:
        rows += cast("list[Row]", block.batch.to_pylist())
    return rows


async def first_schema(blocks: AsyncIterator[Block]) -> pa.Schema | None:
    """The columns of the first block."""
    async for block in blocks:
        return block.batch.schema
    return None


async def write(sink: Sink, blocks: AsyncIterator[Block]) -> list[Part]:
    """Write it to a sink; a part that is not committed leaves nothing."""
    await run_in_thread(sink.begin)
    parts: list[Part] = []
    writer: PartWriter | None = None
    try:
        async for block in blocks:
            if writer is None:
                writer = await run_in_thread(partial(sink.part, f"part-{len(parts):05}"))
            size = await run_in_thread(partial(_write, writer, block), label=f"write {sink.name}")
            del block
            if sink.part_bytes is not None and size >= sink.part_bytes:
                parts.append(await run_in_thread(writer.commit))
                writer = None
        if writer is not None:
            parts.append(await run_in_thread(writer.commit))
            writer = None
    finally:
        if writer is not None:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
                await run_in_thread(writer.abort)
    await run_in_thread(sink.end)
    return parts


def _write(writer: PartWriter, block: Block) -> int:
    writer.write(block.batch)
    return writer.size()
