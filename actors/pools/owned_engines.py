"""OwnedEngines: the replicas of a pool, looked after by this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from actors.pools.assignment import PoolCore
from actors.pools.fleet import Fleet, FleetOptions, Replica
from actors.pools.pool_actions import StartReplica
from actors.pools.pool_stats import PoolStats, ReplicaProgress, ReplicaStats, Speed
from actors.pools.routing import Router
from arun.errors import EngineError, MisuseError
from arun.logs import get_logger
from arun.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from actors.cluster import Cluster
    from actors.engine import EngineInfo, EngineMetrics, EngineSpec, GenerateRequest
    from actors.pools.engines import PoolSettings
    from actors.pools.pool_state import Reroute
    from actors.pools.routing import RoutedStream

__all__ = ("OwnedEngines",)

log = get_logger("arun.pool")

_PROGRESS_SECONDS = 1.0
_PULSE_SECONDS = 5.0
_SERVING = {"reserving bundles", "preparing model", "loading model", "ready", "restarting"}


class OwnedEngines:
    """Actors of one cluster that hold an engine each; see :class:`~actors.pools.engines.Engines`.

    :param pool: its name.
    :param tell: called at every change of a replica's state, and about once a second during the start.
    """

    def __init__(
        self,
        pool: str,
        cluster: Cluster,
        spec: EngineSpec,
        settings: PoolSettings,
        tell: Callable[[ReplicaProgress], object],
    ) -> None:
        self.pool = pool
        self.generates = spec.runner != "pooling"
        self._settings = settings
        self._tell_progress = tell
        self._core = PoolCore(
            limit=settings.max_in_flight,
            max_waiting=settings.max_waiting,
            supervisor=settings.supervisor,
            watchdog=settings.watchdog,
            quarantine=settings.quarantine,
            affinity_margin=settings.affinity_margin,
        )
        options = FleetOptions(
            cpus=settings.cpus,
            gpus=settings.gpus,
            strategy=settings.strategy,
            labels=settings.labels,
            wait=settings.wait,
            concurrency=settings.max_in_flight,
            pulse=min(_PULSE_SECONDS, settings.watchdog / 4),
            watchdog=settings.watchdog,
            start_timeout=settings.start_timeout,
        )
        self._fleet = Fleet(pool, cluster, spec, options, self._tell)
        self._router: Router | None = None
        self._draining = False
        self._began = 0.0
        self._speeds: dict[int, Speed] = {}

    @property
    def capacity(self) -> int:
        return self._settings.max_in_flight * max(1, len(self._fleet.replicas) or self._settings.replicas)

    @property
    def replicas(self) -> dict[int, Replica]:
        """By number."""
        return self._fleet.replicas

    async def start(self) -> None:
        """Reserve, start every replica, return when all are ready; after an error, :meth:`end` is still to come."""
        self._began = anyio.current_time()
        ticking = Runtime.current().start(self._tick, name=f"progress of pool {self.pool}")
        try:
            await self._start_replicas()
        finally:
            ticking.cancel()
        log.info("pool.started", pool=self.pool, replicas=self._settings.replicas)

    def submit(self, request: GenerateRequest, reroute: Reroute = "continue") -> RoutedStream:
        if self._draining:
            raise MisuseError(f"pool {self.pool!r} is draining, so it takes no more requests")
        return self._started().submit(request, reroute)

    def stats(self) -> PoolStats:
        core, now = self._core, anyio.current_time()
        replicas = tuple(self._replica_stats(replica, now) for _, replica in sorted(self._fleet.replicas.items()))
        return PoolStats(
            name=self.pool,
            waiting=core.waiting,
            waiting_interactive=core.waiting_in("interactive"),
            waiting_batch=core.waiting_in("batch"),
            in_flight=sum(each.in_flight for each in replicas),
            tokens_per_second=sum(each.tokens_per_second for each in replicas),
            restarts=core.restarts,
            reroutes=core.reroutes,
            dead_letters=core.dead_letters,
            quarantined=core.quarantined,
            prefix_hits=core.prefix_hits,
            replicas=replicas,
        )

    async def info(self) -> list[EngineInfo]:
        return [await actor.info() for actor in self._actors()]

    async def metrics(self) -> list[EngineMetrics]:
        return [await actor.metrics() for actor in self._actors()]

    async def sleep(self, level: int) -> None:
        for actor in self._actors():
            await actor.sleep(level)

    async def wake(self) -> None:
        for actor in self._actors():
            await actor.wake()

    async def scale(self, replicas: int) -> None:
        router = self._started()
        if not isinstance(replicas, int):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"scale({replicas!r}): it takes a whole number of replicas")
        if replicas < 1:
            raise MisuseError(f"scale({replicas}): a pool has at least 1 replica; close() ends it")
        serving = [replica for replica in self._fleet.replicas.values() if replica.state in _SERVING]
        if replicas > len(serving):
            await self._fleet.check_fits(replicas)
        before = set(self._fleet.replicas)
        log.info("pool.scale", pool=self.pool, replicas=replicas, serving=len(serving))
        async with self._fleet.reserving(replicas - len(serving)):
            router.do(self._core.scale(replicas))
        for replica in [each for number, each in self._fleet.replicas.items() if number not in before]:
            await replica.settled.wait()
            if replica.state == "dead":
                raise EngineError(f"replica {replica.number} of pool {self.pool!r} did not start: {replica.cause}")

    async def drain(self, replica: int | None) -> None:
        router = self._started()
        if replica is None:
            self._draining = True
            await router.wait_idle()
            return
        known = self._fleet.replicas.get(replica)
        if known is None:
            numbers = ", ".join(map(str, sorted(self._fleet.replicas)))
            raise MisuseError(f"pool {self.pool!r} has no replica {replica}; it has {numbers}")
        if known.state == "ready":
            self._fleet.set_state(known, "draining")
        log.info("pool.drain", pool=self.pool, replica=replica, in_flight=known.counts.in_flight)
        router.do(self._core.drain(replica))
        await known.gone.wait()

    async def leave(self) -> None:
        await self.end()

    async def end(self) -> None:
        if self._router is not None:
            self._router.close(EngineError(f"pool {self.pool!r} was closed before the answer was complete"))
        async with anyio.create_task_group() as ending:
            for replica in reversed(list(self._fleet.replicas.values())):
                ending.start_soon(self._fleet.end, replica)
        log.info("pool.closed", pool=self.pool)

    def _started(self) -> Router:
        assert self._router is not None  # start() was first
        return self._router

    def _actors(self) -> list[Any]:
        return [replica.actor for replica in self._fleet.replicas.values() if replica.actor is not None]

    def _replica_stats(self, replica: Replica, now: float) -> ReplicaStats:
        counts = replica.counts
        speed = self._speeds.setdefault(replica.number, Speed())
        return ReplicaStats(
            replica=replica.number,
            pid=replica.pid,
            state=replica.state,
            start_seconds=replica.start_seconds,
            restarts=replica.generation - 1,
            in_flight=counts.in_flight,
            started=counts.started,
            finished=counts.finished,
            failed=counts.failed,
            aborted=counts.aborted,
            lost=counts.lost,
            tokens=counts.tokens,
            tokens_per_second=speed.at(now, counts.tokens),
            cause=replica.cause,
        )

    async def _start_replicas(self) -> None:
        count = self._settings.replicas
        self._fleet.refuse_taken_name()
        await self._fleet.check_fits(count)
        self._router = router = Router(self.pool, self._core, self._fleet)
        self._fleet.report_to(router)
        # Not by router.do(): what keeps the first ones from starting is to be raised here.
        starts = [action for action in self._core.scale(count) if isinstance(action, StartReplica)]
        replicas = [self._fleet.add(start.replica) for start in starts]
        await self._for_each(replicas, self._fleet.prepare)
        await self._fleet.prepare_model()
        await self._for_each(replicas, self._fleet.launch)
        now = anyio.current_time()
        for replica in replicas:
            self._speeds[replica.number] = Speed()
            self._speeds[replica.number].at(now, 0)
            self._fleet.serve(replica)

    async def _for_each(self, replicas: list[Replica], do: Callable[[Replica], Awaitable[None]]) -> None:
        failures: list[Exception] = []

        async def one(replica: Replica) -> None:
            try:
                await do(replica)
            except Exception as exc:  # noqa: BLE001  # whatever it is, start() raises it
                exc.add_note(f"replica {replica.number} of pool {self.pool!r} did not start")
                failures.append(exc)
                self._fleet.set_state(replica, "dead")
                starting.cancel_scope.cancel()

        async with anyio.create_task_group() as starting:
            for replica in replicas:
                starting.start_soon(one, replica)
        if failures:
            raise failures[0]

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(_PROGRESS_SECONDS)
            for replica in self._fleet.replicas.values():
                if replica.state not in {"ready", "dead"}:
                    self._tell(replica)

    def _tell(self, replica: Replica) -> None:
        self._tell_progress(ReplicaProgress(replica.number, replica.state, anyio.current_time() - self._began))
