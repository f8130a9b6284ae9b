"""Waiting for a sign of life, by the time that this process itself was alive."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ("within",)

T = TypeVar("T")

_PARTS = 4
_LEAST = 0.5  # seconds of a part: a health thread takes half of that to tell that its event loop is blocked


async def within(seconds: float, ask: Callable[[], Awaitable[T]]) -> T:
    """What ``ask()`` gives within so many seconds; it is cancelled and asked again after each quarter of them.

    An event loop that goes on after it stood still (a blocking call, a debugger, a machine that was paused) finds a
    timeout over before it has read what came meanwhile. So one timeout alone says nothing about the other side.

    :raises TimeoutError: there was nothing.
    """
    parts = _PARTS if seconds >= _PARTS * _LEAST else max(1, int(seconds / _LEAST))
    for _ in range(parts):
        with anyio.move_on_after(seconds / parts):
            return await ask()
    raise TimeoutError
