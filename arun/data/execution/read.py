"""Reading sources, and running programs, in threads."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import anyio

from arun.data.block import Block, origin_of
from arun.data.execution.program import PERIOD, Program
from arun.data.source import Fragment, Source
from arun.hosting import GRACE, close
from arun.threads import run_in_thread

if TYPE_CHECKING:
    import pyarrow as pa

    from arun.data.execution.execution import Execution

__all__ = ("close_in_thread", "read", "through")


async def read(source: Source, program: Program | None, execution: Execution) -> AsyncGenerator[Block]:
    """The blocks of a source, or what a program makes of them, in the order of the source.

    Reading and computing share a thread: a block never waits for a second hop.
    """
    reading = _Reading(source, program, traced=execution.traced)
    label = f"read {source.name}"
    try:
        while not reading.ended:
            blocks = await run_in_thread(reading.pull, label=label)
            while blocks:
                yield blocks.pop()
    finally:
        if reading.open:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
                await run_in_thread(reading.close, label=label)


class _Reading:
    """Where a source has been read to. Used by one thread at a time.

    :ivar ended: whether there is nothing more.
    """

    def __init__(self, source: Source, program: Program | None, *, traced: bool) -> None:
        self.ended = False
        self._source = source
        self._program = program
        self._traced = traced
        self._fragments: Iterator[Fragment] | None = None
        self._numbers = itertools.count()
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._origin = 0
        self._made: Iterator[Block] = iter(())

    @property
    def open(self) -> bool:
        """Whether there is something to close."""
        return self._fragments is not None and not self.ended

    def pull(self) -> list[Block]:
        """The next blocks, last one first: those that one read gives, or so many as come in a period; maybe none."""
        began = time.perf_counter()
        pulled: list[Block] = []
        while True:
            for block in self._made:
                pulled.append(block)
                if time.perf_counter() - began > PERIOD:
                    return pulled[::-1]
            if self._program is not None and self._program.finished:
                self.close()
            if self.ended or pulled or time.perf_counter() - began > PERIOD:
                return pulled[::-1]
            self._read_next()

    def close(self) -> None:
        """Close what is open."""
        self.ended = True
        close_in_thread(self._batches)
        close_in_thread(self._fragments)

    def _read_next(self) -> None:
        if self._fragments is None:
            self._fragments = iter(self._source.fragments())
        for batch in self._batches:
            block = Block(batch)
            if self._traced:
                block = Block(batch, range(self._origin, self._origin + batch.num_rows))
                self._origin += batch.num_rows
            self._made = iter((block,)) if self._program is None else self._program.run(block)
            return
        for fragment in self._fragments:
            self._origin = origin_of(next(self._numbers), 0)
            self._batches = self._source.read(fragment)
            return
        self.ended = True


def close_in_thread(iterator: Any) -> None:
    """Close a plain generator."""
    try:
        getattr(iterator, "close", lambda: None)()
    except ValueError:  # a thread that was left behind is in it still
        pass


async def through(blocks: AsyncIterator[Block], program: Program) -> AsyncGenerator[Block]:
    """What a program makes of blocks."""
    try:
        async for block in blocks:
            todo = program.run(block)
            del block
            if program.instant:
                for made in todo:
                    yield made
            else:
                more = True
                while more:
                    some, more = await run_in_thread(lambda: _for_a_period(todo))  # noqa: B023 - called at once
                    while some:
                        yield some.pop()
            if program.finished:
                return
    finally:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
            await close(blocks)


def _for_a_period(todo: Iterator[Block]) -> tuple[list[Block], bool]:
    """Some blocks, last one first, and whether there may be more."""
    began = time.perf_counter()
    made: list[Block] = []
    for block in todo:
        made.append(block)
        if time.perf_counter() - began > PERIOD:
            return made[::-1], True
    return made[::-1], False
