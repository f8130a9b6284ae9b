"""ProcessExecutor: subtasks in a pool of other Python processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

from anyio.lowlevel import RunVar

from arun.actions import Action, within
from arun.context import ApplicationContext
from arun.errors import MisuseError
from arun.executors.orders import order_of, run_order
from arun.executors.pool import Pool
from arun.executors.references import refer_to
from arun.executors.worker_process import WorkerProcess
from arun.hosting import GRACE
from arun.state import State

__all__ = ("ProcessExecutor",)


class ProcessExecutor:
    """Runs subtasks in other Python processes, one subtask a process at a time.

    A process is a fresh interpreter, never a fork. Processes are started when they are needed, reused, and replaced
    when they die; whatever they print goes to this program's stdout and stderr. They end with ``async with executor:``,
    with ``aclose()``, with the :class:`~arun.Runtime` that they were started in (on asyncio: with the event loop), and
    with this program, however it ends.

    What crosses: the action by the name under which its module has it (with bound arguments), the keys of the State
    that it may read, its inputs, items and partial States as they come, and what it wrote. What does not: closures and
    lambdas, which are refused; resources; contextvars. Values are written by :mod:`arun.codec`. A RunnableGraph runs in
    one process as a whole; a parallel action stays here, and its subtasks go to processes.

    An action of the program's main module works, too: a process imports that module under the name ``__mp_main__``, as
    ``multiprocessing`` does, so what the program does at its start stands below ``if __name__ == "__main__":``.

    A cancelled async action or generator may clean up; a plain function is killed with its process. If a process dies,
    its subtask fails with :class:`~arun.errors.WorkerDied`.

    :param processes: most processes at once; by default one a CPU. Subtasks beyond it wait.
    :param grace: seconds that a cancelled subtask may clean up, and a process that is to end, before it is killed.
    """

    def __init__(self, processes: int | None = None, *, grace: float = GRACE) -> None:
        if processes is not None and processes < 1:
            raise MisuseError(f"ProcessExecutor(processes={processes}): at least 1, or None for one a CPU")
        self.processes = processes or os.cpu_count() or 1
        self.grace = grace
        self._closed = False
        self._pool: RunVar[Pool | None] = RunVar("arun worker processes", None)

    def __repr__(self) -> str:
        return f"<ProcessExecutor of {self.processes}{', closed' if self._closed else ''}>"

    @property
    def pids(self) -> list[int]:
        """The processes that live, of this event loop."""
        pool = self._pool.get()
        return [] if pool is None else pool.pids

    def check(self, action: Action) -> None:
        """:raises MisuseError: for an action that a process can't import, such as a closure or a lambda."""
        refer_to(action)

    async def run(
        self, action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext
    ) -> tuple[Any, State]:
        """See :meth:`Executor.run`.

        :raises MisuseError: the action or a value that it needs can't cross; says which, and what to do.
        :raises WorkerDied: its process ended.
        """
        if context.capacities:  # an action that is more than a leaf counts as one, too: it has a process of its own
            call = partial(self._run, action, state, inputs, context)
            return await within(context.capacities, action, call)
        return await self._run(action, state, inputs, context)

    async def aclose(self) -> None:
        """End all processes of this event loop, and wait for that. It can't be used again."""
        self._closed = True
        pool = self._pool.get()
        if pool is not None:
            await pool.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _run(
        self, action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext
    ) -> tuple[Any, State]:
        order = order_of(action, refer_to(action), state, inputs, context)
        return await run_order(self._current_pool(), order, state, context)

    def _current_pool(self) -> Pool:
        if self._closed:
            raise MisuseError("this ProcessExecutor is closed; make another one, or close it later")
        pool = self._pool.get()
        if pool is None or pool.ended:
            pool = Pool(self.processes, self.grace, partial(WorkerProcess.start, self.grace), "ProcessExecutor")
            self._pool.set(pool)
        return pool
