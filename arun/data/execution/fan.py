"""Fans: a kernel fan-out inside a stage. Its tasks are the execution's, as a generator must hold no task group."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from arun.handles import Handle
from arun.kernel import Kernel
from arun.policies import Policy

if TYPE_CHECKING:
    from arun.data.execution.execution import Execution

__all__ = ("Nudge", "fan")

T = TypeVar("T")


async def fan(
    source: Callable[[], AsyncIterator[Any]],
    work: Callable[[Handle[T]], Coroutine[Any, Any, T]],
    execution: Execution,
    *,
    limit: int,
    ordered: bool,
    name: str,
    nudge: Nudge | None = None,
) -> AsyncGenerator[list[Handle[T]]]:
    """Run subtasks, and give those that have ended, as many as there are when somebody asks.

    :param limit: most subtasks that are started and not yet given.
    :param nudge: called by a subtask, it makes this give what has ended, be it none.
    :raises Exception: the first error of a subtask or of the source, after what had ended before it.
    """
    policy = Policy(limit=limit, order="submitted" if ordered else "completed")
    kernel: Kernel[T] = Kernel(source, work, policy, _anything, name, None, None)
    if nudge is not None:
        nudge.kernel = kernel
    execution.group.start_soon(kernel.work, name=f"arun dataset {name:.60}")
    try:
        while True:  # noqa: ASYNC913 - it waits, yields or returns
            if kernel.ready:
                yield [kernel.take() for _ in range(len(kernel.ready))]
            elif nudge is not None and nudge.given:
                nudge.given = False
                yield []
            elif kernel.ended:
                kernel.raise_failures(first=True)
                return
            else:
                await kernel.wait_ready()
    finally:
        kernel.cancel()
        with anyio.CancelScope(shield=True):
            while not kernel.ended:
                await kernel.wait_ready()
        kernel.log_failures()


class Nudge:
    """Lets a subtask that goes on hand something on.

    :ivar given: whether there has been one that nobody has seen.
    """

    __slots__ = ("given", "kernel")

    def __init__(self) -> None:
        self.given = False
        self.kernel: Kernel[Any] | None = None

    def __call__(self) -> None:
        self.given = True
        if self.kernel is not None:
            self.kernel.wake()


def _anything(_: Any) -> None:
    """A source of ours yields what its work takes."""
