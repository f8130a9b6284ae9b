"""Hosting: how the runtime drives what users write.

The laws of a hosted generator:

1. One driver. Exactly one task calls ``__anext__``, ``asend`` and ``aclose`` on it.
2. Its own context. It and everything that it calls run in one copy of the caller's contextvars; what it sets there
   never leaks to its consumer, nor the other way round.
3. One cancel scope, entered before its first step and left after its last. On the way out the scope is shielded and the
   generator closed, so that its clean-up is awaited under ``GRACE`` seconds, whatever ended it. (A scope opened around
   ``aclose()`` alone would not nest with scopes that the generator itself holds; PEP 789.)
4. Every sixty-four items a real checkpoint, so that a generator that never awaits can't starve the loop.
5. Whatever async generators it drops unfinished are closed at its end, in its task and context.
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

from arun.errors import AbandonedGenerator, AbandonedWork, MisuseError
from arun.frames import line_at, line_of, user_line
from arun.guards import Owner, Yields, close_unused, forget, here, holds_scope, warn_at
from arun.logs import get_logger

__all__ = (
    "BUDGET",
    "GRACE",
    "SWALLOWED",
    "as_async_iterator",
    "close",
    "close_with_scopes",
    "drive",
    "in_context",
    "let_go",
    "refuse",
    "run_owned",
)

T = TypeVar("T")
log = get_logger("arun.hosting")

#: Items handled without a task switch before a real checkpoint is due.
BUDGET: Final = 64
#: Seconds that a generator's clean-up may take once it is being closed.
GRACE: Final = 5.0
#: Cancellations that a coroutine swallows before that is reported; shielded clean-up swallows at most one.
SWALLOWED: Final = 100


@types.coroutine
def in_context(
    context: Context,
    driven_coroutine: Coroutine[Any, Any, T],
    on_suspend: Callable[[], object] | None = None,
    owner: Owner | None = None,
) -> Generator[Any, Any, T]:
    """Await a coroutine in the current task, but in ``context``.

    A coroutine that swallows its cancellation is reported, and left behind ``GRACE`` seconds after the first one.

    :param on_suspend: called once, when the coroutine first waits for something.
    :param owner: whose code this is, for the guard-rails; None where none looks.
    """
    run = context.run
    seat = here.seat if owner is not None else None
    above: Owner | None = None
    step: Callable[..., Any] = driven_coroutine.send
    argument: Any = None
    swallowed: _Swallowed | None = None
    while True:
        if seat is not None:
            above = seat.owner
            seat.owner = owner
            if above is None:
                seat.steps += 1
        try:
            trap = run(step, argument)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # the coroutine's result
        finally:
            if seat is not None:
                seat.owner = above
        if on_suspend is not None:
            on_suspend()
            on_suspend = None
        error: BaseException | None = None
        try:
            argument = yield trap
            step = driven_coroutine.send
            if argument is not None:  # trio sends an outcome, which is unwrapped where the waiting began
                error = getattr(argument, "error", None)
        except BaseException as exc:  # noqa: ASYNC103, BLE001 - thrown on into the coroutine
            argument = error = exc
            step = driven_coroutine.throw
        if error is not None and isinstance(error, anyio.get_cancelled_exc_class()):
            swallowed = swallowed or _Swallowed(anyio.current_time())
            if swallowed.once_more(driven_coroutine):
                run(_leave, driven_coroutine)
                raise error


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
    owner: Owner | None = None,
) -> None:
    """Run an async generator to its end and hand every item to ``receive``, which may suspend.

    The generator is closed and its clean-up awaited on every way out.

    :param generator: anything with ``__anext__``; driven by this task alone.
    :param receive: called with each item in order; an awaitable that it returns is awaited before the next step.
    :param context: the contextvars of the generator; by default a copy of the caller's.
    :param owner: whose generator it is, for the guard-rails; None where none looks.
    """
    context = copy_context() if context is None else context
    yields = Yields.of(generator, owner.checks) if owner is not None else None
    left = BUDGET
    failure: BaseException | None = None
    with anyio.CancelScope() as scope:
        try:
            while True:  # noqa: ASYNC913 - a real checkpoint every BUDGET items
                try:
                    item = await in_context(context, _step(generator), None, owner)
                    misuse = yields.look() if yields is not None else None
                    while True:
                        if misuse is not None:
                            close_unused(item)
                            item = await in_context(context, refuse(generator, misuse, yields), None, owner)
                            misuse = yields.look() if yields is not None else None
                            continue
                        try:
                            pending = receive(item)
                            if pending is not None:
                                await pending
                            break
                        except MisuseError as exc:  # of this very item: the generator is told where it yielded it
                            misuse = exc
                except StopAsyncIteration:
                    return
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
            try:
                await in_context(context, close(generator), None, owner)  # noqa: ASYNC102 - the scope is shielded now
            finally:
                if owner is not None and owner.generators is not None:
                    await let_go(owner, context, failure)  # noqa: ASYNC102 - the scope is shielded now
    if scope.cancelled_caught:  # the clean-up outlasted GRACE, and its cancellation has replaced what went on before
        log.warning("generator.cleanup_abandoned", generator=repr(generator), seconds=GRACE)
        if failure is not None:
            raise failure


async def refuse(generator: Any, misuse: MisuseError, yields: Yields | None = None) -> Any:
    """Raise at the ``yield`` where a generator is suspended; one that goes on gives its next item.

    :param yields: knows which generators below this one it is to be raised in first.
    :raises MisuseError: bare, also out of a task group that the generator holds.
    """
    if yields is not None:
        inner, yields.inner = yields.inner, ()
        for one in inner:
            await _end(one, misuse)
    if not hasattr(generator, "athrow"):
        raise misuse
    try:
        return await generator.athrow(misuse)
    except BaseExceptionGroup as group:
        theirs, rest = group.split(lambda error: error is misuse)
        if theirs is None:
            raise
        raise misuse from rest


async def _end(inner: Any, misuse: MisuseError) -> None:
    """Raise in a generator that somebody else's is iterating over, and close it should it go on."""
    try:
        await refuse(inner, misuse)
        await close(inner)
    except (MisuseError, StopAsyncIteration):
        pass


