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
#: The column with the keys; it comes last and is told by its place.
_KEY: Final = "key"


async def random_shuffle(
    blocks: AsyncIterator[pa.RecordBatch], *, seed: int | None = None, limits: Limits | None = None
) -> AsyncGenerator[pa.RecordBatch, None]:
    """All rows in a random order, each order as likely as any other.

    :param seed: the same one gives the same rows the same order; None for another one every time.
    """
    limits = limits or Limits()
    draw = random.Random(seed)
    pile: _Pile | None = None
    schema: pa.Schema | None = None
    try:
        async for block in blocks:
            if schema is None or pile is None:
                schema = block.schema
                pile = _Pile(limits, 0)
            keyed = _keyed(held_to(block, schema), draw)
            pile_up = pile.add
            await run_in_thread(lambda: pile_up(keyed), label="shuffling")  # noqa: B023 - it has ended before the next
        if pile is None or schema is None:
            return
        shuffled = pile.shuffled()
        while (batch := await run_in_thread(lambda: next(shuffled, None), label="shuffling")) is not None:
            for block in unpack(batch, schema):
                yield block
    finally:
        with anyio.CancelScope(shield=True):
            if pile is not None:
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
    try:
        async for block in blocks:
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
            self._blocks.append(held_to(block, self._blocks[0].schema) if self._blocks else block)
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
        return taken[0] if len(taken) == 1 else pa.concat_batches(taken)


def _keyed(block: pa.RecordBatch, draw: random.Random) -> pa.RecordBatch:
    """Give every row its key. Dictionaries become their values, because two may not fit into one, and views what they
    show, because their rows can't be taken by number.
    """
    keys = pa.Array.from_buffers(pa.uint64(), len(block), [None, pa.py_buffer(draw.randbytes(8 * len(block)))])
    columns = [column.cast(carried_type(column.type)) if _apart(column.type) else column for column in block.columns]
    return pa.RecordBatch.from_arrays([*columns, keys], names=[*block.schema.names, _KEY])


def _apart(kind: pa.DataType) -> bool:
    return bool(pt.is_dictionary(kind) or pt.is_string_view(kind) or pt.is_binary_view(kind))


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
        keys = rows.column(rows.num_columns - 1)
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
                rows = pa.concat_batches(bucket.waiting)
                bucket.waiting = []
                bucket.bytes += rows.nbytes
                bucket.spilled.append(self._file.append(rows))
        self._bytes = 0


def _sorted(rows: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    if not rows:
        return
    one = pa.concat_batches(rows)
    rows.clear()
    key = one.num_columns - 1
    order = pc.call_function("array_sort_indices", [one.column(key)])
    one = one.select(range(key))
    for start in range(0, len(order), _BLOCK):
        yield one.take(order.slice(start, _BLOCK))
