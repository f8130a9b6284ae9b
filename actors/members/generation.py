"""Generation: one life of an actor, from the start of its process to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from actors.finish import finish
from actors.hosts.health import HEALTH, Vitals
from actors.hosts.host import START
from actors.members.lives import ActorHealth
from actors.members.patience import within
from arun.errors import ChannelLost, ProtocolError
from arun.logs import get_logger
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.members.body import Body, End
    from arun.channel import Connection

__all__ = ("Generation", "Vigil")

log = get_logger("actors.generation")

_DEATH_NOTICE = 5.0
"""Seconds that a lost connection waits for another one, or to hear that the process ended."""

_RECONNECT_DELAYS = (0.0, 0.05, 0.2, 1.0)
"""Seconds before each attempt to connect again; the last one for all that follow."""

_LOOKS = 4
"""How often the health is asked for within the time after which an actor counts as dead."""


class Vigil:
    """When a living process counts as dead.

    :ivar silence: seconds without an answer of its health thread.
    :ivar hung_after: seconds for which its event loop stands still; None: never.
    """

    __slots__ = ("hung_after", "silence")

    def __init__(self, silence: float, hung_after: float | None) -> None:
        self.silence = silence
        self.hung_after = hung_after

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(self.silence, self.hung_after or self.silence) / _LOOKS


class Generation:
    """One life of an actor. It is the :class:`~actors.members.link.Line` that calls take, once it is up.

    A connection that is lost while the process lives is replaced by another; what was in flight on it is lost.

    :ivar number: from 1.
    :ivar how: how it ended, as a phrase that continues "the actor"; None while it lives.
    :ivar abnormal: False where it ended by itself and in good order.
    :param on_end: called once, in this event loop, when it has ended.
    """

    def __init__(
        self, name: str, number: int, body: Body, *, vigil: Vigil, on_end: Callable[[Generation], object]
    ) -> None:
        self.name = name
        self.number = number
        self.body = body
        self.how: str | None = None
        self.abnormal = True
        self._vigil = vigil
        self._on_end = on_end
        self._connection: Connection | None = None
        self._health: Connection | None = None
        self._ended = anyio.Event()
        self._changed = anyio.Event()
        self._stopping: Background[None] | None = None
        self._killed_because: str | None = None
        self._watches = [Runtime.current().start(self._watch_end, name=f"watch of actor {name}")]

    @property
    def pid(self) -> int | None:
        return self.body.pid

    @property
    def connection(self) -> Connection:
        assert self._connection is not None  # nobody gets to know it before it is up
        return self._connection

    async def start(self) -> None:
        """Connect to it and wait until it is ready.

        :raises ChannelLost: it ended; :attr:`how` tells how.
        :raises Exception: what the constructor or ``on_start`` raised.
        """
        try:
            self._connection = await self.body.connect()
        except ChannelLost:
            await self.notice_death()
            raise
        for watch in (self._watch_health, self._stay_connected):
            self._watches.append(Runtime.current().start(watch, name=f"watch of actor {self.name}"))
        await self._start()
        if self.how is not None:
            raise ChannelLost(f"the process of actor {self.name!r} ended as soon as it was ready")

    async def stop(self, grace: float, how: str) -> None:
        """End it. Every caller waits for the same end, and cancelling one does not cut that short."""
        if self._stopping is None:
            if self.how is None:
                self.how = how
                self._tell()
            self._stopping = Runtime.current().start(self._stop, grace, name=f"stop of actor {self.name}")
        await finish(self._stopping)

    async def health(self) -> ActorHealth:
        """How it fares, as far as that is heard within a second."""
        if self.how is not None:
            return ActorHealth(state="dead", generation=self.number)
        vitals = await self._vitals(1.0)
        if vitals is None:
            return ActorHealth(state="silent" if self.how is None else "dead", generation=self.number)
        return ActorHealth(
            state="blocked" if vitals.blocked_for else "alive",
            generation=self.number,
            blocked_for=vitals.blocked_for,
            where=vitals.where,
            running=vitals.running,
            waiting=vitals.waiting,
            mailbox=vitals.mailbox,
        )

    async def regain(self, lost: Connection) -> bool:
        with anyio.move_on_after(_DEATH_NOTICE):
            while self.how is None and self._connection is lost:
                await self._changed.wait()
        return self.how is None and self._connection is not lost

    async def notice_death(self) -> None:
        """Wait a moment to hear how it ended."""
        with anyio.move_on_after(_DEATH_NOTICE):
            await self._ended.wait()

    async def _start(self) -> None:
        while True:
            connection = self.connection
            try:
                await connection.call(START)
            except ChannelLost:
                if not connection.closed:  # the constructor or on_start raised it
                    raise
                if not await self.regain(connection):
                    raise
            else:
                return

    async def _stay_connected(self) -> None:
        attempt = 0
        while self.how is None:
            lost = self.connection
            await lost.wait_closed()
            delay = _RECONNECT_DELAYS[min(attempt, len(_RECONNECT_DELAYS) - 1)]
            with anyio.move_on_after(delay):
                await self._ended.wait()
            if self.how is not None:
                return
            try:
                self._connection = await self.body.reconnect()
            except (ChannelLost, ProtocolError):
                attempt += 1
                continue
            attempt = 0
            log.warning("actor.reconnected", actor=self.name, generation=self.number, pid=self.pid)
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _vitals(self, patience: float) -> Vitals | None:
        """What its health thread tells within so many seconds."""
        try:
            return await within(patience, self._ask_health)
        except (ChannelLost, TimeoutError):
            return None

    async def _ask_health(self) -> Vitals:
        if self._health is None or self._health.closed:
            self._health = await self.body.connect_health()
        vitals: Vitals = await self._health.call(HEALTH, result_type=Vitals)
        return vitals

    async def _watch_health(self) -> None:
        heard = anyio.current_time()
        while self.how is None:
            vitals = await self._vitals(self._vigil.silence)
            hung_after = self._vigil.hung_after
            if vitals is None:
                if anyio.current_time() - heard >= self._vigil.silence:
                    self._kill(f"was killed: it gave no sign of life for {self._vigil.silence:g} s, as if stopped")
            else:
                heard = anyio.current_time()
                if hung_after is not None and vitals.blocked_for >= hung_after:
                    self._kill(
                        f"was killed: its event loop stood still for {vitals.blocked_for:.1f} s in {vitals.where}, and "
                        f"@actor(hung_after={hung_after:g}) allows less"
                    )
            with anyio.move_on_after(self._vigil.interval):
                await self._ended.wait()

    def _kill(self, how: str) -> None:
        if self.how is None and self._killed_because is None:
            log.warning("actor.killed", actor=self.name, generation=self.number, pid=self.pid, how=how)
            self._killed_because = how
            self.body.kill()

    async def _stop(self, grace: float) -> None:
        await self.body.stop(grace)
        for watch in self._watches:
            watch.cancel()
            await watch.ended()
        self._ended.set()
        for connection in (self._health, self._connection):
            if connection is not None:
                with anyio.move_on_after(grace):
                    await connection.aclose()

    async def _watch_end(self) -> None:
        end: End = await self.body.wait_ended()
        if self.how is None:
            self.how = self._killed_because or end.how
            self.abnormal = end.abnormal
            self._on_end(self)
        self._ended.set()
        self._tell()
