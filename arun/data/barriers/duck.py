"""A query of DuckDB as an async iterator of blocks, fed by async iterators of blocks.

    inputs --anext-->  reader's task  --Feed, a few blocks-->  DuckDB's threads  --Arrow, batch by batch-->  reader

Whoever reads the result drives the inputs, in the same task: while a thread waits for DuckDB's next batch, the reader
gives it the blocks that it asks for. So nothing runs when nobody reads, and there is no task to leave behind.
Cancelled, the query is interrupted and its thread awaited; the connection is closed and what it has spilled removed.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Final

import anyio
import msgspec
import pyarrow as pa

from arun.data.barriers.carried import pack, unpack, with_row
from arun.data.barriers.limits import Limits
from arun.data.barriers.relation import Relation, Table
from arun.errors import ArunError, DataError
from arun.hosting import close
from arun.runtime import post_to_this_loop
from arun.threads import run_in_thread

__all__ = ("Statement", "query")

#: Blocks of one input that wait for DuckDB.
_AHEAD: Final = 4
#: Rows in a batch of the result: sixteen of DuckDB's vectors.
_BATCH: Final = 16 * 2048
#: Bytes of the result fetched with one hop into a thread, about, and the seconds that it may take.
_BYTES: Final = 8 * 2**20
_PERIOD: Final = 0.05
#: Seconds between interrupts of a query that is left: one that comes before it has begun is lost.
_INTERRUPT_AGAIN: Final = 0.02


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What DuckDB is asked.

    :ivar tables: those that ``sql`` names.
    :ivar schema: of the result; its columns in their order.
    """

    sql: str
    tables: tuple[Table, ...]
    schema: pa.Schema


async def query(
    prepare: Callable[[], Awaitable[Statement | None]], inputs: Sequence[Relation], what: str, limits: Limits
) -> AsyncGenerator[pa.RecordBatch, None]:
    """The result of a statement, batch by batch.

    :param prepare: gives the statement, or None if the result is empty; called when the first batch is asked for.
    :param inputs: what it reads, whose blocks are closed at the end.
    :param what: the operation, for errors.
    :raises ArunError: it needs more memory than it may use, even with spilling.
    """
    running: _Query | None = None
    tables: Sequence[Table] = ()
    try:
        statement = await prepare()
        if statement is None:
            return
        tables = statement.tables
        running = _Query(statement, limits, what)
        await running.serve(running.begin)
        empty = True
        while batches := await running.serve(running.next_batches):
            for batch in batches:
                for block in unpack(batch, statement.schema):
                    empty = False
                    yield block
        if empty:  # it still has columns
            yield pa.RecordBatch.from_pylist([], schema=statement.schema)
    finally:
        with anyio.CancelScope(shield=True):
            if running is not None:
                await run_in_thread(running.close, label=f"the end of {what}")
            for relation in (*inputs, *(table.relation for table in tables)):
                if relation.blocks is not None:
                    await close(relation.blocks)


