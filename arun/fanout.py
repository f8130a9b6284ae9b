"""Fan-out: runs a source's subtasks on the kernel and reduces their results in the caller's task."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Generic, NoReturn, TypeVar, cast

import anyio
import anyio.lowlevel

from arun.errors import MisuseError
from arun.guards import Checks, Owner
from arun.handles import Handle
from arun.hosting import BUDGET
from arun.kernel import FanOutStatistics, Kernel
from arun.outcomes import Ok
from arun.policies import Policy
from arun.signatures import where
from arun.timed import Timed

__all__ = ("FanOutStatistics", "Kernel", "Results", "run_fan_out")

T = TypeVar("T")
R = TypeVar("R")


class Results(Generic[T]):
    """The results of a fan-out as its reducer sees them: an async iterator, for one task, once."""

    __slots__ = ("_budget", "_exhausted", "_kernel", "_map", "read")

    def __init__(self, kernel: Kernel[T], map_: Callable[[Handle[T]], Any]) -> None:
        self._kernel = kernel
        self._map = map_
        self._budget = BUDGET
        self._exhausted = False
        #: whether anybody has asked for a result
        self.read = False

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._exhausted:
            raise MisuseError(
                "these results were read to their end already, and are not kept; keep what you need while you read "
                "them, or combine several reducers over one reading"
            )
        return self

    def __iter__(self) -> NoReturn:
        raise MisuseError(
            f"the results of {self._kernel.name} come one by one; write `async for done in ...`, not `for`"
        )

    async def __anext__(self) -> Any:
        kernel = self._kernel
        self.read = True
        while True:  # noqa: ASYNC913 - it returns, waits, or raises
            if not kernel.ready:
                if kernel.ended:
                    self._exhausted = True
                    kernel.raise_failures()
                    raise StopAsyncIteration
                await kernel.wait_ready()
                self._budget = BUDGET
                continue
            self._budget -= 1
            if not self._budget:
                self._budget = BUDGET
                await anyio.lowlevel.checkpoint()
                continue
            handle = kernel.take()
            if isinstance(handle.outcome_now, Ok) or (
                kernel.policy.on_error == "collect" and handle.on_error != "skip"
            ):
                return self._map(handle)

    def with_timeout(self, seconds: float) -> Timed[Any]:
        """The same results, each with a time limit.

        :param seconds: until the next result has come; after that a TimeoutError is raised, and the results go on.
        """
        return Timed(self, seconds)


async def run_fan_out(
    source: Callable[[], Any],
    work: Callable[[Handle[T]], Coroutine[Any, Any, T]],
    consume: Callable[[AsyncIterator[Any]], Awaitable[R]],
    policy: Policy,
    *,
    name: str,
    reducer: Callable[..., Any],
    admit: Callable[[Any], object],
    result: Callable[[Handle[T]], Any],
    checks: Checks | None = None,
    source_ended: Callable[[Owner], None] | None = None,
) -> R:
    """Run a source's subtasks, at most ``policy.limit`` in flight, and reduce their results in the caller's task.

    :param source: called once for an (async) iterable of specs, listed nowhere; a generator is sent each spec's Handle.
    :param work: runs one subtask; ``handle.spec`` is what the source yielded. It may set ``handle.describe``.
    :param consume: the reducer, given the results as an async iterator. When it returns, subtasks that still run
        are cancelled and their clean-up is awaited.
    :param name: of the fan-out, for errors.
    :param reducer: the function that ``consume`` calls, for errors.
    :param admit: raises MisuseError for a spec that is none; it is raised at the source's ``yield``.
    :param result: what the reducer sees of an ended subtask; called only for results that it is given.
    :param checks: what the guard-rails look for; None for nothing.
    :param source_ended: told of the source's owner once the source has come to its own end.
    :return: what ``consume`` returned.
    :raises Exception: the one error of a failed subtask or of the source, with a note naming the subtask; an
        ExceptionGroup of several; or the reducer's own.
    :raises MisuseError: if the reducer ended without reading any result.
    """
    kernel: Kernel[T] = Kernel(source, work, policy, admit, name, checks, source_ended)
    results = Results(kernel, result)
    reduced: R | None = None
    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(kernel.work, name="arun fan-out")
        try:
            reduced = await consume(results)
        except Exception as exc:  # noqa: BLE001 - raised below: the group would wrap it
            failure = exc
        finally:
            kernel.cancel()
    # A reducer that has ended reads no more errors.
    misuse = kernel.misuse() if failure is None else None
    kernel.log_failures()
    failure = failure or misuse
    if failure is not None:
        raise failure
    if not results.read:
        raise MisuseError(
            f"{where(reducer)} ended without reading its results, so the subtasks of {name!r} were cancelled; "
            "read them with `async for done in states`"
        )
    return cast("R", reduced)
