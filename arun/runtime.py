"""Runtime: owns the work that outlives the frame that started it.

A run streamed by ``app.astream()``, a connection's reader or an actor's supervisor must not live in
a task group of the consumer's frame: the consumer may be a generator that is dropped half way (PEP
789). Such work gets a task of its own here. On asyncio there is one Runtime per event loop,
made when first needed; on trio it is opened explicitly with ``async with Runtime()``.

No method holds a cancel scope open across a return, so a Runtime works as a pytest fixture and in an
``AsyncExitStack``.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Self, TypeVar

import anyio
from anyio.lowlevel import current_token

from arun.errors import MisuseError
from arun.logs import get_logger

__all__ = ("Background", "Runtime", "post_to_this_loop")

T = TypeVar("T")
log = get_logger("arun.runtime")

_implicit: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Runtime] = weakref.WeakKeyDictionary()
_explicit: dict[object, Runtime] = {}


class Background(Generic[T]):
    """One piece of work owned by a :class:`Runtime`, in a task of its own."""

    __slots__ = ("__weakref__", "_done", "_error", "_post", "_result", "_scope", "cancelling", "name")

    def __init__(self, name: str, post: Callable[[Callable[[], object]], object]) -> None:
        self.name = name
        #: whether the work has been told to stop
        self.cancelling = False
        self._scope = anyio.CancelScope()
        self._done = anyio.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        self._post = post

    @property
    def done(self) -> bool:
        """Whether the work has ended, its clean-up included."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Cancel the work. Call it from the Runtime's own event loop."""
        self.cancelling = True
        self._scope.cancel()

    def cancel_soon(self) -> None:
        """Cancel the work from any thread, also from a finaliser; does nothing on a closed loop."""
        self.cancelling = True
        try:
            self._post(self._scope.cancel)
        except RuntimeError:  # the loop is closed, so the work has ended already
            pass

    async def wait(self) -> T:
        """Wait for the end and return the result. Cancelling the waiter leaves the work alone.

        :raises BaseException: the work's own error, the same one to every waiter.
        :raises anyio.get_cancelled_exc_class(): never for the work's sake; work that was cancelled
            returns None.
        """
        await self._done.wait()
        return self.result()

    def result(self) -> T:
        """The result of work that has ended; raises as :meth:`wait` does."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # None when the work was cancelled

    async def ended(self) -> None:
        """Wait for the end, however it comes."""
        await self._done.wait()

    async def _run(self, fn: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> None:
        try:
            with self._scope:
                self._result = await fn(*args)
        except Exception as exc:  # noqa: BLE001 - kept for whoever waits; no error of one work may end another
            self._error = exc
            log.debug("runtime.background_failed", name=self.name, error=repr(exc))
        finally:
            self._done.set()


class Runtime:
    """Owner of background work on one event loop.

    >>> async with Runtime() as runtime:  # needed on trio only
    ...     await app.arun()
    """

    def __init__(self) -> None:
        self._works: set[Background[Any]] = set()
        self._closed = False
        self._token: object = None

    @classmethod
    def current(cls) -> Runtime:
        """The Runtime of the running event loop.

        :raises MisuseError: on trio, when no ``async with Runtime()`` is open.
        """
        token = current_token()
        runtime = _explicit.get(token)
        if runtime is not None:
            return runtime
        if not _on_asyncio():
            raise MisuseError(
                "no Runtime is open on this trio run, so background work would have no owner; "
                "wrap the program in `async with arun.Runtime():`"
            )
        loop = asyncio.get_running_loop()
        runtime = _implicit.get(loop)
        if runtime is None:
            runtime = _implicit[loop] = cls()
        return runtime

    def start(
        self,
        fn: Callable[..., Awaitable[T]],
        *args: Any,
        name: str,
        context: contextvars.Context | None = None,
    ) -> Background[T]:
        """Start ``await fn(*args)`` in a task of its own and return at once.

        :param name: shown in logs and in ``asyncio.all_tasks()``.
        :param context: the task's contextvars; by default a copy of the caller's.
        """
        if self._closed:
            raise MisuseError(f"{name} cannot start: this Runtime is closed")
        work: Background[T]
        if _on_asyncio():
            loop = asyncio.get_running_loop()
            work = Background(name, loop.call_soon_threadsafe)
            task = loop.create_task(work._run(fn, args), name=name, context=context)
            task.add_done_callback(lambda _: self._discard(work))
        else:
            trio = sys.modules["trio"]
            work = Background(name, trio.lowlevel.current_trio_token().run_sync_soon)

            async def run_and_discard() -> None:
                try:
                    await work._run(fn, args)
                finally:
                    self._discard(work)

            trio.lowlevel.spawn_system_task(run_and_discard, name=name, context=context or contextvars.copy_context())
        self._works.add(work)
        return work

    def _discard(self, work: Background[Any]) -> None:
        work._done.set()  # a task that was cancelled before its first step has not done so
        self._works.discard(work)

    async def aclose(self) -> None:
        """Cancel all work and wait until its clean-up has finished."""
        self._closed = True
        with anyio.CancelScope(shield=True):
            while self._works:
                works = list(self._works)
                for work in works:
                    work.cancel()
                for work in works:
                    await work._done.wait()
                await anyio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        self._token = current_token()
        if self._token in _explicit:
            raise MisuseError("a Runtime is already open on this event loop; use Runtime.current()")
        _explicit[self._token] = self
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self.aclose()
        finally:
            _explicit.pop(self._token, None)


def post_to_this_loop() -> Callable[[Callable[[], object]], object]:
    """What calls a function on the running event loop, from any thread; a RuntimeError once the loop is closed."""
    if _on_asyncio():
        return asyncio.get_running_loop().call_soon_threadsafe
    return sys.modules["trio"].lowlevel.current_trio_token().run_sync_soon  # type: ignore[no-any-return]  # untyped here


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
