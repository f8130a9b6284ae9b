"""``fan_out()``: the kernel for direct use, as a plain async iterator of Outcomes."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, NoReturn, Self, TypeVar, cast

import anyio

from arun.attempts import run_attempts
from arun.errors import MisuseError
from arun.fanout import FanOutStatistics, Kernel, Results
from arun.guards import Checks, Level, checks_of, inherited_checks, shown, spelling
from arun.handles import Handle
from arun.outcomes import Outcome
from arun.policies import Policy, refuse_no_policy
from arun.runtime import Background, Runtime
from arun.timed import Timed

__all__ = ("FanOut", "fan_out")

T = TypeVar("T")


class FanOut(Generic[T]):
    """Outcomes of a fan-out as a plain async iterator, made by :func:`fan_out`.

    The work belongs to the Runtime and not to the frame that iterates, so this may be used in anybody's generator;
    it starts with the first item asked for. Leaving it (``async with``, ``aclose()``, garbage collection) cancels what
    still runs.
    """

    _background: Background[None] | None = None

    def __init__(self, source: Any, policy: Policy, checks: Checks | None) -> None:
        async def attempts(handle: Handle[T]) -> T:
            return await run_attempts(handle, _await_spec, policy)

        work = _await_spec if policy.plain else attempts
        self._kernel: Kernel[T] = Kernel(
            lambda: source, work, policy, _admit_awaitable(policy), "fan_out()", checks, None
        )
        self._results = Results(self._kernel, _outcome)
        self._closed = False

    def __aiter__(self) -> AsyncIterator[Outcome[T]]:
        if not self._closed:
            aiter(self._results)  # refuses a second reading
        return self

    def __iter__(self) -> NoReturn:
        self._results.__iter__()

    async def __anext__(self) -> Outcome[T]:
        if self._background is None:
            if self._closed:
                raise StopAsyncIteration
            self._background = Runtime.current().start(self._kernel.work_alone, name="arun fan_out")
        return cast("Outcome[T]", await self._results.__anext__())

    def with_timeout(self, seconds: float) -> Timed[Outcome[T]]:
        """The same outcomes, each with a time limit.

        :param seconds: until the next outcome has come; after that a TimeoutError is raised, and the fan-out goes on.
        """
        return Timed(self, seconds)

    def statistics(self) -> FanOutStatistics:
        """Counts of this fan-out's subtasks and workers."""
        return self._kernel.statistics()

    async def aclose(self) -> None:
        """Cancel what still runs and wait for its clean-up."""
        self._closed = True
        self._kernel.cancel()
        if self._background is not None:
            with anyio.CancelScope(shield=True):
                await self._background.wait()
            self._kernel.log_failures()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        background = self._background
        if background is not None and not background.done:
            background.cancel_soon()


def fan_out(source: Any, policy: Policy | None = None, *, check: Level | None = None) -> FanOut[Any]:
    """Await many awaitables, bounded, and iterate over their outcomes as they end.

    :param source: an (async) iterable or generator of awaitables, or of functions of no arguments that return one (a
        retry needs these); read only as slots come free, so it may be endless.
    :param policy: limit, order, timeouts and what a failure does; by default ``Policy()``.
    :param check: level of the guard-rails; by default that of the action that calls this, else the default level.

    >>> async for outcome in fan_out(fetch(url) for url in urls):
    ...     print(outcome.value)
    """
    policy = Policy() if policy is None else policy
    refuse_no_policy(policy, "fan_out(policy=...)")
    return FanOut(source, policy, inherited_checks() if check is None else checks_of(check))


def _admit_awaitable(policy: Policy) -> Callable[[Any], object]:
    def admit(spec: Any) -> None:
        if inspect.isawaitable(spec):
            if policy.retry is not None:
                if inspect.iscoroutine(spec):
                    spec.close()
                raise MisuseError(
                    "Policy(retry=...) can't await one coroutine twice; "
                    "yield functions of no arguments: functools.partial(fetch, url)"
                )
        elif not callable(spec):
            raise MisuseError(
                f"fan_out() was given {shown(spec)}; {spelling(spec) or 'yield the awaitable itself, not its result'}: "
                "fan_out(fetch(url) for url in urls)"
            )

    return admit


async def _await_spec(handle: Handle[T]) -> T:
    spec = handle.spec
    if not inspect.isawaitable(spec):
        called = spec()
        if not inspect.isawaitable(called):
            raise MisuseError(
                f"fan_out() was given a function, {spec!r:.80}, that returned {shown(called)}; "
                "it returns an awaitable: functools.partial(fetch, url), where fetch is an `async def` without yield"
            )
        spec = called
    return cast("T", await spec)


def _outcome(handle: Handle[T]) -> Outcome[T] | None:
    return handle.outcome_now
