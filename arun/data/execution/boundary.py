"""Boundaries: what lies between a stage and those that read it.

One reader has a bounded queue. Several have one each; the stage waits for the slowest, and all of them share a block
as long as it waits. Where that could be a deadlock, blocks that wait for a reader spill to disk instead. A reader that
leaves is forgotten, and when the last one has left, the stage is cancelled. The stage is started by the first reader
that asks for a block, or says that it will.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import anyio

from arun.data.block import Block
from arun.data.execution.statistics import StageStatistics
from arun.data.spill import BlockReader, SpillingQueue

__all__ = ("Boundary", "Reader")

T = TypeVar("T")


class Boundary:
    """The readers of one stage, and how much may wait for each.

    :param blocks: most blocks that wait for one reader.
    :param size: most bytes that do; one block may always wait.
    :param start: starts the stage.
    :param spill: where blocks wait, if readers may be apart: then the stage waits for none of them.
    :param abandon: called instead, if all readers have left before any of them asked for a block.
    """

    def __init__(
        self,
        blocks: int,
        size: int,
        statistics: StageStatistics,
        start: Callable[[], None],
        abandon: Callable[[], Awaitable[None]],
        *,
        spill: SpillingQueue | None = None,
    ) -> None:
        self.scope = anyio.CancelScope()
        self.statistics = statistics
        self._blocks = blocks
        self._size = size
        self._start = start
        self._abandon = abandon
        self._spill = spill
        self._started = False
        self._readers: list[Reader] = []
        self._room: anyio.Event | None = None
        self._asked = anyio.Event()
        self._ended = anyio.Event()
        self._error: Exception | None = None

    def reader(self, of: StageStatistics | None) -> Reader:
        """One more reader; all are made before the first one reads.

        :param of: counts of the stage that reads; None for somebody outside.
        """
        reader = Reader(self, of, None if self._spill is None else self._spill.reader())
        self._readers.append(reader)
        return reader

    def put(self, block: Block) -> Awaitable[None] | None:
        """Hand a block to all readers; what is returned is awaited before the next one."""
        if self._spill is not None:
            return self._spill.put(block.batch)
        waiting = 0
        for reader in self._readers:
            waiting = max(waiting, reader.add(block))
        statistics = self.statistics
        statistics.peak_blocks = max(statistics.peak_blocks, waiting)
        return self._wait_for_room() if self._full() else None

    async def asked(self) -> None:
        """Wait until a reader waits for a block, once more."""
        await self._asked.wait()
        self._asked = anyio.Event()

    def end(self, error: Exception | None) -> None:
        """The stage has ended."""
        self._error = error
        self._ended.set()
        if self._spill is not None:
            self.statistics.spilled = self._spill.statistics().spilled
            self._spill.end(error)
        for reader in self._readers:
            reader.wake()

    def begin(self) -> None:
        """Start the stage, if nobody has."""
        if not self._started:
            self._started = True
            self._start()

    async def next_of(self, reader: Reader) -> Block:
        """Wait for a reader's next block.

        :raises Exception: the stage's own error, after all that it gave.
        """
        self.begin()
        if reader.spilled is not None:
            return Block(await reader.waiting_for(reader.spilled.__anext__()))
        while not reader.blocks:
            if self._ended.is_set():
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._asked.set()
            await reader.wait()
        block = reader.blocks.popleft()
        reader.size -= block.size
        if self._room is not None and not self._full():
            self._room.set()
            self._room = None
        return block

    async def leave(self, reader: Reader) -> None:
        """A reader wants no more; the last one waits until the stage has cleaned up."""
        if reader not in self._readers:
            return
        self._readers.remove(reader)
        if self._readers:
            if self._room is not None and not self._full():
                self._room.set()
                self._room = None
        elif not self._started:
            await self._abandon()
        elif not self._ended.is_set():
            self.scope.cancel()
            with anyio.CancelScope(shield=True):
                await self._ended.wait()

    def _full(self) -> bool:
        return any(len(one.blocks) >= self._blocks or one.size >= self._size for one in self._readers)

    async def _wait_for_room(self) -> None:
        began = anyio.current_time()
        while self._full():
            self._room = anyio.Event()
            await self._room.wait()
        self.statistics.waited_out += anyio.current_time() - began


class Reader:
    """One reader's end of a boundary: an async iterator of blocks, for one task.

    :ivar blocks: that wait for it.
    :ivar size: bytes of them.
    :ivar spilled: where they wait instead, if they may spill.
    """

    def __init__(self, boundary: Boundary, of: StageStatistics | None, spilled: BlockReader | None) -> None:
        self.blocks: deque[Block] = deque()
        self.size = 0
        self.spilled = spilled
        self._of = of
        self._boundary = boundary
        self._arrival: anyio.Event | None = None

    def __aiter__(self) -> AsyncIterator[Block]:
        return self

    async def __anext__(self) -> Block:
        return await self._boundary.next_of(self)

    def begin(self) -> None:
        """Let the stage begin before the first block is asked for."""
        self._boundary.begin()

    async def aclose(self) -> None:
        """Leave."""
        self.blocks.clear()
        self.size = 0
        if self.spilled is not None:
            await self.spilled.aclose()
        await self._boundary.leave(self)

    def add(self, block: Block) -> int:
        """Take a block in; returns how many wait."""
        self.blocks.append(block)
        self.size += block.size
        self.wake()
        return len(self.blocks)

    def wake(self) -> None:
        """There is something to see."""
        if self._arrival is not None:
            self._arrival.set()
            self._arrival = None

    async def wait(self) -> None:
        """Wait until :meth:`wake`."""
        self._arrival = anyio.Event()
        try:
            await self.waiting_for(self._arrival.wait())
        finally:
            self._arrival = None

    async def waiting_for(self, something: Awaitable[T]) -> T:
        """Await it, and count the time."""
        began = anyio.current_time()
        try:
            return await something
        finally:
            if self._of is not None:
                self._of.waited_in += anyio.current_time() - began
