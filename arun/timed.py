"""Timed: a stream with a time limit on each item. ``stream.with_timeout(seconds)`` of every stream of arun makes one.

A timeout around ``anext`` of an async generator kills the generator, and the next ``anext`` says that it has ended. The
streams of arun lose nothing when waiting for an item is cancelled, so here the stream goes on: ask again.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import anyio

from arun.errors import MisuseError

__all__ = ("Timed",)

T_co = TypeVar("T_co", covariant=True)


class _Stream(Protocol[T_co]):
    async def __anext__(self) -> T_co: ...


class Timed(Generic[T_co]):
    """The items of a stream; waiting for one longer than that is a TimeoutError, after which the stream goes on.

    It holds nothing itself: leave it by leaving the stream that it is of. Several may be made of one stream.

    :param stream: an async iterator that loses nothing when its ``__anext__`` is cancelled while it waits.
    :param seconds: for one item, above 0.

    >>> events = app.astream()
    >>> patient = events.with_timeout(5)
    >>> async with events:
    ...     while True:
    ...         try:
    ...             async for event in patient:
    ...                 show(event)
    ...             break
    ...         except TimeoutError:
    ...             show("still waiting")
    """

    __slots__ = ("_seconds", "_stream")

    def __init__(self, stream: _Stream[T_co], seconds: float) -> None:
        if not seconds > 0:
            raise MisuseError(f"with_timeout({seconds!r}): it takes a number of seconds above 0")
        self._stream = stream
        self._seconds = seconds

    def __aiter__(self) -> Timed[T_co]:
        return self

    async def __anext__(self) -> T_co:
        """The next item.

        :raises TimeoutError: it did not come in time; the stream is as it was.
        """
        with anyio.move_on_after(self._seconds):
            return await self._stream.__anext__()
        raise TimeoutError(f"nothing came for {self._seconds:g} s; the stream goes on, so it may be asked again")
