"""Cluster: where actors live. All that kinds of clusters differ in is what they make bodies and reservations of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, cast, overload

import msgspec

from actors.environment import check_environment
from actors.finish import finish
from actors.members.lives import ActorInfo
from actors.members.roster import Roster
from arun.errors import MisuseError
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self, Unpack

    from actors.bundles import Group, Placement, Reservation
    from actors.engine import EngineSpec
    from actors.interface import ActorSpec
    from actors.members.body import Body
    from actors.members.lives import ActorHealth, Monitor
    from actors.members.supervision import RestartPolicy, Supervisor
    from actors.pool import EnginePool, PoolOptions

__all__ = ("ActorInfo", "Cluster", "ClusterResources", "DetachedOrder", "Isolation", "Lifetime", "NodeResources")

T = TypeVar("T")

Isolation = Literal["process", "task"]
Lifetime = Literal["scope", "detached"]


class NodeResources(msgspec.Struct, frozen=True, kw_only=True):
    """CPUs and GPUs of one node, in all and free, and its labels."""

    name: str
    cpus: float
    cpus_free: float
    gpus: float = 0.0
    gpus_free: float = 0.0
    labels: dict[str, str] = {}

    def amounts(self, *, idle: bool = False) -> tuple[float, float]:
        """CPUs and GPUs: what is free, or with ``idle=True`` what there is in all."""
        return (self.cpus, self.gpus) if idle else (self.cpus_free, self.gpus_free)

    def describe(self) -> str:
        """The numbers as a phrase: ``3 of 4 CPU free, 0 of 2 GPU free``."""
        parts = [f"{self.cpus_free:g} of {self.cpus:g} CPU free"]
        if self.gpus:
            parts.append(f"{self.gpus_free:g} of {self.gpus:g} GPU free")
        return ", ".join(parts)


class ClusterResources(msgspec.Struct, frozen=True):
    """What the nodes of a cluster have, for :meth:`actors.bundles.Placement.explain`."""

    nodes: tuple[NodeResources, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def cpus_free(self) -> float:
        """Free CPUs of all nodes."""
        return sum(node.cpus_free for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def gpus_free(self) -> float:
        """Free GPUs of all nodes."""
        return sum(node.gpus_free for node in self.nodes)

    def describe(self) -> str:
        """The sums as a phrase: ``4 nodes, 3 of 8 CPU free``."""
        total = NodeResources(
            name="", cpus=self.cpus, cpus_free=self.cpus_free, gpus=self.gpus, gpus_free=self.gpus_free
        )
        return f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)}, {total.describe()}"


class DetachedOrder(NamedTuple):
    """A detached actor to be; fields as the parameters of :meth:`Cluster.spawn`."""

    cls: type
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str | None
    concurrency: int | None
    group: Group | None
    env: Mapping[str, str]
    restart: RestartPolicy | None
    restarts: int | Supervisor | None
    get_if_exists: bool


class Cluster(ABC):
    """Starts actors, places them, knows them by name, starts them again and ends them.

    An async context manager: leaving it, for whatever reason, stops every actor in reverse order of start and
    gives back every reservation. It holds no cancel scope, so it works as a fixture and in an ``AsyncExitStack``.

    :param grace: seconds that ``on_stop`` gets before a process is killed.
    :param silence: seconds after which an actor's process that does not even answer for its health is killed.
    :cvar has_tasks: whether ``spawn(isolation="task")`` is possible here.
    """

    has_tasks: ClassVar[bool] = False

    def __init__(self, *, grace: float, silence: float) -> None:
        self._grace = grace
        self._silence = silence
        self._roster = Roster(grace=grace, silence=silence)
        self._reservations: list[Reservation] = []
        self._closing: Background[None] | None = None

    async def spawn(
        self,
        cls: type[T],
        /,
        *args: Any,
        name: str | None = None,
        concurrency: int | None = None,
        group: Group | None = None,
        env: Mapping[str, str] = {},
        restart: RestartPolicy | None = None,
        restarts: int | Supervisor | None = None,
        lifetime: Lifetime = "scope",
        get_if_exists: bool = False,
        isolation: Isolation | None = None,
        **kwargs: Any,
    ) -> T:
        """Start ``cls(*args, **kwargs)`` as an actor and return its handle when ``on_start`` has finished.

        Type checkers take the handle for a ``cls``: it has the same methods, and those are awaitables and async
        iterators already. At run time it is an :class:`~actors.actor.ActorHandle`.

        :param name: unique in this cluster; by default the class's name and a number.
        :param concurrency: messages at a time; by default what ``@actor(concurrency=)`` says, else 1.
        :param group: where to place it; by default anywhere.
        :param env: environment variables of its process, on top of this process's own.
        :param restart: when it is started again in its place: "permanent": always; "transient": when it did not
            end by itself with exit code 0; "temporary": never. By default "temporary", and "permanent" with
            ``restarts``.
        :param restarts: how often: a number is so many in 60 s (3 by default); a
            :class:`~actors.Supervisor` says it in full, and one given to several actors supervises them
            together.
        :param lifetime: "scope": it ends with the cluster's block. "detached": it lives on in a Ray that this program
            did not start, until somebody stops it; ``get(name)`` finds it from every program on that Ray. Ray starts it
            again when it dies, as often as ``restarts`` says.
        :param get_if_exists: return the actor of this name, if there is one, instead of starting it. One that has died,
            and is not started again, is none.
        :param isolation: "process" or "task"; by default the cluster's. Only a LocalCluster has tasks.
        :raises MisuseError: the class is no actor (the message names the method), the name is taken, the cluster is
            closed, ``env`` is not all text.
        :raises TypeError: the constructor does not take these arguments.
        :raises ActorDied: the process ended before the actor was ready. A first start is not tried again.
        :raises Exception: what the constructor or ``on_start`` raised, with the remote traceback as a note.
        """
        from actors.bundles import Group  # which needs this module

        check_environment(env)
        if not isinstance(group, Group | None):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"group={group!r}: it must be one of the groups of a reservation")
        if lifetime == "detached":
            order = DetachedOrder(cls, args, kwargs, name, concurrency, group, env, restart, restarts, get_if_exists)
            return cast("T", await self._spawn_detached(order))
        if lifetime != "scope":
            raise MisuseError(f"lifetime={lifetime!r}: it must be 'scope' or 'detached'")
        launch = self._launcher(group=group, env=env, isolation=isolation)
        handle = await self._roster.spawn(
            cls,
            args,
            kwargs,
            name=name,
            concurrency=concurrency,
            group=group,
            restart=restart,
            restarts=restarts,
            get_if_exists=get_if_exists,
            launch=launch,
        )
        return cast("T", handle)

    async def stop(self, actor: object) -> None:
        """End an actor: its open calls fail, ``on_stop`` is awaited, the process ends (killed after a grace).

        :param actor: its handle or its name. A detached one ends for everybody.
        """
        await self._roster.stop(actor)

    @overload
    async def get(self, name: str) -> Any: ...
    @overload
    async def get(self, name: str, cls: type[T]) -> T: ...
    async def get(self, name: str, cls: type | None = None) -> Any:
        """Return the handle of a running actor: of this cluster, or a detached one of whatever program.

        :param cls: its class, so that type checkers know the methods; checked.
        :raises ActorNotFound: no actor has that name; the message lists those there are.
        """
        if await self._roster.settled(name) is None:
            await self._look_for(name)
        return self._roster.get(name, cls)

    def monitor(self, actor: object) -> Monitor:
        """What happens to an actor: ``async for event in cluster.monitor(actor)``.

        The latest event comes first, then each that follows: :class:`~actors.ActorStarted`,
        :class:`~arun.errors.ActorDied` (with ``reason`` and ``generation``), :class:`~actors.ActorRestarted`,
        :class:`~actors.GaveUp` or :class:`~actors.ActorStopped`, with which it ends.

        :param actor: its handle or its name.
        """
        return self._roster.monitor(actor)

    async def health(self, actor: object) -> ActorHealth:
        """How an actor fares, also while its event loop is blocked: a thread of its own answers, within a second.

        :param actor: its handle or its name.
        """
        return await self._roster.health(actor)

    def list(self) -> builtins.list[ActorInfo]:
        """Every actor of this cluster that was not stopped, in order of start."""
        return self._roster.infos()

    @abstractmethod
    async def reserve(self, placement: Placement, *, wait: float | None = None) -> Reservation:
        """Reserve one group a replica.

        :param wait: seconds to wait for what others hold, and on Ray also for a cluster that grows (autoscaling).
        :raises PlacementError: the cluster can't hold it; raised at once where that is certain and no ``wait`` was
            given, else within seconds.
        """

    @abstractmethod
    async def resources(self) -> ClusterResources:
        """CPUs and GPUs of every node, in all and free."""

    @abstractmethod
    def check_detachable(self) -> None:
        """Refuse what would have to outlive this program.

        :raises MisuseError: it can't.
        """

    @property
    def settings(self) -> dict[str, Any]:
        """What a cluster is made with that another process uses in this one's place, as the parameters are named."""
        return {"grace": self._grace, "silence": self._silence}

    async def holds(self, reservation: Reservation) -> bool:
        """Whether the groups of a reservation are still there: somebody may have removed one behind our back."""
        return True

    def engines(self, spec: EngineSpec, **options: Unpack[PoolOptions]) -> EnginePool:
        """A pool of engines in this cluster; nothing starts before it is entered.

        :param options: of :class:`~actors.EnginePool`: replicas, name, cpus, max_in_flight and so on.
        """
        from actors.pool import EnginePool

        return EnginePool(self, spec, **options)

    def pool(self, name: str) -> EnginePool:
        """The detached pool of that name, whoever started it; attaches when it is entered, leaving it only lets go.

        :param name: as given to ``engines(..., name=, lifetime="detached")``.
        """
        from actors.pool import EnginePool

        return EnginePool.attached(self, name)

    async def aclose(self) -> None:
        """Stop every actor, last started first, and give back every reservation. Idempotent, never cut short."""
        self._roster.closed = True
        if self._closing is None:
            self._closing = Runtime.current().start(self._close, name=f"close of {type(self).__name__}")
        await finish(self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    def _launcher(
        self, *, group: Group | None, env: Mapping[str, str], isolation: Isolation | None
    ) -> Callable[[ActorSpec], Body]:
        """What makes the bodies of an actor's generations."""

    @abstractmethod
    async def _look_for(self, name: str) -> None:
        """Attach to the detached actor of that name, where there can be one.

        :raises ActorNotFound: there is none; the message has those there are.
        """

    @abstractmethod
    async def _spawn_detached(self, order: DetachedOrder) -> object:
        """Start a detached actor, or find it; as :meth:`spawn`."""

    async def _close(self) -> None:
        await self._roster.stop_all()
        for reservation in reversed(tuple(self._reservations)):
            await reservation.release()
