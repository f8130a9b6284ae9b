"""Split: one run that several consumers share, each in its own time.

::

                  +-> pull -> consumer 0
    run -> deal --+-> pull -> consumer 1        a run begins with the first pull, and is shared by each consumer's
                  +-> pull -> consumer 2        n-th iteration

By default the next block goes to whoever pulls (work sharing). A block is done when its consumer pulls again; that of a
consumer that leaves, or dies, goes to another one: every block is done at least once, and the end comes when all are.
With ``equal`` or ``by`` it is settled beforehand who gets which rows, and what a slower consumer has not fetched yet
waits in memory or on disk.

``Handout`` is the protocol of work sharing as a plain state machine; nothing in it waits, or knows what a block is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import anyio
import pyarrow as pa
import pyarrow.compute as pc

from arun.data.barriers.columns import existing
from arun.data.block import joined
from arun.data.shared import Blocks, Turns
from arun.data.spill import SpillingQueue
from arun.errors import MisuseError
from arun.threads import run_in_thread

__all__ = ("Handout", "Part", "SplitRun", "Splits")

T = TypeVar("T")


class Handout(Generic[T]):
    """Who gets which block: work sharing between ``consumers``, numbered from 0.

    ::

        pull(consumer)    what it holds is done, and it waits
        offer(block)      the run has given a block
        end()             the run gives no more
        leave(consumer)   it pulls no more; what it holds, or was about to get, goes to another one
        answers()         who gets what now: a block, or None: the end

    :ivar held: the block that each consumer works on.
    """

    def __init__(self, consumers: int) -> None:
        self.held: dict[int, T] = {}
        self._there = set(range(consumers))
        self._waiting: dict[int, None] = {}
        self._ready: deque[T] = deque()
        self._ended = False

    @property
    def hungry(self) -> bool:
        """Whether somebody waits for a block that only the run can give."""
        return bool(self._waiting) and not self._ready and not self._ended

    @property
    def deserted(self) -> bool:
        """Whether every consumer has left, or has seen the end."""
        return not self._there

    def expects(self, consumer: int) -> bool:
        """Whether a consumer has neither left nor seen the end."""
        return consumer in self._there

    def pull(self, consumer: int) -> None:
        """Done with one, waits for the next."""
        self.held.pop(consumer, None)
        if consumer in self._there:
            self._waiting[consumer] = None

    def offer(self, block: T) -> None:
        """One more to hand out."""
        self._ready.append(block)

    def end(self) -> None:
        """No more are offered."""
        self._ended = True

    def leave(self, consumer: int) -> None:
        """It will not pull again."""
        self._there.discard(consumer)
        self._waiting.pop(consumer, None)
        if consumer in self.held:
            self._ready.appendleft(self.held.pop(consumer))

    def answers(self) -> list[tuple[int, T | None]]:
        """Who waits no longer. A block that is given is held; a consumer that is given the end has left."""
        given: list[tuple[int, T | None]] = []
        while self._waiting and self._ready:
            consumer = next(iter(self._waiting))
            del self._waiting[consumer]
            self.held[consumer] = block = self._ready.popleft()
            given.append((consumer, block))
        # While somebody works on a block it may come back.
        if self._ended and not self._ready and not self.held:
            given += [(consumer, None) for consumer in self._waiting]
            self._there -= self._waiting.keys()
            self._waiting.clear()
        return given


class SplitRun(Protocol):
    """One shared run.

    :ivar deserted: whether every consumer has left, or has seen the end.
    """

    @property
    def deserted(self) -> bool: ...

    async def pull(self, consumer: int) -> pa.RecordBatch | None:
        """The next block of a consumer; None at the end. Cancelled, it loses none."""
        ...

    async def leave(self, consumer: int) -> None:
        """The consumer pulls no more. When all have left, the run is cancelled."""


class Splits:
    """Shared runs, as many as a consumer has iterations.

    :param open: begins a run.
    :param consumers: at least 1.
    :param equal: whether all get as many rows; the less than ``consumers`` that are over at the end are left out.
    :param by: columns; rows that have the same values in them go to the same consumer.
    :param memory: bytes of each run that wait in memory before they do on disk, with ``equal`` and ``by``.
    :param most: bytes of a block; larger ones are cut into several.
    """

    def __init__(
        self,
        open: Callable[[], Blocks],
        consumers: int,
        *,
        equal: bool = False,
        by: str | Sequence[str] = (),
        memory: int,
        folder: str | None = None,
        most: int | None = None,
    ) -> None:
        keys = (by,) if isinstance(by, str) else tuple(by)
        if not isinstance(consumers, int) or consumers < 1:  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"split({consumers!r}): into at least 1, a whole number")
        if equal and keys:
            raise MisuseError(f"split(equal=True, by={by!r}): keys need not have as many rows; give one of them")
        self.consumers = consumers
        self._open = open if most is None else lambda: _InPieces(open(), most)
        self._equal, self._keys = equal, keys
        self._memory, self._folder = memory, folder
        self._iterations = [0] * consumers
        self._runs: dict[int, SplitRun] = {}

    def parts(self) -> tuple[Part, ...]:
        """One for each consumer."""
        return tuple(Part(self, consumer) for consumer in range(self.consumers))

    def begin(self, consumer: int) -> int:
        """Number of the run that a consumer's next iteration shares."""
        number = self._iterations[consumer]
        self._iterations[consumer] += 1
        self._runs.setdefault(number, self._run())
        return number

    async def pull(self, number: int, consumer: int) -> pa.RecordBatch | None:
        """See :meth:`SplitRun.pull`."""
        run = self._runs.get(number)
        return None if run is None else await run.pull(consumer)

    async def leave(self, number: int, consumer: int) -> None:
        """See :meth:`SplitRun.leave`."""
        run = self._runs.get(number)
        if run is not None:
            await run.leave(consumer)
            if run.deserted:
                self._runs.pop(number, None)

    async def aclose(self) -> None:
        """End all runs."""
        for number in tuple(self._runs):
            for consumer in range(self.consumers):
                await self.leave(number, consumer)

    def _run(self) -> SplitRun:
        if not self._equal and not self._keys:
            return _Shared(self.consumers, self._open)
        deal = _ByKeys(self.consumers, self._keys) if self._keys else _Equally(self.consumers)
        return _Dealt(self.consumers, self._open, deal, self._memory, self._folder)


