"""The actors of one cluster: their names, their order of start, and their ends."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import anyio

from actors.actor import link_of
from actors.interface import ActorSpec, specify
from actors.members.lives import Monitor
from actors.members.member import Member
from actors.members.supervision import Supervisor
from actors.members.team import Team
from actors.on_ray.detached import Attachment
from arun.errors import ActorNotFound, MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from actors.actor import ActorHandle
    from actors.bundles import Group
    from actors.members.body import Body
    from actors.members.lives import ActorHealth, ActorInfo
    from actors.members.supervision import RestartPolicy

__all__ = ("Roster",)


class Roster:
    """Starts, finds and ends the actors of one cluster.

    :param grace: seconds that ``on_stop`` gets before the process is killed; all actors together when everything ends.
    :param silence: seconds without an answer of its health thread after which an actor is killed.
    """

    def __init__(self, *, grace: float, silence: float) -> None:
        if not silence > 0:
            raise MisuseError(f"silence={silence}: it must be more than 0 seconds")
        self._grace = grace
        self._silence = silence
        self._members: dict[str, Member] = {}
        self._teams: list[Team] = []
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
        restart: RestartPolicy | None,
        restarts: int | Supervisor | None,
        get_if_exists: bool,
        launch: Callable[[ActorSpec], Body],
    ) -> ActorHandle:
        """Start an actor in bodies that ``launch`` makes. See :meth:`actors.cluster.Cluster.spawn`."""
        self._require_open()
        if group is not None and group.released:
            raise MisuseError(f"{group!r} can't take an actor any more; reserve() again")
        if get_if_exists:
            existing = await self._existing(cls, name)
            if existing is not None:
                return existing
            self._require_open()  # still
        if name is None:
            name = f"{getattr(cls, '__name__', 'actor').lower()}-{next(self._numbers)}"
        if not name or not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"name={name!r}: an actor's name is text, or left out")
        if name in self._members:
            raise MisuseError(
                f"an actor named {name!r} exists already; stop it first, choose another name, or pass "
                "get_if_exists=True to have that one"
            )
        policy, team = self._supervision(restart, restarts)
        spec = specify(name, cls, args, kwargs, concurrency=concurrency)
        member = self._members[name] = Member(
            spec, launch, group=group, policy=policy, team=team, grace=self._grace, silence=self._silence
        )
        try:
            await member.start()
        except BaseException:
            await self._remove(member, self._grace)  # noqa: ASYNC102 - finish() lets no cancellation cut it short
            raise
        return member.handle

    async def attach(self, spec: ActorSpec, attachment: Attachment) -> ActorHandle:
        """Have an actor here that lives elsewhere, and let go of it where one that lives here would be ended."""
        if await self.settled(spec.name) is None:  # else somebody else was faster
            if self.closed:
                raise MisuseError("this cluster is closed; connect() again")
            member = self._members[spec.name] = Member(
                spec,
                attachment.launch,
                group=None,
                policy="permanent",
                team=attachment,
                grace=self._grace,
                silence=self._silence,
            )
            try:
                await member.start()
            except BaseException:
                await self._remove(member, self._grace)  # noqa: ASYNC102 - finish() lets no cancellation cut it short
                raise
        return self._members[spec.name].handle

    async def stop(self, actor: object) -> None:
        """End one actor, given by handle or name. Stopping it again does nothing.

        :raises ActorNotFound: no actor has that name.
        :raises MisuseError: it belongs to another cluster.
        """
        member = self._find(actor)
        if member is not None:
            await self._remove(member, self._grace)
        elif link_of(actor).gone is None:
            raise MisuseError(f"{actor!r} is no actor of this cluster")

    async def stop_all(self, groups: Container[Group | None] | None = None) -> None:
        """End the actors of these groups, or all; the last started first, all within one grace."""
        deadline = anyio.current_time() + self._grace
        for member in reversed(list(self._members.values())):
            if groups is None or member.group in groups:
                await self._remove(member, max(0.0, deadline - anyio.current_time()))
        if groups is None:
            for team in self._teams:
                await team.settled()

    def attached_name(self, actor: object) -> str | None:
        """The name of an actor that was only attached to; None for one that lives here."""
        member = self._find(actor)
        return member.spec.name if member is not None and isinstance(member.team, Attachment) else None

    def forget(self, member: Member) -> None:
        """Give its name away: it lives elsewhere, and has ended there."""
        if self._members.get(member.spec.name) is member:
            del self._members[member.spec.name]

    def get(self, name: str, cls: type | None = None) -> ActorHandle:
        """The handle of the actor with that name.

        :raises ActorNotFound: there is none.
        :raises MisuseError: it is of another class.
        """
        member = self._named(name)
        if cls is not None and not _same(cls, member.spec.cls):
            raise MisuseError(f"the {member.link.describe()} is no {cls.__qualname__}")
        return member.handle

    def monitor(self, actor: object) -> Monitor:
        """What happens to an actor; see :meth:`actors.cluster.Cluster.monitor`."""
        return Monitor(self._known(actor).chronicle)

    async def health(self, actor: object) -> ActorHealth:
        """How an actor fares; see :meth:`actors.cluster.Cluster.health`."""
        return await self._known(actor).health()

    def infos(self) -> list[ActorInfo]:
        """Every actor that was not stopped, in order of start."""
        return [member.info() for member in self._members.values()]

    def has(self, name: str) -> bool:
        """Whether an actor of this cluster has that name."""
        return name in self._members

    async def settled(self, name: str) -> Member | None:
        """The actor of this cluster that has that name. One that is being started is waited for; it may fail."""
        while (member := self._members.get(name)) is not None:
            await member.tried.wait()
            if member.started:
                return member
            await self._remove(member, self._grace)
        return None

    async def _existing(self, cls: type, name: str | None) -> ActorHandle | None:
        if name is None:
            raise MisuseError("get_if_exists=True needs name=...: only a name can exist already")
        while (member := await self.settled(name)) is not None:
            handle = self.get(name, cls)
            if member.link.gone is None:
                return handle
            await self._remove(member, self._grace)  # it has died, and is not started again
        return None

    def _require_open(self) -> None:
        if self.closed:
            raise MisuseError("this cluster is closed, so no actor can be started in it")

    def _supervision(
        self, restart: RestartPolicy | None, restarts: int | Supervisor | None
    ) -> tuple[RestartPolicy, Team | None]:
        if restart not in {None, "permanent", "transient", "temporary"}:
            raise MisuseError(f"restart={restart!r}: it must be 'permanent', 'transient' or 'temporary'")
        policy: RestartPolicy = restart or ("temporary" if restarts is None else "permanent")
        if isinstance(restarts, Supervisor):
            for team in self._teams:
                if team.supervisor is restarts:
                    return policy, team
        elif policy == "temporary":
            if restarts:
                raise MisuseError(f"restart='temporary' means no restart, so restarts={restarts} can have no effect")
            return policy, None
        if not isinstance(restarts, Supervisor):
            restarts = Supervisor() if restarts is None else Supervisor(intensity=restarts)
        team = Team(restarts)
        self._teams.append(team)
        return policy, team

    def _find(self, actor: object) -> Member | None:
        if isinstance(actor, str):
            return self._named(actor)
        link = link_of(actor)
        return next((member for member in self._members.values() if member.link is link), None)

    def _known(self, actor: object) -> Member:
        member = self._find(actor)
        if member is None:
            raise MisuseError(f"{actor!r} is no actor of this cluster, or was stopped")
        return member

    def _named(self, name: str) -> Member:
        member = self._members.get(name)
        if member is None:
            names = ", ".join(repr(known) for known in self._members) or "none"
            raise ActorNotFound(f"no actor is named {name!r}; this cluster has: {names}")
        return member

    async def _remove(self, member: Member, grace: float) -> None:
        await member.stop(grace)
        if self._members.get(member.spec.name) is member:
            del self._members[member.spec.name]
        if member.team is not None and not member.team.members:
            await member.team.settled()
            if member.team in self._teams:
                self._teams.remove(member.team)


def _same(one: type, other: type) -> bool:
    """Whether it is the same class; that of a main program is another object in each process."""
    return one is other or (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
