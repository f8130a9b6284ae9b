"""What is told about the life of an actor: where it is, how it fares, what happened to it."""

from __future__ import annotations

from collections import deque
from typing import Literal, TypeAlias

import anyio
import msgspec

from arun.errors import ActorDied

__all__ = (
    "ActorEvent",
    "ActorHealth",
    "ActorInfo",
    "ActorRestarted",
    "ActorStarted",
    "ActorStopped",
    "Chronicle",
    "GaveUp",
    "Monitor",
)


_KEPT = 256


class ActorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One actor as ``cluster.list()`` shows it.

    :ivar name: unique among the cluster's actors.
    :ivar actor_class: qualified name of its class.
    :ivar pid: process that it lives in, or None while that is being started.
    :ivar address: where it listens: "unix:" and the name that its socket had, "host:port" or "memory".
    :ivar alive: whether its process runs.
    :ivar generation: which of its lives this is, from 1; every restart begins another.
    """

    name: str
    actor_class: str
    pid: int | None
    address: str
    alive: bool
    generation: int = 1


class ActorHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How an actor fares, as ``cluster.health()`` tells it. A thread of its own answers, so a busy actor answers too.

    :ivar state: "alive"; "blocked": its event loop does not turn; "silent": not even that thread answers, as in a
        stopped process; "restarting"; "dead".
    :ivar blocked_for: seconds since the event loop was first asked for a sign without giving one.
    :ivar where: what a blocked loop is doing, as ``function at file:line``.
    :ivar running: messages that it works on.
    :ivar waiting: messages in its mailbox.
    :ivar mailbox: how many messages may wait.
    """

    state: Literal["alive", "blocked", "silent", "restarting", "dead"]
    generation: int
    blocked_for: float = 0.0
    where: str = ""
    running: int = 0
    waiting: int = 0
    mailbox: int = 0

    def __str__(self) -> str:
        match self.state:
            case "blocked":
                return f"alive, loop blocked for {self.blocked_for:.1f} s in {self.where}"
            case "alive":
                return f"alive, {self.running} running, {self.waiting} of {self.mailbox} waiting"
            case state:
                return state


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    actor: str
    generation: int


class ActorStarted(_Event, frozen=True, kw_only=True):
    """The first generation of an actor is ready."""

    pid: int | None


class ActorRestarted(_Event, frozen=True, kw_only=True):
    """A further generation is ready; calls go to it. What the one before had in memory is lost."""

    pid: int | None


class GaveUp(_Event, frozen=True, kw_only=True):
    """A dead actor is not started again.

    :ivar reason: why, as a phrase that continues "it is not started again:".
    """

    reason: str


class ActorStopped(_Event, frozen=True, kw_only=True):
    """The actor was stopped in good order."""


ActorEvent: TypeAlias = ActorStarted | ActorDied | ActorRestarted | GaveUp | ActorStopped


class Chronicle:
    """The latest events of one actor, and who waits for the next."""

    def __init__(self) -> None:
        self._events: deque[ActorEvent] = deque(maxlen=_KEPT)
        self._count = 0
        self._next = anyio.Event()

    def add(self, event: ActorEvent) -> None:
        self._events.append(event)
        self._count += 1
        self._next.set()
        self._next = anyio.Event()

    async def after(self, position: int) -> tuple[int, ActorEvent | None]:
        """The first event after ``position`` that is still known, with its position; None when none will follow."""
        while position >= self._count:
            if self._events and isinstance(self._events[-1], GaveUp | ActorStopped):
                return position, None
            await self._next.wait()
        index = max(0, position - (self._count - len(self._events)))
        position = self._count - len(self._events) + index
        return position + 1, self._events[index]

    def position_of_latest(self) -> int:
        return max(0, self._count - 1)


class Monitor:
    """The events of one actor, in order: the latest one first, then each that follows. Ends with the actor.

    Nothing is held open by it, so it may be dropped at any time. Whoever falls 256 events behind misses the oldest.
    """

    __slots__ = ("_chronicle", "_position")

    def __init__(self, chronicle: Chronicle) -> None:
        self._chronicle = chronicle
        self._position = chronicle.position_of_latest()

    def __aiter__(self) -> Monitor:
        return self

    async def __anext__(self) -> ActorEvent:
        self._position, event = await self._chronicle.after(self._position)
        if event is None:
            raise StopAsyncIteration
        return event
