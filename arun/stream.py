"""RunStream: the events of one run as a plain async iterator, and the mailbox between the two.

The run is a background work of the Runtime. It holds the mailbox and never the stream, so a stream that its consumer
drops is collected, and that cancels the run.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from types import NoneType
from typing import Any, Final, Generic, Literal, Self, TypeAlias, TypeVar

import anyio
import msgspec
from anyio.lowlevel import current_token

from arun.context import Sink
from arun.errors import MisuseError
from arun.events import Event, Item, Partial, RunCancelled, RunFailed, RunFinished
from arun.logs import get_logger
from arun.runtime import Background, Runtime
from arun.timed import Timed

__all__ = ("Deliver", "RunStream")

R = TypeVar("R")
log = get_logger("arun.stream")
Deliver: TypeAlias = Literal["every", "latest"] | float

_CAPACITY: Final = 64
_CAPACITY_CONFLATED: Final = 1024
_LAST: Final[frozenset[object]] = frozenset({RunFinished, RunFailed, RunCancelled})
_Key: TypeAlias = tuple[type[Partial] | type[Item], str, tuple[str, ...]]


class RunStream(Generic[R]):
    """An async iterator of the Events of one run; made by ``app.astream()``.

    A failing run's error is raised after its ``RunFailed`` event.
    """

    _background: Background[R] | None = None

    def __init__(
        self,
        run: Callable[[Sink], Awaitable[R]],
        deliver: Deliver,
        started: Callable[[Background[Any]], None],
    ) -> None:
        known = deliver in {"every", "latest"} if isinstance(deliver, (str, NoneType)) else deliver >= 0
        if not known:
            raise MisuseError(f"deliver={deliver!r}: takes 'every', 'latest' or a number of seconds")
        self._run = run
        self._started = started
        self._mailbox = _Mailbox(conflate=deliver != "every", period=0.0 if isinstance(deliver, str) else deliver)
        self._closed = False
        self._waiting = False
        self._token: object = None

    @property
    def result(self) -> R:
        """What ``arun()`` would have returned, once the stream has ended.

        :raises MisuseError: while it has not, and if the run was cancelled.
        :raises Exception: the run's own error.
        """
        if self._background is None or not self._background.done:
            raise MisuseError("the run has not ended yet; iterate over the stream to its end, then take .result")
        result = self._background.result()
        if result is None:
            raise MisuseError("the run was cancelled, so it has no result")
        return result

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._closed:
            raise StopAsyncIteration
        if self._background is not None and current_token() != self._token:
            raise MisuseError(
                "this stream was started on another event loop, where its run goes on; iterate over it there, or start "
                "a stream of another session here"
            )
        if self._waiting:
            raise MisuseError("two tasks iterate over one stream; a stream has one consumer")
        if self._background is None:
            self._background = Runtime.current().start(_host, self._run, self._mailbox, name="arun run")
            self._token = current_token()
            self._started(self._background)
        self._waiting = True
        try:
            event = await self._mailbox.take()
        finally:
            self._waiting = False
        if event is not None:
            return event
        try:
            await self._background.wait()
        except Exception:
            self._closed = True
            raise
        self._closed = True  # not before: one who was cancelled while waiting may ask again, and is told of the error
        raise StopAsyncIteration

    def with_timeout(self, seconds: float) -> Timed[Event]:
        """The same events, each with a time limit.

        :param seconds: until the next event has come; after that a TimeoutError is raised, and the stream goes on.
        """
        return Timed(self, seconds)

    async def aclose(self) -> None:
        """Cancel the run, if it still goes, and wait for its clean-up."""
        self._closed = True
        self._mailbox.close()
        if self._background is not None and not self._background.done:
            self._background.cancel()
            with anyio.CancelScope(shield=True):
                await self._background.ended()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        background = self._background
        if background is not None and not background.done:
            background.cancel_soon()


async def _host(run: Callable[[Sink], Awaitable[R]], mailbox: _Mailbox) -> R:
    try:
        return await run(mailbox)
    except Exception as exc:
        if anyio.current_effective_deadline() == -math.inf:  # its consumer has left, and is told of nothing any more
            log.warning("run.failed_unread", error=repr(exc))
        raise
    finally:
        mailbox.end()


class _Mailbox:
    """Events on their way to one consumer; so many lifecycle events and items wait in it at most."""

    __slots__ = (
        "_capacity",
        "_conflate",
        "_due",
        "_ended",
        "_events",
        "_last",
        "_mergeable",
        "_period",
        "_room",
        "_size",
        "_taker",
        "_urgent",
    )

    def __init__(self, *, conflate: bool, period: float) -> None:
        self._conflate = conflate
        self._capacity = _CAPACITY_CONFLATED if conflate else _CAPACITY
        self._period = period
        # By number, in the order of arrival.
        self._events: dict[int, Event] = {}
        # The waiting Partial and the waiting Item of each action and path, by number, where events are conflated.
        self._mergeable: dict[_Key, int] = {}
        self._size = 0
        self._urgent = 0
        # When the last delivery began, and the number of the last event in it.
        self._last = float("-inf")
        self._due = 0
        self._ended = False
        self._room: anyio.Event | None = None
        self._taker: anyio.Event | None = None

    @property
    def full(self) -> bool:
        return self._size >= self._capacity and not self._ended

    async def room(self, kind: object) -> None:
        """Wait for room, unless it is for a run's last event, or the consumer has left."""
        while self.full and kind not in _LAST:
            self._room = self._room or anyio.Event()
            await self._room.wait()

    def put(self, event: Event) -> None:
        """Add an event."""
        if self._ended:
            return
        if self._conflate and isinstance(event, (Partial, Item)):
            key = (type(event), event.action, event.path)
            before = self._events.pop(self._mergeable.get(key, 0), None)
            if isinstance(event, Item):
                self._size += len(event.values)
                if isinstance(before, Item):
                    event = msgspec.structs.replace(event, values=before.values + event.values)
            elif isinstance(before, Partial):
                event = msgspec.structs.replace(event, changed=before.changed | event.changed)
            self._mergeable[key] = event.seq
        else:
            self._urgent += 1
            self._size += 1
            # What an action sends when it runs again is not merged with what it sent before.
            if self._mergeable:
                for kind in (Partial, Item):
                    self._mergeable.pop((kind, event.action, event.path), None)
        self._events[event.seq] = event
        if self._taker is not None:
            self._taker.set()

    async def take(self) -> Event | None:
        """The next event; None once the run has ended and all events are taken."""
        while True:
            pause = self._pause() if self._events else None
            if pause is not None and pause <= 0:
                break
            if self._ended:
                return None
            self._taker = anyio.Event()
            with anyio.move_on_after(pause):
                await self._taker.wait()
            self._taker = None
        number = next(iter(self._events))
        event = self._events.pop(number)
        if self._conflate and isinstance(event, (Partial, Item)):
            key = (type(event), event.action, event.path)
            if self._mergeable.get(key) == number:
                del self._mergeable[key]
            if isinstance(event, Item):
                self._size -= len(event.values)
        else:
            self._urgent -= 1
            self._size -= 1
        if self._room is not None:
            self._room.set()
            self._room = None
        return event

    def _pause(self) -> float:
        """Seconds until the next event may be delivered. Deliveries are a period apart; each takes all that waits."""
        if not self._period or next(iter(self._events)) <= self._due:
            return 0.0
        now = anyio.current_time()
        pause = self._last + self._period - now
        if pause > 0 and not (self._urgent or self._ended or self._size >= self._capacity):
            return pause
        self._last, self._due = now, next(reversed(self._events))
        return 0.0

    def end(self) -> None:
        """No more events will come."""
        self._ended = True
        if self._taker is not None:
            self._taker.set()
        if self._room is not None:
            self._room.set()

    def close(self) -> None:
        """Nobody takes events any more."""
        self._events.clear()
        self._mergeable.clear()
        self.end()