async def run_owned(
    context: Context,
    coroutine: Coroutine[Any, Any, T],
    owner: Owner | None,
    on_suspend: Callable[[], object] | None = None,
) -> T:
    """Await a coroutine in ``context``; then close what it has dropped."""
    if owner is None:
        return await in_context(context, coroutine, on_suspend)
    failure: BaseException | None = None
    try:
        return await in_context(context, coroutine, on_suspend, owner)
    except BaseException as exc:
        failure = exc
        raise
    finally:
        if owner.generators is not None:
            await let_go(owner, context, failure)  # noqa: ASYNC102 - shields itself


async def let_go(owner: Owner, context: Context, failure: BaseException | None) -> None:
    """Close what an action's code has dropped without closing it, in the action's task and context.

    :param failure: what the action ends with anyhow. It stays that; otherwise an error in the clean-up is raised.
    :raises Exception: the first error of a clean-up.
    """
    forget(owner)
    abandoned, owner.abandoned = owner.abandoned, None
    errors: list[Exception] = []
    generator: Any
    for generator in abandoned or ():
        at, code, line = line_of(generator), generator.ag_code, line_at(generator)
        try:
            if holds_scope(generator):  # entered before ours would be, so it has to be left after it: do without
                await in_context(context, close_with_scopes(generator))
            else:
                with anyio.CancelScope(shield=True) as scope:
                    scope.deadline = anyio.current_time() + GRACE
                    await in_context(context, close(generator))
        except Exception as exc:  # noqa: BLE001 - one failing clean-up must not keep the others from theirs
            errors.append(exc)
        if failure is None:
            told = AbandonedGenerator(
                f"{owner.label()} dropped {at} without closing it; arun has closed it now. "
                f"Write `async with contextlib.aclosing({code.co_name}(...)) as items:` around the loop"
            )
            log.warning("generator.abandoned", action=owner.label(), where=at)
            try:
                warn_at(told, code.co_filename, line)
            except Warning as exc:  # where warnings are errors; the rest is closed first
                errors.append(exc)
    if failure is None:
        for error in errors:
            raise error
    for error in errors:
        log.warning("generator.cleanup_failed", action=owner.label(), error=repr(error))


async def close(iterator: AsyncIterator[Any] | Iterable[Any]) -> None:
    """Close a generator of either kind; anything else is left alone.

    :raises MisuseError: if the generator yields instead of ending.
    """
    try:
        if isinstance(iterator, Generator):
            iterator.close()
        else:
            aclose = getattr(iterator, "aclose", None)
            if aclose is not None:
                await aclose()
    except RuntimeError as exc:
        if "ignored GeneratorExit" not in str(exc):
            raise
        raise MisuseError(
            f"{line_of(iterator)} yielded when it was told to end: it swallowed GeneratorExit there, by a bare except "
            "or an except BaseException around a yield, or yields in a finally; catch Exception, not BaseException"
        ) from exc


async def close_with_scopes(generator: AsyncIterator[Any]) -> None:
    """As :func:`close`, for a generator that is suspended inside task groups: they wrap the GeneratorExit (anyio's and
    trio's do; CPython #135736).
    """
    try:
        await close(generator)
    except BaseExceptionGroup as group:
        _, rest = group.split(GeneratorExit)
        if rest is not None:
            raise rest from None


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
