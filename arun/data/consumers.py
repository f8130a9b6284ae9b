"""Consumers: what becomes of the blocks of a run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import anyio
import pyarrow as pa

from arun.data.block import Block, Row, row_dicts, unify
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
    """All rows, each with all columns: None where its block has none of that name, as failed rows may have."""
    batches = [block.batch async for block in blocks]
    columns: Row = dict.fromkeys(name for batch in batches for name in batch.schema.names)
    rows = (row for batch in batches for row in row_dicts(batch))
    return [row if len(row) == len(columns) else {**columns, **row} for row in rows]


async def first_schema(blocks: AsyncIterator[Block]) -> pa.Schema | None:
    """The columns of the first block."""
    async for block in blocks:
        return block.batch.schema
    return None


async def write(sink: Sink, blocks: AsyncIterator[Block]) -> list[Part]:
    """Write it to a sink; a part that is not committed leaves nothing."""
    writing = _Writing(sink)
    label = f"write {sink.name}"
    await run_in_thread(sink.begin, label=label)
    try:
        async for block in blocks:
            todo = partial(writing.write, block)
            del block
            await run_in_thread(todo, label=label)
            del todo
        await run_in_thread(writing.finish, label=label)
    except BaseException:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
            await run_in_thread(writing.abort, label=label)
        raise
    await run_in_thread(sink.end, label=label)
    return writing.parts


class _Writing:
    """The parts of a sink, one after the other. For one thread at a time.

    :ivar parts: those that are committed.
    """

    def __init__(self, sink: Sink) -> None:
        self.parts: list[Part] = []
        self._sink = sink
        # Kept here as soon as it is made: a caller that is cancelled meanwhile does not get what a thread returns.
        self._part: PartWriter | None = None

    def write(self, block: Block) -> None:
        if self._part is None:
            self._part = self._sink.part(f"part-{len(self.parts):05}")
        self._part.write(block.batch)
        if self._sink.part_bytes is not None and self._part.size() >= self._sink.part_bytes:
            self.commit()

    def finish(self) -> None:
        """Commit what is left; of no rows, the only part that there is."""
        if not self.parts and self._part is None and self._sink.part_bytes is None:
            self._part = self._sink.part("part-00000")
        self.commit()

    def commit(self) -> None:
        if self._part is not None:
            self.parts.append(self._part.commit())
            self._part = None

    def abort(self) -> None:
        if self._part is not None:
            self._part.abort()
