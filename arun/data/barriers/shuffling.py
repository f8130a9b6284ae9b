"""Random shuffle and repartition, on blocks spilled as Arrow IPC.

A shuffle sorts by a random key of 64 bits that every row gets as it comes, so it depends on the seed and the order of
the rows alone: not on how they were cut into blocks, nor on how much memory there is. Rows that do not fit are spread
over buckets on disk by the first bits of their keys; a bucket is sorted in memory, or is spread again by the next bits.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Final

import anyio
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from arun.data.barriers.carried import carried_type, held_to, unpack
from arun.data.barriers.limits import Limits
from arun.data.block import joined, unify
from arun.data.spill import Place, SpillFile, SpillingQueue
from arun.errors import MisuseError
from arun.hosting import close
from arun.threads import run_in_thread

__all__ = ("random_shuffle", "repartition")

#: Bits of a key by which rows are spread at once.
_BITS: Final = 6
#: Rows in a block of the result.
_BLOCK: Final = 32_768
#: Most bytes sorted at once: the offsets of a string column count to 2 GiB.
_MOST: Final = 2**30
#: The column with the keys.
_KEY: Final = "\0key"


async def random_shuffle(
    blocks: AsyncIterator[pa.RecordBatch], *, seed: int | None = None, limits: Limits | None = None
) -> AsyncGenerator[pa.RecordBatch, None]:
    """All rows in a random order, each order as likely as any other.

    :param seed: the same one gives the same rows the same order; None for another one every time.
    """
    draw = random.Random(seed)
    pile = _Pile(limits or Limits(), 0)
    schemas: dict[pa.Schema, None] = {}
    try:
        async for block in blocks:
            schemas[block.schema] = None
            keyed = _keyed(block, draw)
            await run_in_thread(lambda: pile.add(keyed), label="shuffling")  # noqa: B023 - it ends before the next
        if not schemas:
            return
        schema = unify(schemas)
        shuffled = pile.shuffled()
        empty = True
        while (batch := await run_in_thread(lambda: next(shuffled, None), label="shuffling")) is not None:
            for block in unpack(held_to(batch, _apart(schema)), schema):
                empty = False
                yield block
        if empty:
            yield pa.RecordBatch.from_pylist([], schema=schema)
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_thread(pile.close, label="the end of shuffling")
            await close(blocks)


async def repartition(
    blocks: AsyncIterator[pa.RecordBatch],
    *,
    count: int | None = None,
    rows: int | None = None,
    limits: Limits | None = None,
) -> AsyncGenerator[pa.RecordBatch, None]:
    """The same rows in the same order, cut anew.

    :param count: number of blocks, whose rows differ by one at most. All rows have to be there before the first block.
    :param rows: in each block but the last; the rows stream.
    """
    if (count is None) == (rows is None):
        raise MisuseError("repartition takes a count of blocks or the rows of each; give one of them")
    if (count or rows or 0) < 1:
        raise MisuseError(f"repartition({'count' if count is not None else 'rows'}={count or rows}): at least 1")
    limits = limits or Limits()
    cut, queue, total = _Cut(), SpillingQueue(memory=limits.memory, folder=limits.folder), 0
    reader = queue.reader()
    empty: pa.RecordBatch | None = None
    some = False
    try:
        async for block in blocks:
            if not len(block):
                empty = block
                continue
            some = True
            if rows is None:
                total += len(block)
                await queue.put(block)
                continue
            cut.add(block)
            while cut.rows >= rows:
                yield cut.take(rows)
        if cut.rows:
            yield cut.take(cut.rows)
        parts = min(count or 0, total)
        for number in range(parts):
            wanted = total * (number + 1) // parts - total * number // parts
            while cut.rows < wanted:
                cut.add(await anext(reader))
            yield cut.take(wanted)
        if empty is not None and not some:
            yield empty
    finally:
        queue.release()
        with anyio.CancelScope(shield=True):
            await close(blocks)


class _Cut:
    """Blocks on their way into other blocks."""

    def __init__(self) -> None:
        self._blocks: list[pa.RecordBatch] = []
        self.rows = 0

    def add(self, block: pa.RecordBatch) -> None:
        if len(block):
            self._blocks.append(block)
            self.rows += len(block)

    def take(self, rows: int) -> pa.RecordBatch:
        """The first ``rows`` rows."""
        taken: list[pa.RecordBatch] = []
        left = rows
        for index, block in enumerate(self._blocks):
            taken.append(block.slice(0, left))
            if left <= len(block):
                rest = block.slice(left)
                self._blocks[: index + 1] = [rest] if len(rest) else []
                break
            left -= len(block)
        self.rows -= rows
        return joined(taken)


def _keyed(block: pa.RecordBatch, draw: random.Random) -> pa.RecordBatch:
    """Give every row its key."""
    keys = pa.Array.from_buffers(pa.uint64(), len(block), [None, pa.py_buffer(draw.randbytes(8 * len(block)))])
    return block.cast(_apart(block.schema)).append_column(_KEY, keys)


def _apart(schema: pa.Schema) -> pa.Schema:
    """With values for dictionaries, because two may not fit into one, and with what they show for views, because rows
    of them can't be taken by number.
    """
    for index, field in enumerate(schema):
        kind = field.type
        if pt.is_dictionary(kind) or pt.is_string_view(kind) or pt.is_binary_view(kind):
            schema = schema.set(index, field.with_type(carried_type(kind)))
    return schema


class _Bucket:
    """Rows whose keys begin with the same bits."""

    def __init__(self) -> None:
        self.waiting: list[pa.RecordBatch] = []
        self.spilled: list[Place] = []
        self.bytes = 0


class _Pile:
    """Rows with keys, of which no more than half the memory is kept here. Every method may block.

    :param depth: how many times the rows have been spread.
    """

    def __init__(self, limits: Limits, depth: int) -> None:
        self._limits = limits
        self._most = min(limits.memory // 2, _MOST)
        self._shift = 64 - _BITS * (depth + 1)
        self._depth = depth
        self._rows: list[pa.RecordBatch] = []
        self._bytes = 0
        self._file: SpillFile | None = None
        self._buckets: list[_Bucket] = []
        self._below: _Pile | None = None

    def add(self, rows: pa.RecordBatch) -> None:
        """Add rows, and spread what is here once it is too much."""
        self._bytes += rows.nbytes
        if self._file is None:
            self._rows.append(rows)
            if self._bytes > self._most:
                self._file = SpillFile(self._limits.folder)
                self._buckets = [_Bucket() for _ in range(2**_BITS)]
                rest, self._rows = self._rows, []
                while rest:
                    self._spread(rest.pop(0))
                self._spill()
        else:
            self._spread(rows)
            if self._bytes > self._most:
                self._spill()

    def shuffled(self) -> Iterator[pa.RecordBatch]:
        """All rows by their keys, which are left out."""
        if self._file is None:
            yield from _sorted(self._rows)
            return
        self._spill()
        for bucket in self._buckets:
            if bucket.bytes <= self._most:
                yield from _sorted([self._file.read(place) for place in bucket.spilled])
                continue
            self._below = _Pile(self._limits, self._depth + 1)
            for place in bucket.spilled:
                self._below.add(self._file.read(place))
            yield from self._below.shuffled()
            self._below.close()
            self._below = None

    def close(self) -> None:
        if self._below is not None:
            self._below.close()
        if self._file is not None:
            self._file.close()

    def _spread(self, rows: pa.RecordBatch) -> None:
        keys = rows.column(_KEY)
        first_bits = pc.call_function("shift_right", [keys, pa.scalar(self._shift, pa.uint64())])
        numbers = pc.call_function("bit_wise_and", [first_bits, pa.scalar(2**_BITS - 1, pa.uint64())])
        rows = rows.take(pc.call_function("array_sort_indices", [numbers]))
        start = 0
        counts = numbers.value_counts()
        for number, length in sorted(zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True)):
            self._buckets[number].waiting.append(rows.slice(start, length))
            start += length

    def _spill(self) -> None:
        assert self._file is not None
        for bucket in self._buckets:
            if bucket.waiting:
                rows = joined(bucket.waiting)
                bucket.waiting = []
                bucket.bytes += rows.nbytes
                bucket.spilled.append(self._file.append(rows))
        self._bytes = 0


def _sorted(rows: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    if not rows:
        return
    one = joined(rows)
    rows.clear()
    order = pc.call_function("array_sort_indices", [one.column(_KEY)])
    one = one.drop_columns(_KEY)
    for start in range(0, len(order), _BLOCK):
        yield one.take(order.slice(start, _BLOCK))
