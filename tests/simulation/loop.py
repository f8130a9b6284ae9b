"""Loop: an asyncio event loop in a World, for cores that await, such as the fan-out kernel with its ledger.

Time is the World's, one tick a second; whatever is ready at once runs in an order that is drawn, so that nothing can
rely on the order in which asyncio happens to do it (trio draws it, too). There are no files, sockets or threads.
"""

from __future__ import annotations

import asyncio
import math
import sys
from asyncio import events
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextvars import Context
from typing import Any

from tests.simulation.world import Violation, World

__all__ = ("Loop", "Task")


class Task(asyncio.Task[Any]):
    """A task that knows which one it is."""

    number = 0


class Loop(asyncio.AbstractEventLoop):
    """Runs tasks in a World."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ready: list[asyncio.Handle] = []
        self._timers: dict[int, list[Any]] = {}
        self._turning = False
        self._tasks: list[Task] = []
        self._generators: list[AsyncGenerator[Any, Any]] = []
        self._errors: list[dict[str, Any]] = []

    def start(self, coro: Coroutine[Any, Any, Any]) -> Task:
        """Start a task from outside."""
        return self.create_task(coro)

    def check(self) -> None:
        """What must never be."""
        for context in self._errors:
            error = context.get("exception")
            raise error if isinstance(error, Violation) else Violation(f"{context['message']}: {error!r}") from error

    def check_left(self) -> None:
        """What must be true once nothing more happens: nothing is left over."""
        self.check()
        for task in self._tasks:
            if not task.done():
                raise Violation(f"a task is left over: {task.get_coro()!r}")
        for generator in self._generators:
            if generator.ag_frame is not None:
                raise Violation(f"an async generator was never closed: {generator.__qualname__}")

    # What asyncio and anyio ask of a loop.

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        if not self._turning:
            self._turning = True
            self._world.after(0, self._turn)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        handle._scheduled = True
        if when < math.inf:
            self._timers[id(handle)] = self._world.after(max(0, math.ceil(when) - self._world.now), self._due, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        entry = self._timers.pop(id(handle), None)
        if entry is not None:
            self._world.forget(entry)

    def _due(self, handle: asyncio.TimerHandle) -> None:
        del self._timers[id(handle)]
        self._ready.append(handle)
        if not self._turning:
            self._turning = True
            self._world.after(0, self._turn)

    def _turn(self) -> None:
        ready, self._ready = self._ready, []
        if len(ready) > 1:
            ready.sort(key=_number)
            self._world.shuffle(ready)
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._generators.append)
        events._set_running_loop(self)
        try:
            for handle in ready:
                if not handle._cancelled:
                    handle._run()
        finally:
            events._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)
        self._turning = bool(self._ready)
        if self._turning:
            self._world.after(0, self._turn)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> Any:
        task = Task(coro, loop=self, name=name, context=context)
        task.number = len(self._tasks)
        self._tasks.append(task)
        return task

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def time(self) -> float:
        return self._world.now

    def get_task_factory(self) -> None:
        return None

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._errors.append(context)


def _number(handle: asyncio.Handle) -> int:
    """The task that it is a step of: anyio goes through sets, and the order of what it wakes by that is anybody's."""
    task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]  # asyncio's own
    return task.number if type(task) is Task else -1
