"""Iterating over what is no source: any (async) iterable of rows, record batches or tables."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
import pyarrow as pa

from arun.data.block import Block, Row, Shaper
from arun.data.execution.program import PERIOD
from arun.data.execution.read import close_in_thread
from arun.data.logical import Iterate
from arun.errors import MisuseError
from arun.guards import shown
from arun.hosting import GRACE, close, drive
from arun.threads import run_in_thread

if TYPE_CHECKING:
    from arun.data.execution.execution import Execution

__all__ = ("iterate",)

#: Seconds for one item after which a plain iterable counts as slow, and hands its rows on one by one.
_SLOW: Final = 0.001


async def iterate(node: Iterate, execution: Execution) -> AsyncGenerator[Block]:
    """The items of an iterable as blocks; a slow one gives them one by one.

    :raises MisuseError: an item is neither a row nor a record batch nor a table.
    """
    items = node.items.open()
    most = execution.options.block_rows
    shaper = Shaper(node.label, node.schema)
    feed: _Feed | _Steps | _Pulled
    if isinstance(items, AsyncIterator):
        feed = _Pulled(items) if node.items.on_demand else _Feed(items, most)
    else:
        feed = _Steps(items, most)
    if isinstance(feed, _Feed):
        execution.group.start_soon(feed.run, name=f"arun dataset {node.label:.60}")
    try:
        while some := await feed.take():
            for block in _blocks(some, shaper, node.label):
                yield block
    finally:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
            await feed.leave()


class _Steps:
    """A plain iterator, stepped through in threads: it may block."""

    def __init__(self, items: Iterator[Any], most: int) -> None:
        self._items = items
        self._most = most
        self._ended = False

    async def take(self) -> list[Any]:
        """Some items; none at the end."""
        return [] if self._ended else await run_in_thread(self._step, label="an iterable")

    async def leave(self) -> None:
        """Close it."""
        if not self._ended:
            await run_in_thread(lambda: close_in_thread(self._items), label="an iterable")

    def _step(self) -> list[Any]:
        some: list[Any] = []
        began = last = time.perf_counter()
        for item in self._items:
            some.append(item)
            now = time.perf_counter()
            if len(some) == self._most or now - last > _SLOW or now - began > PERIOD or not isinstance(item, dict):
                return some
            last = now
        self._ended = True
        return some


class _Pulled:
    """An async iterator that is asked for an item when one is wanted, and not before."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items

    async def take(self) -> list[Any]:
        """The next item; none at the end."""
        async for item in self._items:
            return [item]
        return []

    async def leave(self) -> None:
        """Close it."""
        await close(self._items)


class _Feed:
    """An async iterator, driven by a task of its own: rows that are there are not held up by the one that is not."""

    def __init__(self, items: AsyncIterator[Any], most: int) -> None:
        self._items = items
        self._most = most
        self._waiting: deque[Any] = deque()
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        self._arrival = anyio.Event()
        self._room = anyio.Event()
        self._error: Exception | None = None

    async def run(self) -> None:
        """Iterate to the end."""
        try:
            with self._scope:
                await drive(self._items, self._receive)
        except Exception as exc:  # noqa: BLE001 - travels in-band to whoever reads
            self._error = exc
        finally:
            self._ended.set()
            self._arrival.set()

    async def take(self) -> list[Any]:
        """What has come; waits for something. None at the end.

        :raises Exception: the iterator's own, after all that it gave.
        """
        while not self._waiting:
            if self._ended.is_set():
                if self._error is not None:
                    raise self._error
                return []
            self._arrival = anyio.Event()
            await self._arrival.wait()
        some = list(self._waiting)
        self._waiting.clear()
        self._room.set()
        return some

    async def leave(self) -> None:
        """Close it, and wait for that."""
        self._scope.cancel()
        await self._ended.wait()

    def _receive(self, item: Any) -> Awaitable[None] | None:
        self._waiting.append(item)
        self._arrival.set()
        return self._wait_for_room() if len(self._waiting) >= self._most or not isinstance(item, dict) else None

    async def _wait_for_room(self) -> None:
        self._room = anyio.Event()
        await self._room.wait()


def _blocks(items: list[Any], shaper: Shaper, label: str) -> Iterator[Block]:
    rows: list[Row] = []
    for item in items:
        if isinstance(item, dict):
            rows.append(cast("Row", item))
        elif isinstance(item, Mapping):
            rows.append(dict(cast("Mapping[str, Any]", item)))
        elif isinstance(item, pa.RecordBatch | pa.Table):
            if rows:
                yield Block(shaper.batch(rows))
                rows = []
            yield from map(Block, [item] if isinstance(item, pa.RecordBatch) else item.to_batches())
        else:
            raise MisuseError(f"{label} gave {shown(item)}; a row is a dict, and a RecordBatch or a Table many rows")
    if rows:
        yield Block(shaper.batch(rows))
