"""Detached actors of a Ray, as a client sees them: how they are started, found, followed through restarts, and ended.

Nobody owns one. Ray knows it by its name and starts it again; each client asks it for a token, and attaches again after
a restart. So the client's :class:`~actors.members.member.Member` is the same as for an actor of its own, on another
body.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from actors.members.body import End
from actors.members.supervision import GiveUp, Supervisor
from actors.on_ray import pickling
from actors.on_ray.detached_host import NAMESPACE, Card, DetachedHost
from actors.on_ray.ray_host import Whereabouts, how_it_died, import_ray
from arun.channel import connect_tcp
from arun.errors import ActorNotFound, ChannelLost, MisuseError
from arun.logs import get_logger
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from actors.interface import ActorSpec
    from actors.members.member import Member
    from actors.members.supervision import RestartPolicy
    from arun.channel import Connection, TLSConfig

__all__ = ("Attachment", "NameTaken", "card_of", "create", "end", "find", "names", "supervisor_of")

log = get_logger("actors.detached")

_LOOK_SECONDS = 0.2
"""How often to ask for an actor that Ray is starting again; Ray tells nobody when it is up."""

_END_SECONDS = 5.0
"""How long a killed process may take to be gone."""


def supervisor_of(restart: RestartPolicy | None, restarts: int | Supervisor | None) -> Supervisor | None:
    """How often a detached actor is started again; None: never.

    :raises MisuseError: what was asked for is no supervision of a single actor.
    """
    if restart not in {None, "permanent", "transient", "temporary"}:
        raise MisuseError(f"restart={restart!r}: it must be 'permanent', 'transient' or 'temporary'")
    if restart == "temporary" or (restart is None and restarts is None):
        if restarts:
            raise MisuseError(f"restart='temporary' means no restart, so restarts={restarts} can have no effect")
        return None
    if restart == "permanent":
        raise MisuseError(
            "restart='permanent': Ray does not start an actor again that ended in good order; leave restart= out"
        )
    supervisor = (
        restarts if isinstance(restarts, Supervisor) else Supervisor(intensity=3 if restarts is None else restarts)
    )
    if supervisor.strategy != "one_for_one":
        raise MisuseError(
            f"strategy={supervisor.strategy!r}: a detached actor is started again by Ray, which knows of no others "
            "that rely on it; spawn them from an actor that is detached itself"
        )
    return supervisor


class NameTaken(Exception):
    """There is a detached actor of that name."""


def create(
    spec: ActorSpec, *, env: Mapping[str, str], supervisor: Supervisor | None, tls: TLSConfig | None
) -> tuple[Any, Card]:
    """Let Ray start a detached actor; blocks for a round trip to its head node.

    :return: Ray's handle, and what every client will be told.
    :raises NameTaken: there is one of that name.
    """
    card = Card(spec.name, spec.key, pickling.dumps(replace(spec, args=(), kwargs={})), supervisor)
    options: dict[str, Any] = {
        "name": spec.name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": 0 if supervisor is None else -1,  # DetachedHost keeps the budget
        "max_task_retries": 0,
    }
    if env:
        options["runtime_env"] = {"env_vars": dict(env)}
    try:
        host = import_ray().remote(DetachedHost).options(**options)
        return host.remote(pickling.dumps(spec), card, tls), card
    except ValueError as exc:  # Ray's error for a name that is taken
        raise NameTaken(str(exc)) from exc


def find(name: str) -> Any:
    """Ray's handle of a detached actor, or None; blocks for a round trip to its head node."""
    try:
        return import_ray().get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def names() -> list[str]:
    """The detached actors of this Ray; blocks for a round trip to its head node."""
    known = import_ray().util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in known if actor["namespace"] == NAMESPACE)


async def card_of(actor: Any, name: str) -> Card:
    """What a detached actor tells about itself.

    :raises ActorNotFound: it has ended.
    """
    try:
        card: Card = await _answer(lambda: actor.card.remote())
    except import_ray().exceptions.RayActorError as exc:
        raise ActorNotFound(f"the detached actor {name!r} has ended: {exc}") from exc
    return card


async def end(actor: Any, name: str, grace: float) -> None:
    """End a detached actor for everybody: ``on_stop`` is awaited, then it is killed.

    :param grace: seconds that ``on_stop`` gets.
    """
    ray = import_ray()
    with anyio.move_on_after(grace):
        try:
            await actor.stop.remote()
        except ray.exceptions.RayActorError:
            pass  # it is dead already, or being started again
        except Exception:
            log.exception("actor.stop_failed", actor=name)
    ray.kill(actor, no_restart=True)
    with anyio.move_on_after(_END_SECONDS) as scope, contextlib.suppress(ray.exceptions.RayError):
        await _answer(lambda: actor.wait_dead.remote())
    if scope.cancelled_caught:
        log.warning("actor.outlives_kill", actor=name, seconds=_END_SECONDS)


