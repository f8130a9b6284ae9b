"""The executor protocol, and the executors that stay in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from arun.actions import Action, FunctionAction, Input, Result, SingleStepAction, perform
from arun.context import ApplicationContext
from arun.errors import MisuseError
from arun.hosting import GRACE
from arun.parallel import RunnableGraph, TaskBasedParallelAction
from arun.signatures import kind_of, where
from arun.state import State
from arun.threads import Threads

__all__ = ("Executor", "LocalExecutor", "ThreadExecutor", "function_of")


class Executor(Protocol):
    """Where subtasks run."""

    def check(self, action: Action) -> None:
        """Refuse an action that can't run here; called when an application is built, and before a subtask runs.

        :raises MisuseError: it can't; the message names it and says what to do.
        """

    async def run(
        self, action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext
    ) -> tuple[Any, State]:
        """As ``arun.actions.perform``: ``(result, changes)``, where the delta of ``changes`` is what was written.

        What the action yields goes to ``context.run`` in order. Cancelled, it returns when the action's clean-up
        has ended.
        """
        ...


class LocalExecutor:
    """Runs subtasks in this event loop, plain functions in its worker threads: what happens without an executor."""

    def check(self, action: Action) -> None:
        """Any action can run here."""

    async def run(
        self, action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext
    ) -> tuple[Any, State]:
        """See :meth:`Executor.run`."""
        return await perform(action, state, inputs, context)


class ThreadExecutor:
    """Runs subtasks that are plain functions and plain generators in worker threads, a generator on one thread.

    Async actions are refused. In a thread they would need an event loop of their own, where no client, lock or pool
    of this loop works; on this loop they would be exactly where the ThreadExecutor was to keep them from being. In a
    RunnableGraph every action must be a plain one; parallel actions in it stay here and their subtasks are checked.

    :param threads: most threads at once; by default as many as the limits of the policies allow.
    :param grace: seconds that a cancelled run waits for a thread, which can't be killed. After that it warns with
        :class:`~arun.errors.AbandonedWork`, naming the line that the thread is at, and goes on. A thread that never
        ends keeps Python from exiting.
    """

    def __init__(self, threads: int | None = None, *, grace: float = GRACE) -> None:
        if threads is not None and threads < 1:
            raise MisuseError(f"ThreadExecutor(threads={threads}): at least 1, or None for no bound of its own")
        self._threads = Threads(threads, grace=grace, always=True)

    def check(self, action: Action) -> None:
        """:raises MisuseError: for an async action."""
        if isinstance(action, TaskBasedParallelAction):
            return
        if isinstance(action, RunnableGraph):
            for part in action.parts:
                self.check(part)
            return
        function = function_of(action)
        if function is None:
            raise MisuseError(
                f"{action.display_name!r} overrides execute(), which runs in the event loop: a ThreadExecutor can't "
                "run it. Set executor=None for it"
            )
        kind = kind_of(function)
        if kind in {"coroutine", "async generator"}:
            raise MisuseError(
                f"{action.display_name!r} is async ({kind}, {where(function)}); a ThreadExecutor runs plain functions "
                "and plain generators only. Set executor=None for it: it runs in the event loop. If it computes for "
                "long, write it as a plain function, or use a ProcessExecutor"
            )

    async def run(
        self, action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext
    ) -> tuple[Any, State]:
        """See :meth:`Executor.run`."""
        self.check(action)
        return await perform(action, state, inputs, context.with_threads(self._threads))


#: What these classes do themselves takes no time.
_INSTANT: Final = (Input, Result)


def function_of(action: Action) -> Callable[..., Any] | None:
    """The function that an action runs; None where its class runs it in a way of its own."""
    execute = type(action).execute
    if isinstance(action, FunctionAction) and execute is FunctionAction.execute:
        return action.function
    if isinstance(action, SingleStepAction) and (execute is SingleStepAction.execute or isinstance(action, _INSTANT)):
        return action.run_and_update
    return action.run if execute is Action.execute else None
