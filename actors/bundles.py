"""Where actors go: bundles of resources, the replicas that need them, and whether a cluster can hold them.

A ``Placement`` is turned into one placement group a replica and one bundle a worker (tensor_parallel x
pipeline_parallel workers). Everything here is plain arithmetic over the numbers of a
:class:`~actors.cluster.ClusterResources`; the clusters do the reserving.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from actors.finish import finish
from arun.errors import MisuseError
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from actors.cluster import ClusterResources

__all__ = ("Bundle", "Fit", "Group", "Placement", "Reservation", "Strategy", "fit")

Bundle = dict[str, float]
Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]

# Sums of fractions such as 0.1 are off by rounding; Ray counts in units of 1e-4.
_EPSILON = 1e-6


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
    :raises MisuseError: a number is out of range, or a bundle would be empty.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    strategy: Strategy = "STRICT_PACK"

    def __post_init__(self) -> None:
        for field in ("tensor_parallel", "pipeline_parallel", "replicas"):
            if getattr(self, field) < 1:
                raise MisuseError(f"Placement({field}={getattr(self, field)}): it must be at least 1")
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise MisuseError(
                f"Placement(cpus={_number(self.cpus)}, gpus={_number(self.gpus)}): neither may be negative "
                "and a bundle needs at least one of them"
            )
        if self.strategy not in Strategy.__args__:  # type: ignore[attr-defined]  # typeshed hides Literal's arguments
            raise MisuseError(
                f"Placement(strategy={self.strategy!r}): it must be STRICT_PACK, PACK, SPREAD or STRICT_SPREAD"
            )

    @property
    def workers(self) -> int:
        """Workers of one replica, so also its bundles."""
        return self.tensor_parallel * self.pipeline_parallel

    def bundles(self) -> list[list[Bundle]]:
        """For each replica, the bundle of each of its workers."""
        return [[self._bundle() for _ in range(self.workers)] for _ in range(self.replicas)]

    def explain(self, resources: ClusterResources) -> str:
        """Show the bundles of each replica on the nodes that they would get now, and whether they fit."""
        return _explain(self, resources, fit(self, resources))

    def refusal(self, resources: ClusterResources, *, idle: bool = False) -> str | None:
        """Say with both sides' numbers why the cluster can't hold this, or return None if it can.

        :param idle: judge the cluster as if nothing was taken.
        """
        found = fit(self, resources, idle=idle)
        if found.fits:
            return None
        return (
            f"the cluster can't hold {_replicas(self)} ({self.strategy}), {_amounts(*_total(self))} in all: "
            f"{_missing(self, found)}. The cluster has {resources.describe()}. Ask for fewer replicas, a smaller "
            "tensor_parallel or pipeline_parallel, fewer cpus or gpus per worker, or another strategy, or give the "
            "cluster more; Placement.explain() shows what would go where"
        )

    def _bundle(self) -> Bundle:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


class Group:
    """Where the actors of one replica go. Opaque: made by ``cluster.reserve()``, given to ``cluster.spawn(group=)``.

    :ivar replica: index of the replica, from 0.
    :ivar bundles: its bundles; an actor is placed in the first one.
    :ivar native: what the cluster knows it by (on Ray: the placement group).
    """

    __slots__ = ("bundles", "native", "released", "replica")

    def __init__(self, replica: int, bundles: Sequence[Bundle], native: object = None) -> None:
        self.replica = replica
        self.bundles = tuple(bundles)
        self.native = native
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


class Fit(msgspec.Struct, frozen=True):
    """Where the bundles of a placement go.

    :ivar nodes: for each replica the node of each bundle, or None where the replica has no room.
    """

    nodes: tuple[tuple[str, ...] | None, ...]

    @property
    def fits(self) -> bool:
        """Whether every replica has room."""
        return None not in self.nodes


def fit(placement: Placement, resources: ClusterResources, *, idle: bool = False) -> Fit:
    """Place the replicas one after another, each on the first nodes that hold it by its strategy.

    All bundles of a placement are equal, so a node is a number of slots, and first fit finds room wherever
    there is any.

    :param idle: count what the nodes have in all instead of what is free.
    """
    slots = {node.name: _slots(placement, *node.amounts(idle=idle)) for node in resources.nodes}
    placed: list[tuple[str, ...] | None] = []
    for _ in range(placement.replicas):
        nodes = _choose(placement, slots)
        for node in nodes or ():
            slots[node] -= 1
        placed.append(nodes)
    return Fit(tuple(placed))


def _slots(placement: Placement, cpus: float, gpus: float) -> int:
    """How many of the placement's bundles a node with these amounts holds."""
    ratios = [(cpus, placement.cpus), (gpus, placement.gpus)]
    return min(int(has / needs + _EPSILON) for has, needs in ratios if needs)


