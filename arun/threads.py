"""Worker threads for plain functions. How many run at once is the policy's business, so no limit is set here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

__all__ = ("run_in_thread",)

T = TypeVar("T")
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("arun thread limiter")


async def run_in_thread(function: Callable[[], T]) -> T:
    """Call ``function`` in a worker thread, in a copy of the caller's contextvars.

    A thread can't be killed, so a cancelled caller waits until the function has returned.
    """
    limiter = _limiter.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(math.inf)
        _limiter.set(limiter)
    return await anyio.to_thread.run_sync(function, limiter=limiter)
