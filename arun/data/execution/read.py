"""Reading sources, and running programs, in threads."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Final

import anyio
import pyarrow as pa

from arun.data.block import Block, origin_of
from arun.data.checkpoint.progress import Progress
from arun.data.execution.program import PERIOD, Program
from arun.data.source import Fragment, Source
from arun.hosting import GRACE, close
from arun.threads import run_in_thread

if TYPE_CHECKING:
    from arun.data.execution.execution import Execution

__all__ = ("close_in_thread", "read", "through")

#: Bytes after which a thread looks up.
_BURST_BYTES: Final = 8 << 20


async def read(source: Source, program: Program | None, execution: Execution) -> AsyncGenerator[Block]:
    """The blocks of a source, or what a program makes of them, in the order of the source.

    Reading and computing share a thread: a block never waits for a second hop.
    """
    label = f"read {source.name}"
    burst = Burst(_made(source, program, execution.progress))
    try:
        while not burst.over:
            blocks = await run_in_thread(burst.take, label=label)
            while blocks:
                yield blocks.pop()
    finally:
        if burst.open:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
                await run_in_thread(burst.close, label=label)


async def through(blocks: AsyncIterator[Block], program: Program) -> AsyncGenerator[Block]:
    """What a program makes of blocks."""
    try:
        async for block in blocks:
            burst = Burst(program.run(block))
            del block
            while not burst.over:
                made = burst.take() if program.instant else await run_in_thread(burst.take, label=program.label)
                while made:
                    yield made.pop()
            if program.finished:
                return
    finally:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
            await close(blocks)


class Burst:
    """Takes blocks from a plain iterator for a while at a time, in a thread.

    :ivar open: whether there is something to close.
    :ivar over: whether it has given all.
    """

    __slots__ = ("_blocks", "_error", "open", "over")

    def __init__(self, blocks: Iterator[Block]) -> None:
        self.open = False
        self.over = False
        self._blocks = blocks
        self._error: Exception | None = None

    def take(self) -> list[Block]:
        """The next blocks, last one first.

        :raises Exception: the iterator's own, after all that it gave.
        """
        if self._error is not None:
            raise self._error
        self.open = True
        began = time.perf_counter()
        taken: list[Block] = []
        size = 0
        try:
            for block in self._blocks:
                taken.append(block)
                size += block.size
                if size >= _BURST_BYTES or time.perf_counter() - began > PERIOD:
                    return taken[::-1]
        except Exception as exc:
            if not taken:
                self.open = False
                raise
            self._error = exc
        else:
            self.over = True
        self.open = False
        return taken[::-1]

    def close(self) -> None:
        """Close the iterator."""
        close_in_thread(self._blocks)


def close_in_thread(iterator: Any) -> None:
    """Close a plain generator."""
    try:
        getattr(iterator, "close", lambda: None)()
    except ValueError:  # a thread that was left behind is in it still
        pass


def _made(source: Source, program: Program | None, progress: Progress | None) -> Iterator[Block]:
    """What a program makes of the blocks of a source.

    :param progress: of an earlier run, where a checkpoint is kept: what is finished is left out.
    """
    fragments = _all(source) if progress is None else progress.unfinished()
    silent = True
    for number, fragment, skip in fragments:
        offset = skip
        batches = source.read(fragment, skip=skip)
        try:
            for batch in batches:
                silent = False
                block = Block(batch) if progress is None else _unfinished(batch, number, offset, progress)
                offset += batch.num_rows
                if program is None:
                    yield block
                    continue
                yield from program.run(block)
                if program.finished:
                    return
        finally:
            close_in_thread(batches)
        if progress is not None:
            progress.end(number, offset)
    schema = source.schema() if silent else None
    if schema is not None and schema.names:  # there are no rows; what comes after learns the columns all the same
        nothing = Block(pa.RecordBatch.from_pylist([], schema=schema))
        yield from (nothing,) if program is None else program.run(nothing)


def _all(source: Source) -> Iterator[tuple[int, Fragment, int]]:
    for number, fragment in enumerate(source.fragments()):
        yield number, fragment, 0


def _unfinished(batch: pa.RecordBatch, number: int, start: int, progress: Progress) -> Block:
    """What is not finished of a batch, with its origins."""
    left = progress.left(number, start, batch.num_rows)
    if len(left) == 1:
        first, end = left[0]
        return Block(batch.slice(first - start, end - first), range(origin_of(number, first), origin_of(number, end)))
    offsets = [offset for first, end in left for offset in range(first, end)]
    taken = batch.take(pa.array([offset - start for offset in offsets], type=pa.int64()))
    return Block(taken, [origin_of(number, offset) for offset in offsets])
