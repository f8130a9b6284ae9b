"""A detached actor, as it is in its process: clients of several programs come and go, and Ray starts it again.

Ray starts a dead process again and asks for no budget and no back-off. So each new process first looks up, in Ray's
key-value store, when those before it died, and lets the same :class:`~actors.members.supervision.Restarts` judge as
everywhere.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import msgspec

from actors.hosts.guards import continue_without_parent
from actors.hosts.host import Host
from actors.members.supervision import GiveUp, Restarts, Supervisor
from actors.on_ray import pickling
from actors.on_ray.ray_host import Doors, Whereabouts, import_ray, open_doors
from arun.errors import ActorDied
from arun.logs import get_logger
from arun.runtime import Background, Runtime
from arun.telemetry import configure_logging_as_parent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arun.channel import TLSConfig

__all__ = ("NAMESPACE", "Card", "DetachedHost", "delay_of_restart")

NAMESPACE = "arun"
"""Ray's namespace of our detached actors, the same for every program."""

log = get_logger("actors.detached_host")

_UNUSED_SECONDS = 60.0
"""How long a token waits for its client before it is taken back."""


class Card(NamedTuple):
    """What a client is told about a detached actor.

    :ivar spec: the pickled :class:`~actors.interface.ActorSpec` without the constructor's arguments.
    :ivar supervisor: how often it is started again; None: never.
    """

    name: str
    key: str
    spec: bytes
    supervisor: Supervisor | None


class DetachedHost:
    """The class that Ray makes a detached actor of. Every client gets a token of its own, over Ray's control plane.

    :param tls: encrypts its messages; every client needs one that fits.
    :raises ActorDied: it died too often. Ray does not start an actor again whose constructor fails.
    """

    def __init__(self, blob: bytes, card: Card, tls: TLSConfig | None) -> None:
        configure_logging_as_parent()
        continue_without_parent()
        self._card = card
        self._tls = tls
        self._host = Host(lambda: pickling.loads(blob))
        self._delay = 0.0
        self._opening: Background[Doors] | None = None
        if import_ray().get_runtime_context().was_current_actor_reconstructed:
            self._delay = _Deaths(card).one_more()
            Runtime.current().start(self._come_back, name=f"restart of actor {card.name}")

    async def card(self) -> Card:
        """What a client needs to know."""
        return self._card

    async def attach(self, token: bytes) -> Whereabouts:
        """Let one more client in; the object is started over the channel, by the first of them.

        :param token: opens the channel until the client's connection has ended.
        """
        doors = await self._open()

        def revoke() -> None:
            doors.server.revoke(token)
            doors.health.post(lambda health: health.revoke(token))

        def revoke_unused() -> None:
            if not doors.server.in_use(token):
                revoke()

        doors.health.post(lambda health: health.admit(token))
        doors.server.admit(token, on_left=revoke)
        asyncio.get_running_loop().call_later(_UNUSED_SECONDS, revoke_unused)
        return doors.where

    async def wait_dead(self) -> None:
        """Never returns: the call fails when the process is gone."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """End the object, ``on_stop`` included."""
        self._host.stop()
        try:
            await self._host.wait_ended()
        finally:
            _Deaths(self._card).forget()

    async def _open(self) -> Doors:
        if self._opening is None:
            self._opening = Runtime.current().start(self._open_doors, name=f"doors of actor {self._card.name}")
        return await self._opening.wait()

    async def _open_doors(self) -> Doors:
        await anyio.sleep(self._delay)
        return await open_doors(self._host, secrets.token_bytes(32), self._tls)

    async def _come_back(self) -> None:
        """Start again without being asked: it may have work of its own to do."""
        await self._open()
        try:
            await self._host.start()
        except Exception:
            log.exception("actor.restart_failed", actor=self._card.name)
            os._exit(1)  # so that it counts as a death
        log.warning("actor.restarted", actor=self._card.name, pid=os.getpid())


def delay_of_restart(supervisor: Supervisor, deaths: Sequence[float], now: float) -> float:
    """Seconds to wait before a restart.

    :param deaths: when it died before, the oldest first, on the clock of ``now``.
    :raises ActorDied: it is not to be started again.
    """
    restarts = Restarts(supervisor)
    for death in deaths:
        restarts.died(death)
    verdict = restarts.died(now)
    if isinstance(verdict, GiveUp):
        raise ActorDied(f"it is not started again: {verdict.reason}")
    return verdict.at - now


class _Deaths:
    """When the processes of one actor died, kept in Ray's key-value store."""

    def __init__(self, card: Card) -> None:
        self._supervisor = card.supervisor or Supervisor(intensity=0)
        self._key = f"deaths of {card.key}".encode()
        self._store: Any = import_ray().experimental.internal_kv

    def one_more(self) -> float:
        """Seconds to wait before the next one starts. :raises ActorDied: there is to be none."""
        told: bytes | None = self._store._internal_kv_get(self._key, namespace=NAMESPACE)
        deaths = msgspec.msgpack.decode(told, type=list[float]) if told else []
        now = max([time.time(), *deaths])  # by the clocks of several machines
        try:
            delay = delay_of_restart(self._supervisor, deaths, now)
        except ActorDied:
            self.forget()
            raise
        kept = msgspec.msgpack.encode([*deaths, now][-self._supervisor.intensity - 1 :])
        self._store._internal_kv_put(self._key, kept, True, namespace=NAMESPACE)
        return delay

    def forget(self) -> None:
        self._store._internal_kv_del(self._key, namespace=NAMESPACE)
