"""Waiting for clean-up that must not be cut short."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio

if TYPE_CHECKING:
    from arun.runtime import Background

__all__ = ("finish",)

T = TypeVar("T")


async def finish(work: Background[T]) -> T:
    """Wait for the end of some work, also when the waiter is cancelled meanwhile; the cancellation comes after it.

    The work must have a deadline of its own.

    :raises BaseException: the work's own error.
    """
    cancelled: BaseException | None = None
    while not work.done:
        try:
            # The scope keeps out anyio's cancellation; the handler what Task.cancel() throws in once.
            with anyio.CancelScope(shield=True):
                await work.wait()
        except anyio.get_cancelled_exc_class() as exc:  # noqa: ASYNC103 - raised once the work has ended
            cancelled = exc
    if cancelled is not None:
        raise cancelled
    return work.result()  # no await: in a scope that is cancelled it would not come back