class _Query:
    """One query while it runs."""

    def __init__(self, statement: Statement, limits: Limits, what: str) -> None:
        self._sql = statement.sql
        self._limits = limits
        self._what = what
        self._post = post_to_this_loop()
        self._feeds = [_Feed(table, self._wake_soon) for table in statement.tables if table.relation.blocks is not None]
        self._awake = anyio.Event()
        self._left = False
        self._connection: Any = None
        self._folder: str | None = None
        self._reader: Any = None

    async def serve(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` in a thread and give DuckDB the blocks that it asks for meanwhile."""
        done: list[Any] = []
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._call, work, done)
            try:
                while not done:
                    self._awake = anyio.Event()
                    hungry = next((feed for feed in self._feeds if feed.hungry), None)
                    if hungry is not None:
                        await hungry.fill()
                    elif not done:
                        await self._awake.wait()
            except Exception as exc:  # noqa: BLE001 - raised below: the group would wrap it
                failure = exc
                await self._leave(done)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self._leave(done)
                raise
        if failure is not None:
            raise failure
        result, error = done[0]
        if error is not None:
            raise error
        return result

    def begin(self) -> None:
        """Start the query; returns once there is something to read."""
        import duckdb

        self._folder = tempfile.mkdtemp(prefix="arun-", dir=self._limits.folder)
        config: dict[str, Any] = {
            "memory_limit": f"{self._limits.memory}B",
            "temp_directory": self._folder,
            # Where order matters the SQL asks for it, by the number of a row.
            "preserve_insertion_order": False,
        }
        if self._limits.threads is not None:
            config["threads"] = self._limits.threads
        self._connection = duckdb.connect(config=config)
        for feed in self._feeds:
            reader = pa.RecordBatchReader.from_batches(feed.schema, feed.blocks())
            self._connection.register(feed.table.name, reader)
        self._refuse_left()
        self._reader = self._connection.sql(self._sql).to_arrow_reader(_BATCH)

    def next_batches(self) -> list[pa.RecordBatch]:
        """Some of the result; none at the end. Several, if nothing that they might wait for is still to come."""
        self._refuse_left()
        batches: list[pa.RecordBatch] = []
        size, until = 0, time.perf_counter() + _PERIOD
        for batch in self._reader:
            batches.append(batch)
            size += batch.nbytes
            more_is_there = all(feed.ended for feed in self._feeds)
            if not more_is_there or size >= _BYTES or time.perf_counter() >= until:
                break
        return batches

    def close(self) -> None:
        self._reader = None
        if self._connection is not None:
            self._connection.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _refuse_left(self) -> None:
        if self._left:
            raise _Left

    async def _call(self, work: Callable[[], Any], done: list[Any]) -> None:
        result: Any = None
        error: Exception | None = None
        try:
            result = await run_in_thread(work, label=self._what)
        except Exception as exc:  # noqa: BLE001 - travels to serve(), past the task group
            error = self._told(exc)
        finally:
            done.append((result, error))
            self._wake()

    def _told(self, error: Exception) -> Exception:
        import duckdb

        # Where it happens in the middle of a result, Arrow makes an OSError of DuckDB's own type.
        if "Out of Memory Error" not in str(error):
            if not isinstance(error, duckdb.Error):
                return error
            refused = DataError(f"{self._what}: {str(error).strip().splitlines()[0]}")  # what follows is its SQL
            refused.__cause__ = error
            return refused
        told = ArunError(
            f"{self._what} needs more than its memory limit of {self._limits.memory:,} bytes, also with spilling to "
            f"disk; give it more ({error})"
        )
        told.__cause__ = error
        return told

    async def _leave(self, done: list[Any]) -> None:
        """End the query, and wait for its thread."""
        self._left = True
        for feed in self._feeds:
            feed.leave()
        while not done:
            self._awake = anyio.Event()
            if self._connection is not None:
                self._connection.interrupt()
            with anyio.move_on_after(_INTERRUPT_AGAIN):
                await self._awake.wait()

    def _wake(self) -> None:
        self._awake.set()

    def _wake_soon(self) -> None:
        try:
            self._post(self._wake)
        except RuntimeError:  # the loop is closed
            pass


class _Feed:
    """The blocks of one input on their way into DuckDB's threads."""

    def __init__(self, table: Table, wake: Callable[[], None]) -> None:
        self.table = table
        numbered = table.numbered or not len(table.carried)  # DuckDB reads no table without columns
        self.schema = with_row(table.carried) if numbered else table.carried
        self._blocks: AsyncIterator[pa.RecordBatch] = table.relation.blocks  # type: ignore[assignment]  # it has some
        self._first = table.relation.first
        self._row = 0 if numbered else None
        self._wake = wake
        self._changed = threading.Condition()
        self._waiting: deque[pa.RecordBatch] = deque()
        #: whether the input has come to its end
        self.ended = False
        self._left = False
        #: whether DuckDB has asked for more than is here
        self._asked = False

    @property
    def hungry(self) -> bool:
        """Whether it takes a block now. What DuckDB has not begun to read is not asked of the input either."""
        return self._asked and not self.ended and len(self._waiting) < _AHEAD

    async def fill(self) -> None:
        """Take one block from the input."""
        block, self._first = self._first, None
        if block is None:
            block = await anext(self._blocks, None)
        packed = None
        if block is not None:
            packed = pack(block, self.table.schema, self.table.carried, self._row)
            if self._row is not None:
                self._row += len(block)
        with self._changed:
            if packed is None:
                self.ended = True
            else:
                self._waiting.append(packed)
            self._changed.notify()

    def leave(self) -> None:
        """No more blocks come, and who waits for one is sent away."""
        with self._changed:
            self._left = True
            self._changed.notify()

    def blocks(self) -> Iterator[pa.RecordBatch]:
        """In one of DuckDB's threads at a time."""
        while True:
            with self._changed:
                self._asked = True
                if len(self._waiting) <= _AHEAD // 2 and not self.ended:
                    self._wake()
                while not (self._waiting or self.ended or self._left):
                    self._changed.wait()
                if self._left:
                    raise _Left
                if not self._waiting:
                    return
                block = self._waiting.popleft()
            yield block


class _Left(Exception):
    """The query was left."""
