"""Hosting: how the runtime drives what users write.

The laws of a hosted generator:

1. One driver. Exactly one task calls ``__anext__``, ``asend`` and ``aclose`` on it.
2. Its own context. It and everything that it calls run in one copy of the caller's contextvars; what it sets there
   never leaks to its consumer, nor the other way round.
3. One cancel scope, entered before its first step and left after its last. On the way out the scope is shielded and the
   generator closed, so that its clean-up is awaited under ``GRACE`` seconds, whatever ended it. (A scope opened around
   ``aclose()`` alone would not nest with scopes that the generator itself holds; PEP 789.)
4. Every sixty-four items a real checkpoint, so that a generator that never awaits can't starve the loop.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable
from contextvars import Context, copy_context
from typing import Any, Final, TypeVar

import anyio
import anyio.lowlevel
import structlog

from arun.errors import AbandonedWork
from arun.frames import user_line

__all__ = ("BUDGET", "GRACE", "SWALLOWED", "as_async_iterator", "close", "drive", "in_context")

T = TypeVar("T")
log = structlog.get_logger("arun.hosting")

#: Items handled without a task switch before a real checkpoint is due.
BUDGET: Final = 64
#: Seconds that a generator's clean-up may take once it is being closed.
GRACE: Final = 5.0
#: Cancellations that a coroutine swallows before that is reported; shielded clean-up swallows at most one.
SWALLOWED: Final = 100


@types.coroutine
def in_context(
    context: Context, driven_coroutine: Coroutine[Any, Any, T], on_suspend: Callable[[], object] | None = None
) -> Generator[Any, Any, T]:
    """Await a coroutine in the current task, but in ``context``.

    A coroutine that swallows its cancellation is reported, and left behind ``GRACE`` seconds after the first one.

    :param on_suspend: called once, when the coroutine first waits for something.
    """
    run = context.run
    step: Callable[..., Any] = driven_coroutine.send
    argument: Any = None
    swallowed: _Swallowed | None = None
    while True:
        try:
            trap = run(step, argument)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # the coroutine's result
        if on_suspend is not None:
            on_suspend()
            on_suspend = None
        try:
            argument = yield trap
            step = driven_coroutine.send
        except BaseException as exc:  # noqa: ASYNC103 - thrown on into the coroutine, cancellation included
            argument = exc
            step = driven_coroutine.throw
            if isinstance(exc, anyio.get_cancelled_exc_class()):
                swallowed = swallowed or _Swallowed(anyio.current_time())
                if swallowed.once_more(driven_coroutine):
                    run(_leave, driven_coroutine)
                    raise


class _Swallowed:
    """Counts the cancellations that one coroutine was told of. A clean-up in a shielded scope is told of none."""

    __slots__ = ("_count", "_since")

    def __init__(self, now: float) -> None:
        self._since = now
        self._count = 0

    def once_more(self, coroutine: Coroutine[Any, Any, Any]) -> bool:
        """Count one more; tells whether to give up."""
        self._count += 1
        if self._count == SWALLOWED:
            log.error("cancellation.swallowed", where=user_line(coroutine), times=self._count)
        if self._count < SWALLOWED or anyio.current_time() < self._since + GRACE:
            return False
        abandoned = AbandonedWork(
            f"{user_line(coroutine)} swallowed its cancellation {self._count} times in {GRACE:g} s and was left "
            "behind; catch Exception there, not BaseException, or re-raise anyio.get_cancelled_exc_class()"
        )
        log.error("work.abandoned", where=user_line(coroutine), times=self._count)
        warnings.warn(abandoned, stacklevel=2)
        return True


def _leave(coroutine: Coroutine[Any, Any, Any]) -> None:
    try:
        coroutine.close()
    except RuntimeError:  # it ignored GeneratorExit, too
        pass


async def drive(
    generator: AsyncIterator[Any],
    receive: Callable[[Any], Awaitable[None] | None],
    context: Context | None = None,
) -> None:
    """Run an async generator to its end and hand every item to ``receive``, which may suspend.

    The generator is closed and its clean-up awaited on every way out.

    :param generator: anything with ``__anext__``; driven by this task alone.
    :param receive: called with each item in order; an awaitable that it returns is awaited before the next step.
    :param context: the contextvars of the generator; by default a copy of the caller's.
    """
    context = copy_context() if context is None else context
    left = BUDGET
    failure: BaseException | None = None
    with anyio.CancelScope() as scope:
        try:
            while True:  # noqa: ASYNC913 - a real checkpoint every BUDGET items
                try:
                    item = await in_context(context, _step(generator))
                except StopAsyncIteration:
                    return
                pending = receive(item)
                if pending is not None:
                    await pending
                left -= 1
                if not left:
                    left = BUDGET
                    await anyio.lowlevel.checkpoint()
        except BaseException as exc:
            failure = exc
            raise
        finally:
            scope.shield = True
            scope.deadline = anyio.current_time() + GRACE
            await in_context(context, close(generator))  # noqa: ASYNC102 - the scope around it is shielded now
    if scope.cancelled_caught:  # the clean-up outlasted GRACE, and its cancellation has replaced what went on before
        log.warning("generator.cleanup_abandoned", generator=repr(generator), seconds=GRACE)
        if failure is not None:
            raise failure


async def close(iterator: AsyncIterator[Any] | Iterable[Any]) -> None:
    """Close a generator of either kind; anything else is left alone."""
    if isinstance(iterator, Generator):
        iterator.close()
    else:
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()


async def as_async_iterator(produced: Any) -> AsyncIterator[Any] | None:
    """An async iterator over any (async) iterable, awaitable or not; None if it is neither.

    Iterating a plain iterable neither lists it nor checkpoints: :func:`drive` does the latter.
    """
    if inspect.isawaitable(produced):
        produced = await produced
    if isinstance(produced, AsyncIterable):
        return aiter(produced)
    if isinstance(produced, Iterable) and not isinstance(produced, (str, bytes)):
        return _PlainIterator(produced)
    return None


class _PlainIterator:
    """A plain iterable with ``__anext__``; closing it closes the generator inside."""

    __slots__ = ("_iterator",)

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterator = iter(iterable)

    @property
    def gi_frame(self) -> Any:
        """Where the generator inside stands, for error messages."""
        return getattr(self._iterator, "gi_frame", None)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        for item in self._iterator:
            return item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await close(self._iterator)  # pyright: ignore[reportArgumentType] - an iterator may be a generator


async def _step(generator: AsyncIterator[Any]) -> Any:
    return await generator.__anext__()
