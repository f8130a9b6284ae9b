"""Streams: the blocks of a run as a plain async iterator, which may be left at any time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

from arun.data.batches import BatchFormat, Cutter, converter
from arun.data.block import Block, Row, row_dicts
from arun.data.execution.boundary import Boundary
from arun.data.execution.execution import Consumer
from arun.data.execution.statistics import StageStatistics
from arun.data.options import RunOptions
from arun.errors import MisuseError
from arun.runtime import Background, Runtime
from arun.timed import Timed

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("BatchStream", "BlockStream", "RowStream")


class BlockStream:
    """The blocks of a dataset as they come, for one task, once; made by ``dataset.astream()``.

    The run starts with the first block that is asked for, and belongs to the Runtime. Leaving the stream (``aclose()``,
    ``async with``, garbage collection) cancels it.
    """

    def __init__(
        self, run: Callable[[Consumer], Awaitable[Any]], options: RunOptions, *, on_demand: bool = False
    ) -> None:
        # The run holds the boundary and never the stream, so a stream that its consumer drops is collected.
        runs: list[Background[None]] = []

        def start() -> None:
            runs.append(Runtime.current().start(_host, run, boundary, on_demand, name="arun dataset"))

        statistics = StageStatistics(0, "stream")
        boundary = Boundary(options.queue_blocks, options.queue_bytes, statistics, start, _nothing)
        self._runs = runs
        self._reader = boundary.reader(None)
        self._waiting = False
        self._closed = False

    def __aiter__(self) -> AsyncIterator[pa.RecordBatch]:
        return self

    async def __anext__(self) -> pa.RecordBatch:
        if self._closed:
            raise StopAsyncIteration
        if self._waiting:
            raise MisuseError("two tasks iterate over one stream of blocks; give each a stream of its own, or split()")
        self._waiting = True
        try:
            return (await self._reader.__anext__()).batch
        except StopAsyncIteration:
            self._closed = True
            raise
        finally:
            self._waiting = False

    def with_timeout(self, seconds: float) -> Timed[pa.RecordBatch]:
        """The same blocks, each with a time limit.

        :param seconds: until the next block has come; after that a TimeoutError is raised, and the stream goes on.
        """
        return Timed(self, seconds)

    async def aclose(self) -> None:
        """Cancel the run, if it still goes, and wait for its clean-up."""
        self._closed = True
        await self._reader.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        for run in getattr(self, "_runs", ()):
            if not run.done:
                run.cancel_soon()


class RowStream:
    """The rows of a dataset as they come, for one task, once; made by ``dataset.rows()``."""

    def __init__(self, blocks: BlockStream) -> None:
        self._blocks = blocks
        self._rows: list[Row] = []

    def __aiter__(self) -> AsyncIterator[Row]:
        return self

    async def __anext__(self) -> Row:
        while not self._rows:
            batch = await self._blocks.__anext__()
            self._rows = row_dicts(batch)
            self._rows.reverse()
        return self._rows.pop()

    async def aclose(self) -> None:
        """Cancel the run, if it still goes, and wait for its clean-up."""
        self._rows.clear()
        await self._blocks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class BatchStream:
    """The rows of a dataset in batches for a trainer, for one task, once; made by ``dataset.iter_batches()``."""

    def __init__(self, blocks: BlockStream, format: BatchFormat, batch_size: int | None, *, drop_last: bool) -> None:
        self._blocks = blocks
        self._convert = converter(format)
        self._cutter: Cutter | None = Cutter(batch_size)
        self._drop_last = drop_last
        self._cut: Iterator[pa.RecordBatch] = iter(())

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while self._cutter is not None:
            for batch in self._cut:
                return self._convert(batch)
            block = await anext(self._blocks, None)
            if block is None:
                rest = None if self._drop_last else self._cutter.rest()
                self._cutter = None
                if rest is not None:
                    return self._convert(rest)
            else:
                self._cut = self._cutter.cut(block)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the run, if it still goes, and wait for its clean-up."""
        self._cutter = None
        await self._blocks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


async def _host(run: Callable[[Consumer], Awaitable[Any]], boundary: Boundary, on_demand: bool) -> None:
    async def feed(blocks: AsyncIterator[Block]) -> None:
        if on_demand:
            await boundary.asked()
        async for block in blocks:
            pending = boundary.put(block)
            if on_demand:
                del block
                await boundary.asked()
            elif pending is not None:
                await pending

    error: Exception | None = None
    try:
        with boundary.scope:
            await run(feed)
    except Exception as exc:  # noqa: BLE001 - raised where the stream is read
        error = exc
    finally:
        boundary.end(error)


async def _nothing() -> None:
    """Nothing has been started that would have to end."""
