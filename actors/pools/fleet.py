"""Fleet: the replicas of one pool as actors in bundles of their own: started, watched, stopped."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio
import msgspec

from actors.bundles import Placement
from actors.engine import EngineActor, EngineInfo, EngineSpec, Pulse
from actors.members.patience import within
from arun.errors import ArunError, ChannelLost, MisuseError, PlacementError
from arun.logs import get_logger
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from actors.bundles import Reservation, Strategy
    from actors.cluster import Cluster

__all__ = ("Fleet", "FleetOptions", "Replica", "ReplicaEvents", "ReplicaState")

log = get_logger("arun.pool")

ReplicaState = Literal[
    "reserving bundles",
    "preparing model",
    "loading model",
    "ready",
    "draining",
    "stopping",
    "restarting",
    "dead",
    "stopped",
]

_HEADROOM = 16  # messages besides requests that an engine's actor takes at a time
_UNHEARD = 2  # connections in a row without a sign of life until a replica is lost: one may be cut before the first


class FleetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the replicas of a pool are placed and watched.

    :ivar cpus: CPUs of each worker's bundle.
    :ivar gpus: GPUs of it; None for what the engine needs where the cluster has any.
    :ivar wait: seconds to wait for resources; None refuses at once what the cluster can't hold.
    :ivar concurrency: requests that an engine's actor takes at a time.
    :ivar pulse: seconds between two signs of life of a replica.
    :ivar watchdog: seconds without one until it counts as lost.
    :ivar start_timeout: seconds that a replica has for its start.
    """

    cpus: float
    gpus: float | None
    strategy: Strategy
    labels: dict[str, str]
    wait: float | None
    concurrency: int
    pulse: float
    watchdog: float
    start_timeout: float


