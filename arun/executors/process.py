"""ProcessExecutor: subtasks in a pool of other Python processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Self, get_args

import anyio
from anyio.lowlevel import RunVar

from arun.actions import Action, FunctionAction, within
from arun.channel import Stream
from arun.codec import decode
from arun.context import ApplicationContext
from arun.errors import ChannelLost, MisuseError, RemoteError
from arun.events import Event
from arun.executors.failures import raise_failure
from arun.executors.local import function_of
from arun.executors.messages import Answer, Beat, Emitted, Failure, Order, Success
from arun.executors.pool import Pool, Worker
from arun.executors.references import encode_values, refer_to
from arun.hosting import GRACE
from arun.parallel import RunnableGraph
from arun.signatures import Parameters
from arun.state import State

__all__ = ("ProcessExecutor",)

_EVENTS: Final = {kind.__name__: kind for kind in get_args(Event)}


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
        order = _order(action, state, inputs, context)
        pool = self._current_pool()
        worker = await pool.take()
        try:
            success = await self._follow(pool, worker, order, context)
        finally:
            pool.give_back(worker)
        result = decode(success.result)["result"]
        changes = state.scoped(None).merge(decode(success.written))
        return result, changes.wipe(delete=success.deleted) if success.deleted else changes

    def _current_pool(self) -> Pool:
        if self._closed:
            raise MisuseError("this ProcessExecutor is closed; make another one, or close it later")
        pool = self._pool.get()
        if pool is None or pool.ended:
            pool = Pool(self.processes, self.grace)
            self._pool.set(pool)
        return pool

    async def _follow(self, pool: Pool, worker: Worker, order: Order, context: ApplicationContext) -> Success:
        """Run an order on a worker; on the way out the worker is free again, or dead."""
        stream: Stream[Answer] | None = None
        final: Success | Failure | None = None
        try:
            stream = worker.open(order)
            async for answer in stream:
                if isinstance(answer, Emitted):
                    await context.run.emit(
                        _EVENTS[answer.kind],
                        action=answer.action,
                        path=answer.path,
                        attempt=answer.attempt,
                        **decode(answer.fields),
                    )
                elif isinstance(answer, Beat):
                    for beat in context.beats:
                        beat()
                else:
                    final = answer
        except ChannelLost as exc:
            if pool.ended:
                raise MisuseError(f"the ProcessExecutor was closed while {context.label} ran in it") from exc
            with anyio.CancelScope(shield=True):
                raise await worker.death(f"while it ran {context.label}", self.grace) from exc
        except BaseException:
            if stream is not None:
                await _settle(worker, stream, self.grace)  # noqa: ASYNC102 - it shields, and has a deadline
            raise
        if isinstance(final, Failure):
            raise_failure(final, worker.pid)
        if not isinstance(final, Success):
            raise RemoteError("WorkerLost", f"worker process {worker.pid} gave no result of {context.label}")
        return final


async def _settle(worker: Worker, stream: Stream[Answer], grace: float) -> None:
    """Wait until a subtask has cleaned up, whoever cancels that: asyncio's own cancellation goes through shields."""
    deadline = anyio.current_time() + grace
    cancelled: BaseException | None = None
    settled = False
    while not settled:
        try:
            with anyio.CancelScope(shield=True):
                await worker.settle(stream, deadline)
            settled = True
        except anyio.get_cancelled_exc_class() as exc:  # noqa: ASYNC103 - raised below
            cancelled = exc
    if cancelled is not None:
        raise cancelled


def _order(action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext) -> Order:
    name = action.display_name
    keys = _keys(action)
    whole = state.scoped(None)
    readable = whole if keys is None else {key: whole[key] for key in keys if key in whole}
    run_inputs = context.inputs
    if not (action.takes_any_input or _wants_context(action)):
        required, optional = action.input_names
        run_inputs = {key: value for key, value in run_inputs.items() if key in required or key in optional}
    return Order(
        refer_to(action),
        encode_values(readable, lambda key: f"state[{key!r}], which action {name!r} may read,"),
        encode_values(inputs, lambda key: f"the input {key!r} of action {name!r}"),
        encode_values(run_inputs, lambda key: f"the input {key!r} of action {name!r}"),
        list(context.resources),
        context.app_id,
        context.partition_key,
        context.sequence_id,
        context.action_name,
        context.path,
        context.attempt,
        context.run.listening,
        bool(context.beats),
        context.checks,
    )


def _keys(action: Action) -> frozenset[str] | None:
    """The keys of the State that an action may read, or its conditions; None where that can be any."""
    if action.takes_any_input:  # there is a parallel action in it, whose subtasks read what they declare
        return None
    keys = action.scope.readable
    if isinstance(action, RunnableGraph):
        for transition in action.graph.transitions:
            needed = transition.condition.needed_keys
            if needed is None:
                return None
            keys |= needed
        for part in action.parts:
            more = _keys(part)
            if more is None:
                return None
            keys |= more
    return keys


def _wants_context(action: Action) -> bool:
    if any(_wants_context(part) for part in action.parts):
        return True
    function = action.function if isinstance(action, FunctionAction) else function_of(action)
    return function is not None and Parameters.of(function).wants_context
