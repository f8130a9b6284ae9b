"""Output: what a stage gives, counted, and without the blocks that say nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

from arun.data.block import Block
from arun.data.execution.statistics import StageStatistics
from arun.hosting import close

__all__ = ("Output",)


class Output:
    """The blocks of an operator as an async iterator, for one task.

    A block without rows is left out, unless it is the only one there is and tells the columns, or some origins have
    ended with it.
    """

    __slots__ = ("_blocks", "_empty", "_statistics")

    def __init__(self, blocks: AsyncIterator[Block], statistics: StageStatistics) -> None:
        self._blocks = blocks
        self._statistics = statistics
        self._empty: Block | None = None

    def __aiter__(self) -> AsyncIterator[Block]:
        return self

    async def __anext__(self) -> Block:
        statistics = self._statistics
        async for block in self._blocks:
            if block.rows or block.dropped:
                statistics.rows += block.rows
                statistics.size += block.size
                statistics.blocks += 1
                return block
            if block.batch.num_columns:
                self._empty = block
        empty, self._empty = self._empty, None
        if empty is not None and not statistics.blocks:
            return empty
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Close the operator."""
        await close(self._blocks)
