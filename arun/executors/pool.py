"""Workers as an executor sees them: a pool that starts them on demand, reuses them and ends them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio

from arun.channel import Stream
from arun.errors import MisuseError, WorkerDied
from arun.executors.messages import Order
from arun.runtime import Background, Runtime

__all__ = ("Pool", "Worker")


class Worker(Protocol):
    """A process that runs one subtask at a time."""

    @property
    def pid(self) -> int: ...

    @property
    def usable(self) -> bool:
        """Whether it lives and can be reached."""
        ...

    def open(self, order: Order) -> Stream[Any]:
        """Start a subtask; the items are Answers."""
        ...

    async def settle(self, stream: Stream[Any], deadline: float) -> None:
        """End a subtask: cancel it and wait for its clean-up, or, after the deadline, kill the worker."""
        ...

    async def death(self, when: str, grace: float) -> WorkerDied:
        """The error for a worker whose connection was lost; it is ended, if it lives yet.

        :param when: what it was doing.
        """
        ...

    async def stop(self, grace: float) -> None:
        """Let it clean up and exit, or, after the grace, kill it. Idempotent."""
        ...


class Pool:
    """At most so many workers of one event loop, owned by its Runtime: they end with it, or with :meth:`aclose`.

    :param size: most workers.
    :param grace: seconds that a cancelled subtask, and a worker that is asked to end, may take.
    :param start: starts a worker; returns when it is ready for its first subtask.
    :param owner: the name of the executor's class, for messages.
    """

    def __init__(self, size: int, grace: float, start: Callable[[], Awaitable[Worker]], owner: str) -> None:
        self.grace = grace
        self.owner = owner
        self._start = start
        self._slots = anyio.Semaphore(size, fast_acquire=True)
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._life: Background[None] = Runtime.current().start(self._live, name=f"workers of {owner}")

    @property
    def ended(self) -> bool:
        """Whether it has been closed, by the Runtime's end or by :meth:`aclose`."""
        return self._life.cancelling or self._life.done

    @property
    def pids(self) -> list[int]:
        """Of the workers that live."""
        return [worker.pid for worker in self._all if worker.usable]

    async def take(self) -> Worker:
        """A worker that nobody else uses; waits until there is one. :meth:`give_back` it."""
        await self._slots.acquire()
        try:
            while self._idle:
                worker = self._idle.pop()
                if worker.usable:
                    return worker
                await self._bury(worker)
            self._refuse_ended()
            worker = await self._start()
            if self.ended:
                with anyio.CancelScope(shield=True):
                    await worker.stop(self.grace)
                self._refuse_ended()
        except BaseException:
            self._slots.release()
            raise
        self._all.add(worker)
        return worker

    def give_back(self, worker: Worker) -> None:
        """Make a worker free for the next subtask."""
        if not self.ended:
            self._idle.append(worker)  # also one that is dead: it is buried when it would be taken
        self._slots.release()

    async def aclose(self) -> None:
        """End all workers and wait for that; subtasks that still run are cancelled."""
        self._life.cancel()
        with anyio.CancelScope(shield=True):
            await self._life.ended()

    def _refuse_ended(self) -> None:
        if self.ended:
            raise MisuseError(f"the {self.owner} was closed while a subtask waited for a worker of it")

    async def _bury(self, worker: Worker) -> None:
        await worker.stop(self.grace)
        self._all.discard(worker)

    async def _live(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    for worker in self._all:
                        tasks.start_soon(worker.stop, self.grace)
            self._idle.clear()
