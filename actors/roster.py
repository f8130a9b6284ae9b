"""The actors of one cluster: their names, their order of start, and their ends.

Both clusters keep theirs here; what differs between them is a ``Body``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from actors.actor import ActorHandle, Link, link_of
from actors.cluster import ActorInfo
from actors.finish import finish
from actors.host import START
from actors.interface import ActorSpec, specify
from arun.errors import ActorNotFound, MisuseError
from arun.logs import get_logger
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from actors.bundles import Group
    from arun.channel import Connection

__all__ = ("Body", "Roster")

log = get_logger("actors.roster")

_DEATH_NOTICE = 5.0
"""Seconds that a lost connection waits to hear that the process ended, before it counts as only that."""


class Body(Protocol):
    """Where one actor lives: a process of ours, a Ray actor, or a task. Made without waiting, so never half made."""

    @property
    def pid(self) -> int | None: ...

    @property
    def address(self) -> str: ...

    async def connect(self) -> Connection:
        """Wait until it listens and connect.

        :raises ChannelLost: it ended first.
        """
        ...

    async def wait_ended(self) -> str:
        """Wait for its end and tell how, as a phrase that continues "the actor"."""
        ...

    async def stop(self, grace: float) -> None:
        """Let ``on_stop`` run, then end it; after ``grace`` seconds by force. Never raises for the actor's sake."""
        ...


class Roster:
    """Starts, finds and ends the actors of one cluster.

    :param grace: seconds that ``on_stop`` gets before the process is killed; all actors together when everything ends.
    """

    def __init__(self, *, grace: float) -> None:
        self._grace = grace
        self._members: dict[str, _Member] = {}
        self._numbers = itertools.count(1)
        self.closed = False

    async def spawn(
        self,
        cls: type,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        name: str | None,
        concurrency: int | None,
        group: Group | None,
        launch: Callable[[ActorSpec], Body],
    ) -> ActorHandle:
        """Start an actor in the body that ``launch`` makes. See :meth:`actors.cluster.Cluster.spawn`."""
        if self.closed:
            raise MisuseError("this cluster is closed, so no actor can be started in it")
        if group is not None and group.released:
            raise MisuseError(f"{group!r} can't take an actor any more; reserve() again")
        if name is None:
            name = f"{getattr(cls, '__name__', 'actor').lower()}-{next(self._numbers)}"
        if name in self._members:
            raise MisuseError(f"an actor named {name!r} exists already; stop it first, or choose another name")
        spec = specify(name, cls, args, kwargs, concurrency=concurrency)
        member = self._members[name] = _Member(spec, launch(spec), group)
        try:
            await member.start()
        except BaseException:
            await self._remove(member, self._grace)  # noqa: ASYNC102 - finish() lets no cancellation cut it short
            raise
        log.debug("actor.started", actor=name, pid=member.body.pid, address=member.body.address)
        return member.handle

    async def stop(self, handle: ActorHandle) -> None:
        """End one actor. Stopping it again does nothing.

        :raises MisuseError: it belongs to another cluster.
        """
        for member in self._members.values():
            if member.handle is handle:
                await self._remove(member, self._grace)
                return
        if link_of(handle).ended is None:
            raise MisuseError(f"{handle!r} is no actor of this cluster")

    async def stop_all(self, groups: Container[Group | None] | None = None) -> None:
        """End the actors of these groups, or all; the last started first, all within one grace."""
        deadline = anyio.current_time() + self._grace
        for member in reversed(list(self._members.values())):
            if groups is None or member.group in groups:
                await self._remove(member, max(0.0, deadline - anyio.current_time()))

    def get(self, name: str) -> ActorHandle:
        """The handle of the actor with that name.

        :raises ActorNotFound: there is none.
        """
        member = self._members.get(name)
        if member is None:
            names = ", ".join(repr(known) for known in self._members) or "none"
            raise ActorNotFound(f"no actor is named {name!r}; this cluster has: {names}")
        return member.handle

    def infos(self) -> list[ActorInfo]:
        """Every actor that was not stopped, in order of start."""
        return [member.info() for member in self._members.values()]

    async def _remove(self, member: _Member, grace: float) -> None:
        await member.stop(grace)
        if self._members.get(member.spec.name) is member:
            del self._members[member.spec.name]


class _Member:
    """One actor in the roster."""

    def __init__(self, spec: ActorSpec, body: Body, group: Group | None) -> None:
        self.spec = spec
        self.body = body
        self.group = group
        self._link = Link(spec.name, spec.interface, pid=lambda: body.pid, wait_ended=self._notice_death)
        self.handle = ActorHandle(self._link)
        self._ended = anyio.Event()
        self._stopping: Background[None] | None = None
        self._watch = Runtime.current().start(self._watch_end, name=f"watch of actor {spec.name}")

    async def start(self) -> None:
        """Connect to the actor and wait until it is ready."""
        await self._link.connect(self.body.connect)
        await self._link.call(START)

    async def stop(self, grace: float) -> None:
        """End it. Every caller waits for the same end, and cancelling one does not cut that short."""
        if self._stopping is None:
            self._stopping = Runtime.current().start(self._stop, grace, name=f"stop of actor {self.spec.name}")
        await finish(self._stopping)

    def info(self) -> ActorInfo:
        return ActorInfo(
            name=self.spec.name,
            actor_class=self.spec.interface.class_name,
            pid=self.body.pid,
            address=self.body.address,
            alive=self._link.ended is None,
        )

    async def _stop(self, grace: float) -> None:
        if self._link.ended is None:
            self._link.ended = "was stopped"
        await self.body.stop(grace)
        if self._link.connection is not None:
            with anyio.move_on_after(grace):
                await self._link.connection.aclose()
        self._watch.cancel()

    async def _watch_end(self) -> None:
        how = await self.body.wait_ended()
        if self._link.ended is None:
            self._link.ended = how
            log.warning("actor.died", actor=self.spec.name, pid=self.body.pid, how=how)
        self._ended.set()

    async def _notice_death(self) -> None:
        with anyio.move_on_after(_DEATH_NOTICE):
            await self._ended.wait()