class Attachment:
    """One client's way to a detached actor, through its restarts.

    It takes the place of a :class:`~actors.members.team.Team`: what died is not started again by it, only attached to
    again.

    :param on_over: called when there is nothing to attach to any more; by then its name may be another's.
    """

    def __init__(self, actor: Any, card: Card, tls: TLSConfig | None, on_over: Callable[[Member], object]) -> None:
        self.members: list[Member] = []
        self.over = False
        self.tls = tls
        self._actor = actor
        self._on_over = on_over
        self._supervised = card.supervisor is not None
        self._work: Background[None] | None = None

    def launch(self, spec: ActorSpec) -> DetachedBody:
        """The body of the generation that is up, or will be."""
        return DetachedBody(self._actor, spec.name, self)

    def died(self, member: Member) -> None:
        """A generation has ended: attach to the next one. Returns at once."""
        if self._work is None or self._work.done:
            self._work = Runtime.current().start(self._follow, member, name=f"restart of actor {member.spec.name}")

    async def settled(self) -> None:
        """Wait until nothing is being attached to."""
        if self._work is not None:
            await self._work.ended()

    async def _follow(self, member: Member) -> None:
        reason = "Ray says that it has ended for good" if self._supervised else "its restart policy is 'temporary'"
        while self._supervised and member.is_down and not self.over:
            if await member.restart(anyio.current_time(), 0):
                return
            if not self.over:
                await anyio.sleep(_LOOK_SECONDS)
        if member.is_down:
            member.give_up(GiveUp(reason, 0))
            self._on_over(member)


class DetachedBody:
    """One client's view of one process of a detached actor; see :class:`~actors.members.body.Body`."""

    def __init__(self, actor: Any, name: str, attachment: Attachment) -> None:
        self._actor = actor
        self._name = name
        self._attachment = attachment
        self._token = secrets.token_bytes(32)
        self._where: Whereabouts | None = None
        self._how = ""
        self._attached = anyio.Event()
        self._pidfd: int | None = None

    @property
    def pid(self) -> int | None:
        return None if self._where is None else self._where.pid

    @property
    def address(self) -> str:
        return "" if self._where is None else f"{self._where.host}:{self._where.port}"

    async def connect(self) -> Connection:
        ray = import_ray()
        try:
            where: Whereabouts = await _answer(lambda: self._actor.attach.remote(self._token))
        except ray.exceptions.RayActorError as exc:
            self._attachment.over = True
            self._how = _end_of(str(exc))
            self._attached.set()
            raise ChannelLost(f"the detached actor {self._name!r} {self._how}") from exc
        self._where = where
        self._attached.set()
        if where.node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(where.pid)
        return await connect_tcp(where.host, where.port, token=self._token, tls=self._attachment.tls)

    async def reconnect(self) -> Connection:
        token = secrets.token_bytes(32)  # the host has taken the other one back
        try:
            where: Whereabouts = await self._actor.attach.remote(token)
        except import_ray().exceptions.RayError as exc:
            raise ChannelLost(f"the detached actor {self._name!r} can't be reached: {exc}") from exc
        if where != self._where:
            raise ChannelLost(f"the detached actor {self._name!r} was started again")
        self._token = token
        return await connect_tcp(where.host, where.port, token=token, tls=self._attachment.tls)

    async def connect_health(self) -> Connection:
        assert self._where is not None  # connected
        port, tls = self._where.health_port, self._attachment.tls
        return await connect_tcp(self._where.host, port, token=self._token, tls=tls)

    async def wait_ended(self) -> End:
        await self._attached.wait()
        if self._where is None:
            return End(self._how, abnormal=True)
        try:
            await self._actor.wait_dead.remote()
        except import_ray().exceptions.RayError as exc:
            return End(_end_of(str(exc)), abnormal=True)
        return End("ended", abnormal=False)

    def kill(self) -> None:
        # For everybody: it is stopped or hangs. Ray asks a process to end, which one that is stopped can't do.
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        else:
            import_ray().kill(self._actor, no_restart=False)

    async def stop(self, grace: float) -> None:
        """Let go of it; the actor lives on."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


async def _answer(ask: Any) -> Any:
    """What the actor answers; while Ray is starting it again, it is asked again and again."""
    unavailable = import_ray().exceptions.ActorUnavailableError
    while True:
        try:
            return await ask()
        except unavailable:
            await anyio.sleep(_LOOK_SECONDS)


def _end_of(told: str) -> str:
    """How it ended, as a phrase that continues "the actor"."""
    given_up = re.search(r"ActorDied: (it is not started again: .*)", told)
    if given_up is not None:
        return f"died too often: {given_up[1]}"
    unavailable = re.search(r"is unavailable: (.*?)(?= The task may or may not|\s*$)", told, re.DOTALL)
    if unavailable is not None:
        return f"died, or Ray can't reach it ({unavailable[1].strip()})"
    return how_it_died(told)
