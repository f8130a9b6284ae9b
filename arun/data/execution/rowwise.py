"""Row by row: steps whose function is async, or is to be called for many rows at a time.

The rows of the blocks become subtasks of one fan-out. A block is made of whatever rows have ended when somebody wants
one, so a slow row never holds up others; only where order is kept are those after it handed on later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio

from arun.data.block import Block, Row, Shaper, row_dicts
from arun.data.engines import ActorCall, OpenActors
from arun.data.execution.fan import fan
from arun.data.execution.plain import Failure, listed, rows_of, tell_failure
from arun.data.execution.statistics import StepStatistics
from arun.data.steps import RowFunction
from arun.handles import Handle
from arun.hosting import GRACE, close
from arun.logs import get_logger
from arun.policies import Policy
from arun.threads import run_in_thread

if TYPE_CHECKING:
    from arun.data.execution.execution import Execution

__all__ = ("Spec", "Specs", "rowwise")

log = get_logger("arun.data")

#: Rows of a block that are Python objects before they are subtasks.
_SLICE: Final = 256
#: Rows among which those with a common beginning are looked for.
_WINDOW: Final = 1024


class Spec(NamedTuple):
    """One row of a fan-out."""

    #: in what came in, from 0
    number: int
    row: Row
    origin: int | None


async def rowwise(
    blocks: AsyncIterator[Block], steps: Sequence[RowFunction], counters: Sequence[StepStatistics], execution: Execution
) -> AsyncGenerator[Block]:
    """What the steps of one segment make of the rows of blocks."""
    first = steps[0]
    opened = [await step.function.open() if isinstance(step.function, ActorCall) else None for step in steps]
    calls = [_Call(step, actors, counter) for step, actors, counter in zip(steps, opened, counters, strict=True)]
    errors = {step.error_column for step in steps if step.on_error == "collect"}
    same = not errors and all(step.operation == "filter" for step in steps)
    shaper = Shaper(steps[-1].label, steps[-1].schema, errors, same=same)
    rows = _Rows(blocks, first, shaper)

    async def work(handle: Handle[list[Row]]) -> list[Row]:
        spec: Spec = handle.spec
        found = [spec.row]
        handle.describe = lambda: f"row {spec.number}"
        number: int | None = spec.number
        for call in calls:
            found = await call(found, number)
            if not call.keeps_rows:
                number = None
        return found

    limit = first.concurrency or getattr(first.function, "batch_limit", None) or Policy().limit
    name = " + ".join(step.label for step in steps)
    ordered = first.ordered and first.prefix is None
    done = fan(rows.each, work, execution, limit=limit, ordered=ordered, name=name)
    try:
        async for handles in done:
            block = rows.block(rows.in_order(handles) if first.ordered and first.prefix else handles)
            del handles
            if block is not None:
                yield block
        if rows.dropped:
            yield Block(shaper.batch([]), [], rows.dropped)
    finally:
        with anyio.CancelScope(shield=True):
            await close(done)
            for actors in opened:
                if actors is not None:
                    await actors.aclose()


class Specs:
    """The rows of blocks on their way into a fan-out.

    :param shaper: makes blocks of what comes out.
    :ivar dropped: origins that have ended without a row, and are not yet handed on.
    """

    def __init__(self, blocks: AsyncIterator[Block], first: RowFunction, shaper: Shaper) -> None:
        self.dropped: list[int] = []
        self._blocks = blocks
        self._shaper = shaper
        self._prefix = first.prefix
        self._given = 0

    async def each(self) -> AsyncGenerator[Spec]:
        """One for each row."""
        size = _SLICE if self._prefix is None else _WINDOW
        try:
            async for block in self._blocks:
                self.dropped.extend(block.dropped)
                self._shaper.before = block.batch.schema
                self._begin(block.origins)
                for offset in range(0, block.rows, size):
                    piece = block.slice(offset, size)
                    origins: Sequence[int | None] = piece.origins or [None] * piece.rows
                    numbers = range(self._given, self._given + piece.rows)
                    specs = list(map(Spec, numbers, row_dicts(piece.batch), origins))
                    self._given += len(specs)
                    if self._prefix is not None:
                        prefix = self._prefix
                        specs.sort(key=lambda spec: prefix(spec.row))
                        await self._wait_for_window()
                    for spec in specs:
                        yield spec
        finally:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
                await close(self._blocks)

    def _begin(self, origins: Sequence[int] | None) -> None:
        """Rows of these origins come."""

    async def _wait_for_window(self) -> None:
        """Wait until there is room for one more window."""


class _Rows(Specs):
    """The rows of blocks on their way into and out of a fan-out."""

    def __init__(self, blocks: AsyncIterator[Block], first: RowFunction, shaper: Shaper) -> None:
        super().__init__(blocks, first, shaper)
        self._bounded = first.ordered and first.prefix is not None
        self._taken = 0
        self._early: dict[int, Handle[list[Row]]] = {}
        self._room: anyio.Event | None = None
        #: of origins that have several rows: how many are still at work, and what has come of the others
        self._at_work: dict[int, int] = {}
        self._held: dict[int, list[Row]] = {}

    def in_order(self, handles: list[Handle[list[Row]]]) -> list[Handle[list[Row]]]:
        """Of these and of those that came early, what may be handed on now, in order."""
        for handle in handles:
            self._early[handle.spec.number] = handle
        following: list[Handle[list[Row]]] = []
        while self._taken in self._early:
            following.append(self._early.pop(self._taken))
            self._taken += 1
        if self._room is not None:
            self._room.set()
        return following

    def block(self, handles: list[Handle[list[Row]]]) -> Block | None:
        """A block of what has come of some rows."""
        rows: list[Row] = []
        origins: list[int] = []
        traced = False
        for handle in handles:
            result: list[Row] = handle.outcome_now.value  # type: ignore[union-attr]  # errors are not handed on
            origin = handle.spec.origin
            if origin in self._at_work and not self._is_last(origin, result):
                continue
            rows += result
            if origin is not None:
                traced = True
                if result:
                    origins += [origin] * len(result)
                else:
                    self.dropped.append(origin)
        if not rows:
            return None
        dropped, self.dropped = self.dropped, []
        return Block(self._shaper.batch(rows), origins if traced else None, dropped)

    def _begin(self, origins: Sequence[int] | None) -> None:
        if origins is not None and not isinstance(origins, range):
            self._at_work.update((origin, rows) for origin, rows in Counter(origins).items() if rows > 1)

    def _is_last(self, origin: int, result: list[Row]) -> bool:
        """Whether all rows of an origin have ended; then ``result`` is what has come of all of them."""
        held = self._held.setdefault(origin, [])
        held += result
        self._at_work[origin] -= 1
        if self._at_work[origin]:
            return False
        del self._at_work[origin]
        result[:] = self._held.pop(origin)
        return True

    async def _wait_for_window(self) -> None:
        # What came early waits in memory: no more than two windows of it.
        while self._bounded and self._given - self._taken > 2 * _WINDOW:
            self._room = anyio.Event()
            await self._room.wait()
        self._room = None


class _Call:
    """A user's function, called for one row."""

    def __init__(self, step: RowFunction, opened: OpenActors | None, counter: StepStatistics) -> None:
        self._step = step
        self._counter = counter
        self._kind = step.kind
        self.keeps_rows = step.operation != "filter" and not step.gives_many and step.on_error != "skip"
        self._function: Callable[[Row], Any] = opened or step.function
        if step.gives_many and "async" not in step.kind:
            self._function = listed(step.function)

    async def __call__(self, rows: list[Row], given: int | None) -> list[Row]:
        """:param given: number of the only row in what the step is given; None where it is as good as any."""
        step, counter = self._step, self._counter
        found: list[Row] = []
        for row in rows:
            number = counter.rows_in if given is None else given
            counter.rows_in += 1
            counter.begin()
            began = time.perf_counter()
            try:
                result = await self._attempts(row)
            except Exception as exc:  # noqa: BLE001 - what becomes of it is the step's to say
                result = tell_failure(step, counter, number, row, exc)
            finally:
                counter.in_flight -= 1
                counter.seconds += time.perf_counter() - began
            found += rows_of(step, row, result)
        counter.rows_out += len(found)
        return found

    async def _attempts(self, row: Row) -> Any:
        retry = self._step.retry
        if retry is None:
            return await self._result(row)
        for attempt in count(1):
            try:
                return await self._result(dict(row))
            except Exception as exc:
                if attempt >= retry.attempts or not retry.applies(exc):
                    if attempt > 1:
                        exc.add_note(f"in attempt {attempt} of {attempt}")
                    raise
                log.info("row.retried", step=self._step.label, attempt=attempt, error=repr(exc))
            self._counter.retried += 1
            await anyio.sleep(retry.wait(attempt))

    async def _result(self, row: Row) -> Any:
        step = self._step
        if step.on_error == "collect" and row.get(step.error_column) is not None:
            return Failure("")
        match self._kind:
            case "coroutine":
                return await self._function(row)
            case "async generator":
                async with aclosing(self._function(row)) as rows:
                    return [one async for one in rows]
            case _:
                return await run_in_thread(partial(self._function, row), label=step.label)
