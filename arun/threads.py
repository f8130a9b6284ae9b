"""Worker threads for plain functions and generators: how many at once, and what becomes of one that will not end.

A thread can't be killed, so a cancelled caller waits for its end, but not for ever: after ``Threads.grace`` seconds it
reports :class:`~arun.errors.AbandonedWork` and goes on. anyio's own choice is between waiting without end and not at
all, so ``_Call`` lets anyio abandon the thread at once and does the waiting itself. That covers asyncio's own kind of
cancellation too (``asyncio.timeout``, ``task.cancel()``), which goes through anyio's shields.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Final, Generic, Self, TypeVar, cast

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
from anyio.lowlevel import RunVar

from arun.errors import AbandonedWork
from arun.frames import innermost_user_frame, line_of
from arun.hosting import GRACE
from arun.logs import get_logger

__all__ = ("Threads", "run_in_thread", "step_in_thread")

T = TypeVar("T")
log = get_logger("arun.threads")


class Threads:
    """How plain functions run in worker threads.

    :param total: most of these threads at once; None leaves it to the limits of the policies above.
    :param grace: seconds that a cancelled run waits for a thread before it goes on without it.
    :ivar always: whether also functions that are declared ``blocking=False`` run in a thread.
    """

    __slots__ = ("_bound", "always", "grace", "total")

    def __init__(self, total: int | None = None, *, grace: float = GRACE, always: bool = False) -> None:
        self.total = total
        self.grace = grace
        self.always = always
        # An event loop has its own limiter, so that one executor serves several loops.
        self._bound: RunVar[anyio.CapacityLimiter] | None = None if total is None else RunVar("arun bounded threads")

    def limiter(self) -> anyio.CapacityLimiter | None:
        """What bounds these threads on the running event loop."""
        if self._bound is None or self.total is None:
            return None
        limiter = self._bound.get(None)
        if limiter is None:
            limiter = anyio.CapacityLimiter(self.total)
            self._bound.set(limiter)
        return limiter

    def left_behind(self, *, stepping: bool) -> None:
        """A caller was cancelled while its thread is busy, and begins to wait; called on the event loop.

        :param stepping: whether the thread steps through a generator, and so will look up at the next item.
        """


_DEFAULT: Final = Threads()


def run_in_thread(
    function: Callable[[], T], *, label: str = "", threads: Threads | None = None
) -> Coroutine[Any, Any, T]:
    """Call ``function`` in a worker thread, in a copy of the caller's contextvars.

    Cancelled, it waits for the function's end, at most for the grace of ``threads``.

    :param label: what a person calls it, for :class:`~arun.errors.AbandonedWork`.
    """
    call = _Call(function, label, threads or _DEFAULT)
    bound = call.threads.limiter()
    return call.run() if bound is None else call.run_bounded(bound)


async def step_in_thread(
    iterate: Callable[[], Iterable[Any]],
    receive: Callable[[Any], Coroutine[Any, Any, None]],
    *,
    label: str = "",
    threads: Threads | None = None,
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
                try:
                    anyio.from_thread.run(call.deliver, receive, item)
                except concurrent.futures.CancelledError:  # what anyio makes of a cancelled receive() on asyncio
                    return
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    call = _Call(step_through, label, threads or _DEFAULT, stepping=True)
    bound = call.threads.limiter()
    await (call.run() if bound is None else call.run_bounded(bound))
    await anyio.lowlevel.checkpoint_if_cancelled()


class _Unlimited(anyio.CapacityLimiter):
    """Lets everybody through at once, on any event loop. anyio's own takes a turn of the loop for it."""

    def __new__(cls) -> Self:
        return object.__new__(cls)

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        pass

    def release_on_behalf_of(self, borrower: object) -> None:
        pass


_unlimited: Final = _Unlimited()


class _Call(Generic[T]):
    """One call on a worker thread."""

    __slots__ = ("_delivering", "_function", "_label", "_lock", "_stepping", "_tell", "_thread", "leaving", "threads")

    def __init__(self, function: Callable[[], T], label: str, threads: Threads, *, stepping: bool = False) -> None:
        #: whether the caller was cancelled and only waits for the end
        self.leaving = False
        self._function = function
        self._label = label
        self.threads = threads
        self._stepping = stepping
        self._lock = threading.Lock()
        #: identifier of the thread while it runs the function
        self._thread: int | None = None
        self._tell: Callable[[], object] | None = None
        self._delivering: anyio.CancelScope | None = None

    async def run_bounded(self, bound: anyio.CapacityLimiter) -> T:
        # Not anyio's own limiter of the call: that one is released when the thread is abandoned, before its end.
        async with bound:
            return await self.run()

    async def deliver(self, receive: Callable[[Any], Coroutine[Any, Any, None]], item: Any) -> None:
        """Hand an item over, on the event loop; cut short when the caller is cancelled."""
        if not self.leaving:
            with anyio.CancelScope() as self._delivering:
                await receive(item)

    async def run(self) -> T:
        try:
            (returned,) = await anyio.to_thread.run_sync(self._run, limiter=_unlimited, abandon_on_cancel=True)
        except anyio.get_cancelled_exc_class():
            await self._wait_for_thread()  # noqa: ASYNC102 - it shields, and has a deadline
            raise
        return returned

    def _run(self) -> tuple[T]:
        """In the thread; what it returns is wrapped, since trio refuses a coroutine there in words of its own."""
        with self._lock:
            if self.leaving:
                return (cast("T", None),)  # the caller has gone before the thread began
            self._thread = threading.get_ident()
        try:
            return (self._function(),)
        finally:
            with self._lock:
                self._thread = None
            if self._tell is not None:
                try:
                    self._tell()
                except RuntimeError:  # the event loop has ended meanwhile (trio's RunFinishedError is one, too)
                    pass

    async def _wait_for_thread(self) -> None:
        with self._lock:
            self.leaving = True
            if self._thread is None:
                return
            ended, post = anyio.Event(), _poster()
            self._tell = lambda: post(ended.set)
        if self._delivering is not None:
            self._delivering.cancel()
        self.threads.left_behind(stepping=self._stepping)
        grace = self.threads.grace
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + grace) as scope:
            while not ended.is_set():
                try:
                    await ended.wait()
                except asyncio.CancelledError:  # noqa: ASYNC103 - a second task.cancel(): the first is on its way
                    if scope.cancel_called:
                        raise
        thread = self._busy_thread()
        if thread is not None:
            _report(self._label, thread, grace)

    def _busy_thread(self) -> int | None:
        with self._lock:
            return self._thread


def _poster() -> Callable[[Callable[[], object]], object]:
    loop: Any = anyio.lowlevel.current_token().native_token
    post: Callable[[Callable[[], object]], object]
    post = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon
    return post


def _report(label: str, thread: int, seconds: float) -> None:
    frame = sys._current_frames().get(thread)
    line = line_of(innermost_user_frame(frame)) if frame is not None else "an unknown line"
    abandoned = AbandonedWork(
        f"{label or 'a plain function'} was cancelled and its thread still runs after {seconds:g} s, at {line}; the "
        "run goes on without it. Make the function return sooner, or run it with a ProcessExecutor, which kills",
        label=label,
        line=line,
    )
    log.error("work.abandoned", where=line, label=label, seconds=seconds)
    try:
        warnings.warn(abandoned, stacklevel=2)
    except AbandonedWork:
        pass  # a filter makes errors of warnings; it must not replace the cancellation that is under way