class _InPieces:
    """Blocks of at most so many bytes."""

    def __init__(self, blocks: Blocks, most: int) -> None:
        self._blocks = blocks
        self._most = most
        self._waiting: deque[pa.RecordBatch] = deque()

    def __aiter__(self) -> AsyncIterator[pa.RecordBatch]:
        return self

    async def __anext__(self) -> pa.RecordBatch:
        while not self._waiting:
            block = await anext(self._blocks)
            rows = max(len(block) * self._most // max(block.nbytes, 1), 1)
            self._waiting.extend(block.slice(start, rows) for start in range(0, len(block), rows))
        return self._waiting.popleft()

    async def aclose(self) -> None:
        await self._blocks.aclose()


class Part:
    """The blocks of one consumer: called for an iteration of them."""

    on_demand = True

    def __init__(self, splits: Splits, consumer: int) -> None:
        self.__name__ = f"split {consumer + 1} of {splits.consumers}"
        self._splits = splits
        self._consumer = consumer

    async def __call__(self) -> AsyncGenerator[pa.RecordBatch, None]:
        number = self._splits.begin(self._consumer)
        try:
            while (block := await self._splits.pull(number, self._consumer)) is not None:
                yield block
        finally:
            with anyio.CancelScope(shield=True):
                await self._splits.leave(number, self._consumer)

    def __reduce__(self) -> NoReturn:
        raise MisuseError(
            f"{self.__name__} shares a run of this process, and can't be sent to another one; to read it there, split "
            "on a cluster: `await actors.split.split(dataset, n, cluster=cluster)`"
        )


class _Shared:
    """The next block goes to whoever pulls."""

    def __init__(self, consumers: int, open: Callable[[], Blocks]) -> None:
        self._handout: Handout[pa.RecordBatch] = Handout(consumers)
        self._turns = Turns(open, self._take)
        self._answers: dict[int, pa.RecordBatch | None] = {}
        self._changed = anyio.Event()

    @property
    def deserted(self) -> bool:
        return self._handout.deserted

    async def pull(self, consumer: int) -> pa.RecordBatch | None:
        self._turns.check_loop()
        if consumer not in self._answers:  # else it was cancelled while it waited, and this has come for it since
            self._handout.pull(consumer)
            self._answer()
        while consumer not in self._answers:
            if not self._handout.expects(consumer):
                return None
            if self._handout.hungry and not self._turns.taken:
                try:
                    await self._turns.take_one()
                finally:
                    self._tell()
            else:
                await self._changed.wait()
        return self._answers.pop(consumer)

    async def leave(self, consumer: int) -> None:
        self._answers.pop(consumer, None)
        self._handout.leave(consumer)
        self._answer()
        if self._handout.deserted:
            await self._turns.aclose()

    async def _take(self, block: pa.RecordBatch | None) -> None:
        if block is None:
            self._handout.end()
        else:
            self._handout.offer(block)
        self._answer()

    def _answer(self) -> None:
        self._answers.update(self._handout.answers())
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class _Dealt:
    """Who gets which rows is settled; those that a consumer has not fetched yet wait for it."""

    def __init__(
        self,
        consumers: int,
        open: Callable[[], Blocks],
        deal: Callable[[pa.RecordBatch], list[pa.RecordBatch]],
        memory: int,
        folder: str | None,
    ) -> None:
        self._queues = [SpillingQueue(memory=memory // consumers, folder=folder) for _ in range(consumers)]
        self._readers = [queue.reader() for queue in self._queues]
        self._turns = Turns(open, self._take)
        self._deal = deal
        self._left: set[int] = set()

    @property
    def deserted(self) -> bool:
        return len(self._left) == len(self._queues)

    async def pull(self, consumer: int) -> pa.RecordBatch | None:
        self._turns.check_loop()
        reader = self._readers[consumer]
        while not reader.ready:
            await self._turns.take_one()
        return await anext(reader, None)

    async def leave(self, consumer: int) -> None:
        self._left.add(consumer)
        await self._readers[consumer].aclose()
        if self.deserted:
            await self._turns.aclose()
            for queue in self._queues:
                queue.release()

    async def _take(self, block: pa.RecordBatch | None) -> None:
        if block is None:
            for queue in self._queues:
                queue.end()
            return
        for queue, rows in zip(self._queues, await run_in_thread(lambda: self._deal(block)), strict=True):
            if len(rows):
                await queue.put(rows)


class _Equally:
    """Cuts each block into as many rows for everybody; what is over goes before the next block."""

    def __init__(self, consumers: int) -> None:
        self._consumers = consumers
        self._over: pa.RecordBatch | None = None

    def __call__(self, block: pa.RecordBatch) -> list[pa.RecordBatch]:
        if self._over is not None and len(self._over):
            block = joined([self._over, block])
        share = len(block) // self._consumers
        self._over = block.slice(share * self._consumers)
        return [block.slice(share * consumer, share) for consumer in range(self._consumers)]


class _ByKeys:
    """Gives rows by what is in some columns."""

    def __init__(self, consumers: int, keys: Sequence[str]) -> None:
        self._consumers = consumers
        self._keys = keys

    def __call__(self, block: pa.RecordBatch) -> list[pa.RecordBatch]:
        existing(self._keys, block.schema, f"split by {', '.join(self._keys)}")
        values = zip(*(block.column(key).to_pylist() for key in self._keys), strict=True)
        numbers = pa.array([hash(_hashable(value)) % self._consumers for value in values], pa.int32())
        return [block.filter(pc.call_function("equal", [numbers, n])) for n in range(self._consumers)]


def _hashable(value: Any) -> Any:
    """Something with a hash that is the same for equal values."""
    if isinstance(value, float) and math.isnan(value):
        return None  # each NaN has a hash of its own
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(inner)) for key, inner in value.items())
    return value
