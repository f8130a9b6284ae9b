"""Where actors go: bundles of resources, the replicas that need them, and the groups that are reserved for them.

A ``Placement`` is turned into one placement group a replica and one bundle a worker (tensor_parallel x
pipeline_parallel workers). :mod:`actors.fitting` says whether a cluster can hold it; the clusters do the reserving.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from actors import fitting
from actors.finish import finish
from actors.fitting import Fit, fit
from arun.errors import MisuseError
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from actors.cluster import ClusterResources
    from actors.fitting import Explanation

__all__ = ("Bundle", "Fit", "Group", "Placement", "Reservation", "Strategy", "fit")

Bundle = dict[str, float]
Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """What the replicas of one engine need.

    >>> print(Placement(tensor_parallel=2, replicas=2).explain(await cluster.resources()))

    :param tensor_parallel: workers that share one layer.
    :param pipeline_parallel: stages of layers; a replica has tensor_parallel x pipeline_parallel workers.
    :param replicas: placement groups, one a replica.
    :param cpus: CPUs of each worker's bundle; may be a fraction.
    :param gpus: GPUs of each worker's bundle; may be a fraction.
    :param strategy: how the bundles of one replica lie on nodes, in Ray's terms. STRICT_PACK: all on one node.
        PACK: on as few as possible. SPREAD: on as many as possible. STRICT_SPREAD: each on a node of its own.
    :param labels: of the nodes that will do, in Ray's terms: ``{"ray.io/accelerator-type": "H100"}``, and instead of a
        value ``"!value"``, ``"in(a, b)"`` or ``"!in(a, b)"``.
    :raises MisuseError: a number is out of range, or a bundle would be empty.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    strategy: Strategy = "STRICT_PACK"
    labels: dict[str, str] = {}

    def __post_init__(self) -> None:
        for field in ("tensor_parallel", "pipeline_parallel", "replicas"):
            if getattr(self, field) < 1:
                raise MisuseError(f"Placement({field}={getattr(self, field)}): it must be at least 1")
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise MisuseError(
                f"Placement(cpus={self.cpus:g}, gpus={self.gpus:g}): neither may be negative "
                "and a bundle needs at least one of them"
            )
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise MisuseError(f"Placement(gpus={self.gpus:g}): more than one GPU comes in whole numbers only")
        if self.strategy not in Strategy.__args__:  # type: ignore[attr-defined]  # typeshed hides Literal's arguments
            raise MisuseError(
                f"Placement(strategy={self.strategy!r}): it must be STRICT_PACK, PACK, SPREAD or STRICT_SPREAD"
            )
        for name, selector in self.labels.items():
            if not fitting.is_selector(selector):
                raise MisuseError(
                    f"Placement(labels={{{name!r}: {selector!r}}}): write a value, '!value', 'in(a, b)' or '!in(a, b)'"
                )

    @property
    def workers(self) -> int:
        """Workers of one replica, so also its bundles."""
        return self.tensor_parallel * self.pipeline_parallel

    def bundles(self) -> list[list[Bundle]]:
        """For each replica, the bundle of each of its workers."""
        return [[self.bundle() for _ in range(self.workers)] for _ in range(self.replicas)]

    def bundle(self) -> Bundle:
        """What one worker needs."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    def explain(self, resources: ClusterResources) -> Explanation:
        """The bundles of each replica on the nodes that they would get now, and whether they fit."""
        return fitting.explain(self, resources)

    def refusal(self, resources: ClusterResources, *, idle: bool = False) -> str | None:
        """Say with both sides' numbers why the cluster can't hold this, or return None if it can.

        :param idle: judge the cluster as if nothing was taken.
        """
        return fitting.refusal(self, resources, idle=idle)


class Group:
    """Where the actors of one replica go. Opaque: made by ``cluster.reserve()``, given to ``cluster.spawn(group=)``.

    :ivar replica: index of the replica, from 0.
    :ivar bundles: its bundles; an actor is placed in the first one.
    :ivar native: what the cluster knows it by (on Ray the placement group, locally the GPUs of each bundle).
    :ivar nodes: the node of each bundle; empty until the group is ready.
    """

    __slots__ = ("bundles", "native", "nodes", "released", "replica")

    def __init__(self, replica: int, bundles: Sequence[Bundle], native: object = None) -> None:
        self.replica = replica
        self.bundles = tuple(bundles)
        self.native = native
        self.nodes: tuple[str, ...] = ()
        self.released = False

    def __repr__(self) -> str:
        state = " released" if self.released else ""
        return f"<Group of replica {self.replica}: {len(self.bundles)} bundles{state}>"


class Reservation:
    """The groups of one placement, held until :meth:`release`."""

    __slots__ = ("_give_back", "_releasing", "groups", "placement")

    def __init__(
        self, placement: Placement, groups: Sequence[Group], give_back: Callable[[Reservation], Awaitable[None]]
    ) -> None:
        self.placement = placement
        self.groups = tuple(groups)
        self._give_back = give_back
        self._releasing: Background[None] | None = None

    async def release(self) -> None:
        """Stop the actors that still live in the groups, then give the groups back. Idempotent, never cut short."""
        for group in self.groups:
            group.released = True  # at once, so that no actor is started in it any more
        if self._releasing is None:
            self._releasing = Runtime.current().start(self._give_back, self, name="release of a Reservation")
        await finish(self._releasing)
