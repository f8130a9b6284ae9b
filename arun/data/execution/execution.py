"""Execution: runs the stages of a physical plan, each in a task of its own, and hands their blocks to consumers.

::

    source + steps  ->  boundary  ->  sort  ->  boundary  ->  steps  ->  the consumer's own task
      one task                      one task                (pulled, no queue)

* A stage is an async generator, driven by one task (:func:`arun.hosting.drive`) from a boundary to a boundary. The
  stage that is asked for is driven by the consumer itself. No generator holds a task group: what must go on between
  two blocks, such as calls for rows, has its tasks in the execution's.
* A stage starts when somebody asks it for a block. An error goes downstream in-band, after the blocks that came before
  it, and out of the consumer. Then everything is cancelled, and its clean-up awaited.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import anyio
from anyio.abc import TaskGroup

from arun.data.block import Block
from arun.data.checkpoint.progress import Progress
from arun.data.execution.boundary import Boundary, Reader
from arun.data.execution.operators import operate
from arun.data.execution.output import Output
from arun.data.execution.statistics import StageStatistics, Statistics
from arun.data.logical import Node, Write
from arun.data.options import RunOptions
from arun.data.physical import PhysicalPlan, Stage
from arun.data.progress import watch
from arun.data.spill import SpillingQueue
from arun.hosting import GRACE, close, drive

__all__ = ("Consumer", "Execution")

#: Reads the blocks of one root, in its own time; its result is the run's.
Consumer: TypeAlias = Callable[[AsyncIterator[Block]], Awaitable[Any]]


class Execution:
    """One run of a physical plan.

    :param plan: what to run.
    :param progress: where a checkpoint is kept: what need not be done again. Rows then know their origins; see
        :mod:`arun.data.block`.
    :ivar group: has the tasks of stages and of what they start.
    """

    group: TaskGroup

    def __init__(self, plan: PhysicalPlan, options: RunOptions, *, progress: Progress | None = None) -> None:
        self.options = options
        self.progress = progress
        self._stages = [StageStatistics(stage.number, stage.name) for stage in plan.stages]
        self._began = time.perf_counter()
        self._plan = plan
        self._boundaries: dict[int, Boundary] = {}
        self._inputs: dict[int, list[Reader]] = {}
        self._operators: dict[int, Output] = {}
        for stage in plan.stages:
            self._add(stage)

    async def run(self, consumers: Sequence[Consumer]) -> list[Any]:
        """Run until every consumer has what it wants. In the caller's task, so its timeouts work.

        :param consumers: one for each root of the plan.
        :return: what they returned.
        :raises Exception: the first error of a consumer or of a stage that it reads; the others are cancelled.
        """
        results: list[Any] = [None] * len(consumers)
        failures: list[Exception] = []
        heads = [self._head(root, sink) for root, sink in zip(self._plan.roots, self._plan.sinks, strict=True)]

        async def consume(number: int) -> None:
            try:
                results[number] = await self._consume(heads[number], self._plan.roots[number], consumers[number])
            except Exception as exc:  # noqa: BLE001 - raised below: the group would wrap it
                failures.append(exc)
                self.group.cancel_scope.cancel()

        async with anyio.create_task_group() as self.group:
            if self.options.progress is not None:
                self.group.start_soon(watch, self.statistics, self.options.progress, name="arun dataset progress")
            if len(consumers) == 1:
                await consume(0)
            else:
                async with anyio.create_task_group() as readers:
                    for number in range(len(consumers)):
                        readers.start_soon(consume, number, name="arun dataset consumer")
            self.group.cancel_scope.cancel()
        if failures:
            raise failures[0]
        return results

    def limited(self, node: Node) -> bool:
        """Whether a limit may end a node before its inputs do."""
        return node.id in self._plan.limited

    def statistics(self) -> Statistics:
        """What it has done so far."""
        return Statistics(tuple(self._stages), time.perf_counter() - self._began)

    def _add(self, stage: Stage) -> None:
        readers: list[Reader] = []
        statistics = self._stages[stage.number]

        def read(node_id: int) -> Reader:
            reader = self._boundaries[stage.inputs[node_id].number].reader(statistics)
            readers.append(reader)
            return reader

        self._inputs[stage.number] = readers
        self._operators[stage.number] = Output(operate(stage.top, read, self, statistics), statistics)

        def start() -> None:
            self.group.start_soon(self._host, stage, name=f"arun dataset {stage.name:.60}")

        async def abandon() -> None:
            await self._leave(stage)

        options = self.options
        folder = options.folder
        spill = SpillingQueue(memory=options.queue_bytes, folder=folder) if stage.apart else None
        self._boundaries[stage.number] = Boundary(
            options.queue_blocks, options.queue_bytes, statistics, start, abandon, spill=spill
        )

    def _head(self, root: Stage, sink: Write | None) -> AsyncIterator[Block]:
        """What the consumer of a root reads: the operator itself, if nobody else does.

        A sink writes while the next block is computed, so it has a queue before it.
        """
        if root.readers == 1 and sink is None:
            return self._operators[root.number]
        return self._boundaries[root.number].reader(None)

    async def _consume(self, head: AsyncIterator[Block], root: Stage, consumer: Consumer) -> Any:
        try:
            return await consumer(head)
        finally:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
                await close(head)
                if not isinstance(head, Reader):
                    await self._leave(root)

    async def _host(self, stage: Stage) -> None:
        boundary = self._boundaries[stage.number]
        error: Exception | None = None
        try:
            with boundary.scope:
                await drive(self._operators[stage.number], boundary.put)
        except Exception as exc:  # noqa: BLE001 - travels in-band to whoever reads the stage
            error = exc
        finally:
            with anyio.CancelScope(shield=True):
                await self._leave(stage)
            boundary.end(error)

    async def _leave(self, stage: Stage) -> None:
        await self._operators[stage.number].aclose()
        for reader in self._inputs[stage.number]:
            await reader.aclose()
