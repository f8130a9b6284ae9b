"""The worker's side of a RayExecutor: an actor whose one method runs one subtask."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

from actors.actor import actor
from actors.on_ray.attached_pools import attached_pool, start_attached
from actors.on_ray.code_table import Library
from actors.ray_cluster import RayCluster
from arun.executors.execution import Execution
from arun.executors.failures import failure_of
from arun.executors.messages import Answer, Order

__all__ = ("ExecutorWorker",)


@actor()
class ExecutorWorker:
    """Runs the subtasks of a :class:`~actors.executor.RayExecutor`, one at a time, and keeps the code that they need.

    :param sys_path: the parent's, so that a worker on its machine finds the modules that it finds.
    :param settings: of the parent's cluster, TLS among them, as ``RayCluster.connect()`` takes them.
    """

    def __init__(self, sys_path: list[str], settings: dict[str, Any]) -> None:
        sys.path.extend(entry for entry in sys_path if entry not in sys.path)
        self._library = Library()
        self._settings = settings
        self._cluster: RayCluster | None = None

    async def run(self, order: Order) -> AsyncIterator[Answer]:
        """Run one subtask: its events as they come, last how it ended."""
        try:
            await self._library.fetch(order.code)
            attached = {name: await self._attach(*known) for name, known in order.attach.items()}
        except Exception as exc:  # noqa: BLE001 - whatever unpickling or attaching raises, the parent raises it
            yield failure_of(exc)
            return
        execution = Execution(order, self._library.find, attached)
        try:
            async for answer in execution:
                yield answer
        finally:
            await execution.aclose()

    async def on_stop(self) -> None:
        if self._cluster is not None:
            await self._cluster.aclose()

    async def _attach(self, kind: str, name: str) -> Any:
        """The detached pool or actor of that name, which this process stays attached to."""
        if kind == "pool":
            pool = attached_pool(name, self._settings)
            await start_attached()
            return pool
        if self._cluster is None:
            self._cluster = RayCluster.connect(**self._settings)
            await self._cluster.start()
        return await self._cluster.get(name)
