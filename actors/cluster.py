"""Cluster: where actors live, told apart by nothing but how their processes are started.

``LocalCluster`` and ``RayCluster`` are written against this page, and so is everything that uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    import builtins
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self, Unpack

    from actors.actor import ActorHandle
    from actors.bundles import Group, Placement, Reservation
    from actors.engine import EngineSpec
    from actors.pool import EnginePool, PoolOptions

__all__ = ("ActorInfo", "Cluster", "ClusterResources", "NodeResources")


class ActorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One actor as ``cluster.list()`` shows it.

    :ivar name: unique among the cluster's actors.
    :ivar actor_class: qualified name of its class.
    :ivar pid: process that it lives in, or None while that is being started.
    :ivar address: where it listens: "unix:/path", "host:port" or "memory".
    :ivar alive: whether its process runs.
    """

    name: str
    actor_class: str
    pid: int | None
    address: str
    alive: bool


class NodeResources(msgspec.Struct, frozen=True, kw_only=True):
    """CPUs and GPUs of one node, in all and free."""

    name: str
    cpus: float
    cpus_free: float
    gpus: float = 0.0
    gpus_free: float = 0.0

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


class Cluster(Protocol):
    """Starts actors, places them, knows them by name and ends them.

    An async context manager: leaving it, for whatever reason, stops every actor in reverse order of start and
    gives back every reservation. It holds no cancel scope, so it works as a fixture and in an ``AsyncExitStack``.
    """

    async def spawn(
        self,
        cls: type,
        /,
        *args: Any,
        name: str | None = None,
        concurrency: int | None = None,
        group: Group | None = None,
        env: Mapping[str, str] = {},
        **kwargs: Any,
    ) -> ActorHandle:
        """Start ``cls(*args, **kwargs)`` as an actor and return when its ``on_start`` has finished.

        :param name: unique in this cluster; by default the class's name and a number.
        :param concurrency: messages at a time; by default what ``@actor(concurrency=)`` says, else 1.
        :param group: where to place it; by default anywhere.
        :param env: environment variables of its process, on top of this process's own.
        :raises MisuseError: the class is no actor (the message names the method), the name is taken, the cluster is
            closed.
        :raises TypeError: the constructor does not take these arguments.
        :raises ActorDied: the process ended before the actor was ready.
        :raises Exception: what the constructor or ``on_start`` raised, with the remote traceback as a note.
        """
        ...

    async def stop(self, actor: ActorHandle) -> None:
        """End an actor: its open calls fail, ``on_stop`` is awaited, the process ends (killed after a grace)."""
        ...

    async def get(self, name: str) -> ActorHandle:
        """Return the handle of a running actor.

        :raises ActorNotFound: no actor of this cluster has that name; the message lists those there are.
        """
        ...

    async def reserve(self, placement: Placement) -> Reservation:
        """Reserve one group a replica.

        :raises PlacementError: the cluster can't hold it; raised at once where that is certain, else within seconds.
        """
        ...

    def engines(self, spec: EngineSpec, **options: Unpack[PoolOptions]) -> EnginePool:
        """A pool of engines in this cluster; nothing starts before it is entered.

        :param options: of :class:`~actors.EnginePool`: replicas, name, cpus, max_in_flight and so on.
        """
        ...

    async def resources(self) -> ClusterResources:
        """CPUs and GPUs of every node, in all and free."""
        ...

    async def aclose(self) -> None:
        """Stop every actor, last started first, and give back every reservation. Idempotent, never cut short."""
        ...

    def list(self) -> builtins.list[ActorInfo]:
        """Every actor of this cluster that was not stopped, in order of start."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