def _choose(placement: Placement, slots: dict[str, int]) -> tuple[str, ...] | None:
    workers = placement.workers
    whole = next((node for node, free in slots.items() if free >= workers), None)
    match placement.strategy:
        case "STRICT_PACK":
            return (whole,) * workers if whole is not None else None
        case "PACK":
            if whole is not None:
                return (whole,) * workers
            packed = [node for node in _roomiest(slots) for _ in range(slots[node])]
            return tuple(packed[:workers]) if len(packed) >= workers else None
        case "STRICT_SPREAD":
            # The roomiest nodes first: it leaves the most nodes open to the replicas that follow.
            spread = [node for node in _roomiest(slots) if slots[node]]
            return tuple(spread[:workers]) if len(spread) >= workers else None
        case "SPREAD":
            left = dict(slots)
            chosen: list[str] = []
            for _ in range(workers):
                open_nodes = [node for node in _roomiest(left) if left[node]]
                if not open_nodes:
                    return None
                node = min(open_nodes, key=chosen.count)
                left[node] -= 1
                chosen.append(node)
            return tuple(chosen)


def _roomiest(slots: dict[str, int]) -> list[str]:
    return sorted(slots, key=lambda node: -slots[node])


def _explain(placement: Placement, resources: ClusterResources, found: Fit) -> str:
    lines = [
        f"needs    {_replicas(placement)}, {placement.strategy}; {_amounts(*_total(placement))} in all",
        f"cluster  {resources.describe()}",
    ]
    lines += [f"  node {node.name}: {node.describe()}" for node in resources.nodes]
    for replica, nodes in enumerate(found.nodes):
        if nodes is None:  # all bundles being equal, none of the replicas that follow has room either
            lines.append(f"replicas {replica} to {placement.replicas - 1}  no room")
            break
        for node in dict.fromkeys(nodes):
            on_node = [str(bundle) for bundle, where in enumerate(nodes) if where == node]
            plural = "bundle " if len(on_node) == 1 else "bundles"
            lines.append(f"replica {replica}  {plural} {', '.join(on_node)} on node {node}")
    lines.append("it fits" if found.fits else f"it does not fit: {_missing(placement, found)}")
    return "\n".join(lines)


def _replicas(placement: Placement) -> str:
    count = "1 replica" if placement.replicas == 1 else f"{placement.replicas} replicas"
    return (
        f"{count} of {_workers(placement)} (tensor_parallel {placement.tensor_parallel} x pipeline_parallel "
        f"{placement.pipeline_parallel}) with {_amounts(placement.cpus, placement.gpus)} each"
    )


def _missing(placement: Placement, found: Fit) -> str:
    placed = sum(nodes is not None for nodes in found.nodes)
    where = {
        "STRICT_PACK": "on one node",
        "PACK": "in all",
        "SPREAD": "in all",
        "STRICT_SPREAD": "on as many nodes",
    }[placement.strategy]
    return f"room for {placed} of {placement.replicas}; each needs {_workers(placement)} {where}"


def _workers(placement: Placement) -> str:
    return "1 worker" if placement.workers == 1 else f"{placement.workers} workers"


def _total(placement: Placement) -> tuple[float, float]:
    count = placement.replicas * placement.workers
    return count * placement.cpus, count * placement.gpus


def _amounts(cpus: float, gpus: float) -> str:
    parts = [f"{_number(amount)} {name}" for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount]
    return " and ".join(parts)


def _number(amount: float) -> str:
    return f"{amount:.4f}".rstrip("0").rstrip(".")
