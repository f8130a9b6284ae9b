"""Attempts: one subtask under its policy's rate, timeouts and retry."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from arun.handles import Handle
from arun.policies import Policy

__all__ = ("run_attempts",)

T = TypeVar("T")


async def run_attempts(
    handle: Handle[T],
    run: Callable[[Handle[T]], Awaitable[T]],
    policy: Policy,
    on_retry: Callable[[Handle[T], Exception, float], Awaitable[None]] | None = None,
) -> T:
    """Run a subtask until it succeeds or may not be tried again.

    :param run: one attempt; ``handle.attempt`` is its number, 1 for the first.
    :param on_retry: told of a failed attempt that is followed by another, and of the seconds until then.
    :raises TimeoutError: from the policy's timeouts; a retry may apply to it as to any error.
    """
    while True:
        handle.attempt += 1
        if policy.rate is not None:
            await policy.rate.acquire(handle.spec)
        try:
            return await _timed(handle, run, policy)
        except Exception as exc:
            retry = policy.retry
            if retry is None or handle.attempt >= retry.attempts or not retry.applies(exc):
                if handle.attempt > 1:
                    exc.add_note(f"in attempt {handle.attempt} of {handle.attempt}")
                raise
            wait = retry.wait(handle.attempt)
            if on_retry is not None:
                await on_retry(handle, exc, wait)
        await anyio.sleep(wait)


async def _timed(handle: Handle[T], run: Callable[[Handle[T]], Awaitable[T]], policy: Policy) -> T:
    if policy.timeout is None and policy.idle_timeout is None:
        return await run(handle)
    ends = anyio.current_time() + policy.timeout if policy.timeout is not None else math.inf
    with anyio.CancelScope(deadline=ends) as scope:
        idle = policy.idle_timeout
        if idle is not None:

            def beat() -> None:
                scope.deadline = min(ends, anyio.current_time() + idle)

            beat()
            handle.beat = beat
        return await run(handle)
    late = scope.deadline >= ends
    if late:
        raise TimeoutError(f"{handle.label()} took longer than its timeout of {policy.timeout:g} s")
    raise TimeoutError(f"{handle.label()} yielded nothing for its idle_timeout of {policy.idle_timeout:g} s")
