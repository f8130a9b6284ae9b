"""Streamed: an async generator for each row, whose rows are handed on as it yields them.

What a generator yields waits in a bounded buffer, not in a list of all of it, so one may yield for ever. In order, that
of the first row that has not ended is handed on, and the others fill their buffers.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import anyio

from arun.data.block import Block, Row, Shaper
from arun.data.execution.fan import Nudge, fan
from arun.data.execution.plain import tell_failure, to_rows
from arun.data.execution.rowwise import Specs
from arun.data.execution.statistics import StepStatistics
from arun.data.steps import RowFunction
from arun.handles import Handle
from arun.hosting import close
from arun.policies import Policy

if TYPE_CHECKING:
    from arun.data.execution.execution import Execution

__all__ = ("streamed",)

#: Least rows that a generator may be ahead.
_AHEAD: Final = 16


async def streamed(
    blocks: AsyncIterator[Block], step: RowFunction, counter: StepStatistics, execution: Execution
) -> AsyncGenerator[Block]:
    """The rows that a step's generators yield."""
    limit = step.concurrency or Policy().limit
    shaper = Shaper(step.label, step.schema)
    specs = Specs(blocks, step, shaper)
    nudge = Nudge()
    buffers = _Buffers(max(_AHEAD, execution.options.block_rows // limit), nudge, ordered=step.ordered)

    async def work(handle: Handle[None]) -> None:
        number, row = handle.spec.number, handle.spec.row
        handle.describe = lambda: f"row {number}"
        counter.rows_in += 1
        counter.begin()
        began = time.perf_counter()
        try:
            async with aclosing(step.function(row)) as generated:
                async for one in generated:
                    counter.rows_out += 1
                    await buffers.put(handle.ordinal, to_rows(step, [one])[0])
        except Exception as exc:  # noqa: BLE001 - raised again, with a note
            tell_failure(step, counter, number, row, exc)
        finally:
            counter.in_flight -= 1
            counter.seconds += time.perf_counter() - began

    done = fan(specs.each, work, execution, limit=limit, ordered=step.ordered, name=step.label, nudge=nudge)
    try:
        async for handles in done:
            rows = buffers.take(len(handles))
            if rows:
                yield Block(shaper.batch(rows))
    finally:
        with anyio.CancelScope(shield=True):
            await close(done)


class _Buffers:
    """Rows that generators have yielded and nobody has taken.

    :param most: rows in one buffer.
    """

    def __init__(self, most: int, nudge: Nudge, *, ordered: bool) -> None:
        self._most = most
        self._nudge = nudge
        self._ordered = ordered
        #: by the generator's number; out of order they share one
        self._rows: dict[int, list[Row]] = {}
        #: whose rows may be handed on
        self._head = 0
        self._room = anyio.Event()

    async def put(self, number: int, row: Row) -> None:
        """Take a row from a generator; waits while its buffer is full."""
        number = number if self._ordered else 0
        while len(self._rows.get(number, ())) >= self._most:
            await self._room.wait()
        self._rows.setdefault(number, []).append(row)
        if number == self._head:
            self._nudge()

    def take(self, ended: int) -> list[Row]:
        """What may be handed on, now that so many more generators have ended."""
        rows = self._rows.pop(self._head, [])
        for _ in range(ended if self._ordered else 0):
            self._head += 1
            rows += self._rows.pop(self._head, [])
        room, self._room = self._room, anyio.Event()
        room.set()
        return rows
