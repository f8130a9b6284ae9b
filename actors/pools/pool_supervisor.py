"""PoolSupervisor: the detached actor that owns a detached pool: groups, membership, restarts, admission, quarantine.

    client (AttachedEngines) --requests--> PoolSupervisor (OwnedEngines) --requests--> EngineActor
                             <--deltas----                               <--deltas----

Every decision about a request is made in this one place, also where several programs share the engines: what a lost
replica had in flight of whom, who waits for it, and which request is not tried again. So deltas come through it, too.
The engines are actors of this process, in groups of this process: Ray ends both with it, however it ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from actors.actor import actor, method
from actors.answers import Delta, Reset
from actors.engine import EngineInfo, EngineMetrics, EngineSpec, GenerateRequest
from actors.pools.engines import PoolSettings
from actors.pools.owned_engines import OwnedEngines
from actors.pools.pool_state import Reroute
from actors.pools.pool_stats import PoolStats, ReplicaProgress
from arun.logs import get_logger
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from actors.cluster import Cluster

__all__ = ("Answered", "PoolFacts", "PoolSupervisor", "PoolView")

log = get_logger("arun.pool")

_VIEW_SECONDS = 1.0
_MANY = 1_000_000  # who may have how many requests is the pool's to say, not the mailbox's


class Answered(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """A delta on its way to a client.

    :ivar replica: that it comes from.
    :ivar attempt: of a :class:`~actors.Reset`, which has no delta; else 0.
    """

    delta: Delta
    replica: int | None = None
    attempt: int = 0


class PoolFacts(msgspec.Struct, frozen=True):
    """What a client has to know of a pool before its first request; see :class:`~actors.pools.engines.Engines`."""

    generates: bool
    capacity: int
    stats: PoolStats


class PoolView(msgspec.Struct, frozen=True):
    """What there is to see of a pool.

    :ivar progress: what has changed since the last view.
    :ivar capacity: see :class:`~actors.pools.engines.Engines`.
    """

    progress: tuple[ReplicaProgress, ...]
    stats: PoolStats
    capacity: int


@actor(concurrency=_MANY)
class PoolSupervisor:
    """One pool and its engines.

    :param cluster: what its own is made with, :attr:`~actors.Cluster.settings` of the one that it was started from.
    """

    def __init__(self, pool: str, spec: EngineSpec, settings: PoolSettings, cluster: dict[str, Any]) -> None:
        from actors.ray_cluster import RayCluster

        self._pool = pool
        self._cluster: Cluster = RayCluster.connect(None, **cluster)
        self._engines = OwnedEngines(pool, self._cluster, spec, settings, self._tell)
        self._watchers: set[_Watcher] = set()
        self._opening: Background[None] | None = None
        self._ending: Background[None] | None = None

    async def on_start(self) -> None:
        await self._cluster.__aenter__()
        # In the background, so that its progress can be watched.
        self._opening = Runtime.current().start(self._open, name=f"start of pool {self._pool}")

    async def on_stop(self) -> None:
        await self.end()
        await self._cluster.aclose()

    @method(idempotent=True)
    async def opened(self) -> PoolFacts:
        """Return when every replica is ready. :raises Exception: as :meth:`actors.EnginePool.start`."""
        assert self._opening is not None  # on_start was first
        await self._opening.wait()
        return PoolFacts(self._engines.generates, self._engines.capacity, self._engines.stats())

    @method(idempotent=True)
    async def generate(self, request: GenerateRequest, reroute: Reroute) -> AsyncIterator[Answered]:
        await self.opened()
        stream = self._engines.submit(request, reroute)
        try:
            async for delta in stream:
                if isinstance(delta, Reset):
                    yield Answered(_NOTHING, None, delta.attempt)
                else:
                    yield Answered(delta, stream.replica)
        finally:
            await stream.aclose()

    async def watch(self) -> AsyncIterator[PoolView]:
        """The states of the replicas whenever one changes, and the counts, every second if they changed."""
        watcher, stats = _Watcher(), None
        self._watchers.add(watcher)
        try:
            while True:
                progress, now = watcher.take(), self._engines.stats()
                if progress or now != stats:
                    stats = now
                    yield PoolView(progress, stats, self._engines.capacity)
                with anyio.move_on_after(_VIEW_SECONDS):
                    await watcher.changed.wait()
        finally:
            self._watchers.discard(watcher)

    async def info(self) -> list[EngineInfo]:
        await self.opened()
        return await self._engines.info()

    async def metrics(self) -> list[EngineMetrics]:
        await self.opened()
        return await self._engines.metrics()

    async def sleep(self, level: int) -> None:
        await self.opened()
        await self._engines.sleep(level)

    async def wake(self) -> None:
        await self.opened()
        await self._engines.wake()

    async def scale(self, replicas: int) -> None:
        await self.opened()
        await self._engines.scale(replicas)

    async def drain(self, replica: int | None) -> None:
        await self.opened()
        await self._engines.drain(replica)

    async def end(self) -> None:
        """End the engines; what is in flight fails. The actor itself is ended by who called this."""
        if self._ending is None:
            self._ending = Runtime.current().start(self._end, name=f"end of pool {self._pool}")
        await self._ending.wait()

    async def _open(self) -> None:
        import ray

        try:
            await self._engines.start()
        except BaseException:
            if ray.get_runtime_context().was_current_actor_reconstructed:
                log.exception("pool.restart_failed", pool=self._pool)
                os._exit(1)  # so that it counts as a death, and is tried again
            raise

    async def _end(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            with contextlib.suppress(Exception):  # who opened it has heard of it
                await self._opening.ended()
        await self._engines.end()

    def _tell(self, progress: ReplicaProgress) -> None:
        for watcher in self._watchers:
            watcher.add(progress)


class _Watcher:
    """What one client has not seen yet; of each replica the latest, so that a slow client costs no memory."""

    def __init__(self) -> None:
        self.changed = anyio.Event()
        self._progress: dict[int, ReplicaProgress] = {}

    def add(self, progress: ReplicaProgress) -> None:
        self._progress[progress.replica] = progress
        self.changed.set()

    def take(self) -> tuple[ReplicaProgress, ...]:
        taken, self._progress = tuple(self._progress.values()), {}
        self.changed = anyio.Event()
        return taken


_NOTHING = Delta()
