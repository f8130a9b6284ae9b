"""Worker threads for plain functions and generators. How many run at once is the policy's business, not theirs.

A thread can't be killed, so a cancelled caller waits until the thread has come to its end. anyio's shield sees to that
for cancellation by a cancel scope; ``_Call`` does for asyncio's own (``asyncio.timeout``, ``task.cancel()``), which
goes through the shield and would leave the thread running with nobody waiting for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
from anyio.lowlevel import RunVar

__all__ = ("run_in_thread", "step_in_thread")

T = TypeVar("T")
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("arun thread limiter")


async def run_in_thread(function: Callable[[], T]) -> T:
    """Call ``function`` in a worker thread, in a copy of the caller's contextvars; cancelled, wait for its end."""
    return await _Call(function).run()


async def step_in_thread(
    iterate: Callable[[], Iterable[Any]], receive: Callable[[Any], Coroutine[Any, Any, None]]
) -> None:
    """Step through ``iterate()`` on one worker thread and await ``receive(item)`` on the event loop for each item.

    Cancelled, it ends after the step that it is in, and the generator is closed on its thread.
    """

    def step_through() -> None:
        iterator = iterate()
        try:
            for item in iterator:
                if call.leaving:
                    return
                anyio.from_thread.check_cancelled()
                try:
                    anyio.from_thread.run(receive, item)
                except concurrent.futures.CancelledError:  # what anyio makes of a cancelled receive() on asyncio
                    return
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    call = _Call(step_through)
    await call.run()
    await anyio.lowlevel.checkpoint_if_cancelled()


class _Call(Generic[T]):
    """One call on a worker thread."""

    __slots__ = ("_function", "_lock", "_running", "_tell", "leaving")

    def __init__(self, function: Callable[[], T]) -> None:
        #: whether the caller was cancelled and only waits for the end
        self.leaving = False
        self._function = function
        self._lock = threading.Lock()
        self._running = False
        self._tell: Callable[[], object] | None = None

    async def run(self) -> T:
        limiter = _limiter.get(None)
        if limiter is None:
            limiter = anyio.CapacityLimiter(math.inf)
            _limiter.set(limiter)
        try:
            return await anyio.to_thread.run_sync(self._run, limiter=limiter)
        except anyio.get_cancelled_exc_class():
            await self._ended()
            raise

    def _run(self) -> T:
        with self._lock:
            if self.leaving:
                return cast("T", None)  # the caller has gone before the thread began
            self._running = True
        try:
            return self._function()
        finally:
            with self._lock:
                self._running = False
            if self._tell is not None:
                try:
                    self._tell()
                except RuntimeError:  # the event loop was closed meanwhile: nobody waits
                    pass

    async def _ended(self) -> None:
        with self._lock:
            self.leaving = True
            if not self._running:
                return
            ended, loop = anyio.Event(), asyncio.get_running_loop()  # on trio it can't be running any more
            self._tell = lambda: loop.call_soon_threadsafe(ended.set)
        with anyio.CancelScope(shield=True):
            while not ended.is_set():
                try:
                    await ended.wait()
                except asyncio.CancelledError:  # a second one; the first is on its way
                    continue
