"""Programs: plain steps that follow each other as one function of a block, so that one hop into a thread serves it.

A piece of a block goes through all steps at once, as rows from the first step that wants rows to the first that wants
Arrow; rows that only a filter has looked at are not made anew. Pieces are as large as ``PERIOD`` lets them be: a slow
function gives its rows early, and is cancelled soon.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final

from arun.data.block import Block, Shaper
from arun.data.execution.frame import Frame
from arun.data.execution.plain import LimitRun, compiled
from arun.data.execution.statistics import StepStatistics
from arun.data.steps import BatchFunction, Drop, Limit, Rename, RowFunction, Select, Step

__all__ = ("PERIOD", "Program")

#: Seconds of work after which a thread looks up.
PERIOD: Final = 0.05
_FIRST_PIECE: Final = 1  # nobody knows yet how long a row takes


class Program:
    """Plain steps, ready to run. Not for several threads at a time.

    :param steps: in their order, at least one.
    :param block_rows: most rows of a piece that become Python objects.
    :param counters: of each step.
    :ivar label: for people.
    :ivar instant: whether it takes no time worth a hop into a thread.
    """

    def __init__(self, steps: Sequence[Step], block_rows: int, counters: Sequence[StepStatistics]) -> None:
        self._runs = [compiled(step, counter) for step, counter in zip(steps, counters, strict=True)]
        self._counters = counters
        self._limits = [run for run in self._runs if isinstance(run, LimitRun)]
        self._wants_rows = any(isinstance(step, RowFunction) for step in steps)
        many = [
            isinstance(step, BatchFunction) or (isinstance(step, RowFunction) and step.gives_many) for step in steps
        ]
        self._multiplies = any(many)
        # A limit after a step that may make several rows of one: nobody can tell how many rows it still needs.
        self._counts_rows = any(isinstance(run, LimitRun) and any(many[:at]) for at, run in enumerate(self._runs))
        self._block_rows = block_rows
        self._piece = min(_FIRST_PIECE, block_rows)
        functions = [step for step in steps if isinstance(step, RowFunction)]
        errors = {step.error_column for step in functions if step.on_error == "collect"}
        self._shaper = Shaper(steps[-1].label, texts=errors)
        self.label = " + ".join(step.label for step in steps)
        self.instant = all(isinstance(step, Select | Drop | Rename | Limit) for step in steps)

    @property
    def finished(self) -> bool:
        """Whether nothing more comes of it, whatever it were given."""
        return any(limit.left == 0 for limit in self._limits)

    def run(self, block: Block) -> Iterator[Block]:
        """The blocks that come of one, computed as they are asked for."""
        if not block.rows:
            # One that only tells what was dropped has no columns that a step could look at.
            yield self._run_piece(block) if block.batch.num_columns or not block.dropped else block
        offset = 0
        while offset < block.rows and not self.finished:
            size = block.whole(offset + self._size(block.rows - offset)) - offset
            piece = block if size == block.rows else block.slice(offset, size)
            offset += size
            began = time.perf_counter()
            yield self._run_piece(piece)
            if size == self._piece:
                took = time.perf_counter() - began
                if took < PERIOD / 4:
                    self._piece = min(self._piece * 4, self._block_rows)
                elif took > PERIOD:
                    self._piece = max(1, self._piece // 2)

    def _size(self, left: int) -> int:
        size = min(left, self._piece) if self._wants_rows else left
        for limit in self._limits:
            # No step is given a row that the limit might cut off: each call may cost money.
            size = min(size, 1 if self._counts_rows else max(1, limit.left))
        return size

    def _run_piece(self, block: Block) -> Block:
        frame = Frame(block.batch, block.origins)
        self._shaper.before = block.batch.schema
        for run, counter in zip(self._runs, self._counters, strict=True):
            began = time.perf_counter()
            counter.rows_in += len(frame)
            run(frame)
            counter.rows_out += len(frame)
            counter.seconds += time.perf_counter() - began
            if frame.rows_only and not len(frame):
                break  # what further steps would make of no rows nobody can tell, nor misses
        batch = frame.batch(self._shaper)
        if block.origins is None:
            return Block(batch)
        origins = frame.origins or ()
        gone = [] if len(origins) == len(block.origins) and not self._multiplies else _gone(block.origins, origins)
        return Block(batch, origins, [*block.dropped, *gone])


def _gone(before: Sequence[int], after: Sequence[int]) -> list[int]:
    left = set(after)
    return [origin for origin in before if origin not in left]