class Replica:
    """One place for an engine, and the engine that is in it now.

    :ivar actor: of its EngineActor; None while there is none.
    :ivar generation: how many engines there were in this place, this one included.
    :ivar cause: why the last one was lost.
    """

    __slots__ = (
        "actor",
        "cause",
        "counts",
        "generation",
        "gone",
        "life",
        "number",
        "pid",
        "reservation",
        "resumes",
        "settled",
        "start_seconds",
        "state",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.generation = 1
        self.state: ReplicaState = "reserving bundles"
        self.actor: Any = None
        self.pid: int | None = None
        self.resumes = False
        self.start_seconds = 0.0
        self.cause = ""
        self.counts = Counts()
        self.reservation: Reservation | None = None
        self.life: Background[None] | None = None
        #: when its first engine was ready, or none will ever be
        self.settled = anyio.Event()
        #: when it was stopped and its bundles are given back
        self.gone = anyio.Event()


class Counts:
    """What one place has done, as the pool sees it: every request that was started ends in one of the others."""

    __slots__ = ("aborted", "failed", "finished", "lost", "started", "tokens")

    def __init__(self) -> None:
        self.started = self.finished = self.failed = self.aborted = self.lost = self.tokens = 0

    @property
    def in_flight(self) -> int:
        return self.started - self.finished - self.failed - self.aborted - self.lost


class ReplicaEvents(Protocol):
    """Who is told what becomes of the replicas."""

    def ready(self, replica: Replica) -> None: ...

    def lost(self, replica: Replica, generation: int, cause: str) -> None: ...

    def report(self, replica: Replica, pulse: Pulse) -> None: ...

    def stopped(self, replica: Replica, generation: int) -> None: ...


class Fleet:
    """Does what a PoolCore says about replicas, and tells what comes of it.

    :param tell: called when the state of a replica changes.
    """

    def __init__(
        self,
        pool: str,
        cluster: Cluster,
        spec: EngineSpec,
        options: FleetOptions,
        tell: Callable[[Replica], object],
    ) -> None:
        self.replicas: dict[int, Replica] = {}
        #: for places that are not there yet
        self._reserved: list[Reservation] = []
        self._pool = pool
        self._cluster = cluster
        self._spec = spec
        self._options = options
        self._tell = tell
        self._events: ReplicaEvents | None = None
        self._gpus = 0.0

    def report_to(self, events: ReplicaEvents) -> None:
        """Set who is told."""
        self._events = events

    # The first start: whoever opens a pool wants to see its errors.

    def add(self, number: int) -> Replica:
        """A place that is not there yet."""
        replica = self.replicas[number] = Replica(number)
        if self._reserved:
            replica.reservation = self._reserved.pop()
        self.set_state(replica, "reserving bundles")
        return replica

    def refuse_taken_name(self) -> None:
        """:raises MisuseError: the cluster has a pool of this name."""
        if any(actor.name == f"{self._pool}-0" for actor in self._cluster.list()):
            raise MisuseError(
                f"this cluster has a pool named {self._pool!r} already; give one of the two another name="
            )

    async def check_fits(self, replicas: int) -> None:
        """Refuse at once what the cluster can never hold.

        :raises PlacementError: with the numbers.
        :raises ModelNotFound: there is no such model, where the engines will run on this machine.
        """
        resources = await self._cluster.resources()
        vllm, asked = self._spec.engine == "vllm", self._options.gpus
        self._gpus = asked if asked is not None else 1.0 if vllm and resources.gpus else 0.0
        placement = self._placement(replicas)
        if vllm and not self._gpus and placement.workers > 1 and placement.strategy != "STRICT_PACK":
            raise MisuseError(
                f"strategy={placement.strategy!r}: without GPUs vLLM runs all {placement.workers} workers of a replica "
                "on one node; use STRICT_PACK"
            )
        if vllm and len(resources.nodes) == 1:
            from actors.vllm_engine import check_here

            check_here(self._spec)
        refusal = None if self._options.wait is not None else placement.refusal(resources, idle=True)
        if refusal is not None:
            raise PlacementError(refusal)

    @contextlib.asynccontextmanager
    async def reserving(self, replicas: int) -> AsyncGenerator[None, None]:
        """Have bundles for so many more replicas, which the places take that are added in this block, without an await.

        :raises PlacementError: they can't be had; none is taken.
        """
        taken: list[Reservation] = []
        try:
            while len(taken) < replicas:
                taken.append(await self._cluster.reserve(self._placement(1), wait=self._options.wait))
            self._reserved = taken
            yield
        finally:
            self._reserved = []
            with anyio.CancelScope(shield=True):
                for reservation in taken:
                    await reservation.release()

    async def prepare(self, replica: Replica) -> None:
        """Take the bundles of a place, if it has none, or if they were taken from it."""
        if replica.reservation is not None and not await self._cluster.holds(replica.reservation):
            # An actor that is started in a group that is no more waits for ever (ray#57726).
            log.warning("pool.bundles_lost", pool=self._pool, replica=replica.number)
            await self._give_back(replica)
        if replica.reservation is None:
            replica.reservation = await self._cluster.reserve(self._placement(1), wait=self._options.wait)

    async def prepare_model(self) -> None:
        """Make or fetch the model, once for all replicas, where they will run on this machine."""
        if self._spec.engine == "vllm" and len((await self._cluster.resources()).nodes) == 1:
            from actors.vllm_engine import resolve_here

            for replica in self.replicas.values():
                self.set_state(replica, "preparing model")
            self._spec = await resolve_here(self._spec)

    async def launch(self, replica: Replica) -> None:
        """Start an engine in its place.

        :raises Exception: what kept it from starting.
        """
        self.set_state(replica, "loading model")
        assert replica.reservation is not None  # prepare() was first
        actor = await self._cluster.spawn(
            EngineActor,
            self._spec,
            name=f"{self._pool}-{replica.number}",
            concurrency=self._options.concurrency + _HEADROOM,
            group=replica.reservation.groups[0],
            env=self._spec.env,
            # It only waits for a server, so where tasks are to be had it needs no process.
            isolation="task"
            if self._spec.engine == "remote" and self._cluster.has_tasks and not self._spec.env
            else None,
        )
        replica.actor = actor
        info: EngineInfo = await actor.info()
        replica.pid, replica.start_seconds, replica.resumes = info.pid, info.start_seconds, info.resumes

    def serve(self, replica: Replica) -> None:
        """A launched replica is ready: watch it from now on."""
        name = f"watch of replica {replica.number} of pool {self._pool}"
        replica.life = Runtime.current().start(self._watch, replica, replica.generation, name=name)
        self._ready(replica)

    # What a PoolCore says.

    def start(self, number: int, generation: int) -> None:
        """Start an engine in the background."""
        replica = self.replicas.get(number) or self.add(number)
        replica.generation = generation
        name = f"replica {number} of pool {self._pool}"
        replica.life = Runtime.current().start(self._live, replica, generation, name=name)

    def stop(self, number: int, generation: int, *, restart: bool) -> None:
        """End the engine in the background; without ``restart``, its bundles are given back too."""
        replica = self.replicas[number]
        self.set_state(replica, "restarting" if restart else "stopping")
        name = f"stop of replica {number} of pool {self._pool}"
        Runtime.current().start(self._stop, replica, generation, restart, name=name)

    def set_state(self, replica: Replica, state: ReplicaState) -> None:
        """Show another state."""
        replica.state = state
        if state in {"ready", "dead", "stopped"}:
            replica.settled.set()
        self._tell(replica)

    async def bury(self, replica: Replica) -> None:
        """Give back the bundles of a place in which no engine will be started any more."""
        self.set_state(replica, "dead")
        await self._give_back(replica)

    async def end(self, replica: Replica) -> None:
        """End what is in a place and give it back."""
        await self._clear(replica)
        await self._give_back(replica)
        if replica.state != "dead":
            replica.state = "stopped"

    # The life of a generation.

    async def _live(self, replica: Replica, generation: int) -> None:
        try:
            with anyio.fail_after(self._options.start_timeout):
                await self.prepare(replica)
                await self.launch(replica)
        except TimeoutError:
            self._lost(replica, generation, f"it did not start within {self._options.start_timeout:g} s")
        except Exception as exc:  # noqa: BLE001  # whatever it is, the replica did not start
            self._lost(replica, generation, f"it did not start: {exc}")
        else:
            self._ready(replica)
            await self._watch(replica, generation)

    def _ready(self, replica: Replica) -> None:
        assert self._events is not None  # report_to() was first
        self.set_state(replica, "ready")
        self._events.ready(replica)

    async def _watch(self, replica: Replica, generation: int) -> None:
        self._lost(replica, generation, await self._last_sign(replica))

    async def _last_sign(self, replica: Replica) -> str:
        """Report a replica's signs of life until they end; tells why they did."""
        assert self._events is not None  # report_to() was first
        actor, cause, unheard = replica.actor, "its signs of life ended", 0
        while unheard < _UNHEARD:
            unheard += 1
            signs = actor.pulse(self._options.pulse)
            try:
                while True:
                    pulse: Pulse = await within(self._options.pulse + self._options.watchdog, signs.__anext__)
                    unheard = 0
                    self._events.report(replica, pulse)
            except ChannelLost as exc:  # it goes on where there is another connection
                cause = str(exc)
            except TimeoutError:
                return f"it gave no sign of life for {self._options.watchdog:g} s"
            except (ArunError, StopAsyncIteration) as exc:
                return str(exc) or cause
            except Exception as exc:  # noqa: BLE001  # an engine of the user's own may raise anything
                return f"its health check failed: {exc!r}"
            finally:
                signs.cancel()
        return cause

    def _lost(self, replica: Replica, generation: int, cause: str) -> None:
        assert self._events is not None  # report_to() was first
        self._events.lost(replica, generation, cause)

    async def _stop(self, replica: Replica, generation: int, restart: bool) -> None:
        await self._clear(replica)
        if not restart:
            await self._give_back(replica)
            self.replicas.pop(replica.number, None)
            self.set_state(replica, "stopped")
            replica.gone.set()
        assert self._events is not None  # report_to() was first
        self._events.stopped(replica, generation)

    async def _clear(self, replica: Replica) -> None:
        if replica.life is not None:
            replica.life.cancel()
            await replica.life.ended()
        actor, replica.actor = replica.actor, None
        if actor is not None:
            await self._cluster.stop(actor)

    async def _give_back(self, replica: Replica) -> None:
        reservation, replica.reservation = replica.reservation, None
        if reservation is not None:
            await reservation.release()

    def _placement(self, replicas: int) -> Placement:
        return Placement(
            tensor_parallel=self._spec.tensor_parallel_size,
            pipeline_parallel=self._spec.pipeline_parallel_size,
            replicas=replicas,
            cpus=self._options.cpus,
            gpus=self._gpus,
            strategy=self._options.strategy,
            labels=self._options.labels,
        )
