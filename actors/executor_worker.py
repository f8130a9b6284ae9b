"""The worker's side of a RayExecutor: an actor whose one method runs one subtask."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

from actors.actor import actor
from actors.code_table import Library
from arun.executors.execution import Execution
from arun.executors.failures import failure_of
from arun.executors.messages import Answer, Order

__all__ = ("ExecutorWorker",)


@actor()
class ExecutorWorker:
    """Runs the subtasks of a :class:`~actors.executor.RayExecutor`, one at a time, and keeps the code that they need.

    :param sys_path: the parent's, so that a worker on its machine finds the modules that it finds.
    """

    def __init__(self, sys_path: list[str]) -> None:
        sys.path.extend(entry for entry in sys_path if entry not in sys.path)
        self._library = Library()

    async def run(self, order: Order) -> AsyncIterator[Answer]:
        """Run one subtask: its events as they come, last how it ended."""
        try:
            await self._library.fetch(order.code)
        except Exception as exc:  # noqa: BLE001 - whatever unpickling raises, the parent raises it
            yield failure_of(exc)
            return
        execution = Execution(order, self._library.find)
        try:
            async for answer in execution:
                yield answer
        finally:
            await execution.aclose()
