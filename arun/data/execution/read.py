"""Reading sources, and running programs, in threads."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

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


async def read(source: Source, program: Program | None, execution: Execution) -> AsyncGenerator[Block]:
    """The blocks of a source, or what a program makes of them, in the order of the source.

    Reading and computing share a thread: a block never waits for a second hop.
    """
    reading = _Reading(source, program, execution.progress)
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

    :param progress: of an earlier run, where a checkpoint is kept: what is finished is left out.
    :ivar ended: whether there is nothing more.
    """

    def __init__(self, source: Source, program: Program | None, progress: Progress | None) -> None:
        self.ended = False
        self._source = source
        self._program = program
        self._progress = progress
        #: number, fragment, and rows to skip
        self._fragments: Iterator[tuple[int, Fragment, int]] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        #: the fragment that is open, and how far it has been read
        self._number = -1
        self._offset = 0
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
        progress = self._progress
        if self._fragments is None:
            self._fragments = _all(self._source) if progress is None else progress.unfinished()
        for batch in self._batches:
            block = Block(batch) if progress is None else self._unfinished(batch, progress)
            if block is not None:
                self._made = iter((block,)) if self._program is None else self._program.run(block)
            return
        if progress is not None and self._number >= 0:
            progress.end(self._number, self._offset)
        for number, fragment, skip in self._fragments:
            self._number, self._offset = number, skip
            self._batches = self._source.read(fragment, skip=skip)
            return
        self.ended = True

    def _unfinished(self, batch: pa.RecordBatch, progress: Progress) -> Block | None:
        number, start, rows = self._number, self._offset, batch.num_rows
        self._offset += rows
        left = progress.left(number, start, rows)
        if len(left) == 1:
            first, end = left[0]
            origins = range(origin_of(number, first), origin_of(number, end))
            return Block(batch.slice(first - start, end - first), origins)
        offsets = [offset for first, end in left for offset in range(first, end)]
        if not offsets:
            return None
        taken = batch.take(pa.array([offset - start for offset in offsets]))
        return Block(taken, [origin_of(number, offset) for offset in offsets])


def _all(source: Source) -> Iterator[tuple[int, Fragment, int]]:
    for number, fragment in enumerate(source.fragments()):
        yield number, fragment, 0


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
