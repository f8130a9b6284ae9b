"""Whether and where the bundles of a placement fit: arithmetic over a cluster's numbers, told as data and as text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import msgspec

from actors.cluster import ClusterResources, NodeResources

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actors.bundles import Placement

__all__ = ("Explanation", "Fit", "ReplicaPlan", "Verdict", "is_selector", "explain", "fit", "matches", "refusal")

Verdict = Literal["fits", "fits later", "never"]

# Sums of fractions such as 0.1 are off by rounding; Ray counts in units of 1e-4.
_EPSILON = 1e-6

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"(?P<negated>!?)(?:in\((?P<several>{_LABEL}(?:, ?{_LABEL})*)\)|(?P<one>{_LABEL}))")


class Fit(msgspec.Struct, frozen=True):
    """Where the bundles of a placement go.

    :ivar nodes: for each replica the node of each bundle, or None where the replica has no room.
    """

    nodes: tuple[tuple[str, ...] | None, ...]

    @property
    def fits(self) -> bool:
        """Whether every replica has room."""
        return None not in self.nodes


class ReplicaPlan(msgspec.Struct, frozen=True):
    """Where one replica would go now.

    :ivar bundles: what each of its workers needs, by resource.
    :ivar nodes: the node of each bundle, or None where there is no room for the replica.
    """

    replica: int
    bundles: tuple[dict[str, float], ...]
    nodes: tuple[str, ...] | None


class Explanation(msgspec.Struct, frozen=True):
    """A placement against a cluster, before anything is reserved. ``str()`` of it is for people.

    :ivar verdict: ``"fits"`` now; ``"fits later"``, when what others hold comes free; ``"never"``, unless the
        cluster grows.
    :ivar reason: what is missing; None where it fits.
    :ivar needed: sums of all bundles, by resource.
    :ivar nodes: of the cluster, what they have and what of it is free.
    """

    verdict: Verdict
    reason: str | None
    needed: dict[str, float]
    nodes: tuple[NodeResources, ...]
    replicas: tuple[ReplicaPlan, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def fit(placement: Placement, resources: ClusterResources, *, idle: bool = False) -> Fit:
    """Place the replicas one after another, each on the first nodes that hold it by its strategy.

    All bundles of a placement are equal, so a node is a number of slots, and first fit finds room wherever
    there is any.

    :param idle: count what the nodes have in all instead of what is free.
    """
    slots = {node.name: _slots(placement, node, idle=idle) for node in resources.nodes}
    placed: list[tuple[str, ...] | None] = []
    for _ in range(placement.replicas):
        nodes = _choose(placement, slots)
        for node in nodes or ():
            slots[node] -= 1
        placed.append(nodes)
    return Fit(tuple(placed))


def explain(placement: Placement, resources: ClusterResources) -> Explanation:
    """What :meth:`Placement.explain` returns."""
    found = fit(placement, resources)
    verdict: Verdict = "fits" if found.fits else "fits later"
    judged = found
    if not found.fits and not (judged := fit(placement, resources, idle=True)).fits:
        verdict = "never"
    reason = None if found.fits else _missing(placement, resources, judged if verdict == "never" else found)
    return Explanation(
        verdict=verdict,
        reason=reason,
        needed=_total(placement),
        nodes=resources.nodes,
        replicas=tuple(
            ReplicaPlan(replica, tuple(bundles), nodes)
            for replica, (bundles, nodes) in enumerate(zip(placement.bundles(), found.nodes, strict=True))
        ),
        text=_text(placement, resources, found, verdict, reason),
    )


def refusal(placement: Placement, resources: ClusterResources, *, idle: bool = False) -> str | None:
    """What :meth:`Placement.refusal` returns."""
    found = fit(placement, resources, idle=idle)
    if found.fits:
        return None
    return (
        f"the cluster can't hold {_replicas(placement)} ({placement.strategy}), {_amounts(_total(placement))} in all: "
        f"{_missing(placement, resources, found)}. The cluster has {resources.describe()}. Ask for fewer replicas, a "
        "smaller tensor_parallel or pipeline_parallel, fewer cpus or gpus per worker, or another strategy, or give the "
        "cluster more; Placement.explain() shows what would go where"
    )


def is_selector(selector: str) -> bool:
    """Whether this is a label selector: ``a``, ``!a``, ``in(a, b)`` or ``!in(a, b)``."""
    return _SELECTOR.fullmatch(selector) is not None


def matches(labels: Mapping[str, str], selectors: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one that all selectors mean. A label that is missing is never equal."""
    for name, selector in selectors.items():
        found = _SELECTOR.fullmatch(selector)
        assert found is not None  # Placement checks its selectors
        wanted = re.split(", ?", found["several"] or found["one"])
        if (labels.get(name) in wanted) == bool(found["negated"]):
            return False
    return True


def _slots(placement: Placement, node: NodeResources, *, idle: bool) -> int:
    """How many of the placement's bundles a node holds."""
    if not matches(node.labels, placement.labels):
        return 0
    cpus, gpus = node.amounts(idle=idle)
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


def _text(placement: Placement, resources: ClusterResources, found: Fit, verdict: Verdict, reason: str | None) -> str:
    lines = [
        f"needs    {_replicas(placement)}, {placement.strategy}; {_amounts(_total(placement))} in all",
        *([f"labels   {_selectors(placement)}"] if placement.labels else []),
        f"cluster  {resources.describe()}",
    ]
    for each in resources.nodes:
        unfit = "" if matches(each.labels, placement.labels) else "; its labels do not match"
        lines.append(f"  node {each.name}: {each.describe()}{unfit}")
    for replica, nodes in enumerate(found.nodes):
        if nodes is None:  # all bundles being equal, none of the replicas that follow has room either
            last = placement.replicas - 1
            which = f"replica {replica} " if replica == last else f"replicas {replica} to {last} "
            lines.append(f"{which} no room")
            break
        for node in dict.fromkeys(nodes):
            on_node = [str(bundle) for bundle, where in enumerate(nodes) if where == node]
            plural = "bundle " if len(on_node) == 1 else "bundles"
            lines.append(f"replica {replica}  {plural} {', '.join(on_node)} on node {node}")
    verdicts = {
        "fits": "it fits",
        "fits later": f"it does not fit now, but will when others give back what they hold: {reason}",
        "never": f"it does not fit, not even when nothing else is in the cluster: {reason}",
    }
    return "\n".join([*lines, verdicts[verdict]])


def _replicas(placement: Placement) -> str:
    count = "1 replica" if placement.replicas == 1 else f"{placement.replicas} replicas"
    return (
        f"{count} of {_workers(placement)} (tensor_parallel {placement.tensor_parallel} x pipeline_parallel "
        f"{placement.pipeline_parallel}) with {_amounts({'CPU': placement.cpus, 'GPU': placement.gpus})} each"
    )


def _missing(placement: Placement, resources: ClusterResources, found: Fit) -> str:
    placed = sum(nodes is not None for nodes in found.nodes)
    where = {
        "STRICT_PACK": "on one node",
        "PACK": "in all",
        "SPREAD": "in all",
        "STRICT_SPREAD": "on as many nodes",
    }[placement.strategy]
    missing = f"room for {placed} of {placement.replicas}; each needs {_workers(placement)} {where}"
    if placement.labels:
        count = sum(matches(node.labels, placement.labels) for node in resources.nodes)
        missing += f"; {count} of {len(resources.nodes)} nodes have the labels {_selectors(placement)}"
    return missing


def _selectors(placement: Placement) -> str:
    return ", ".join(f"{name}={selector}" for name, selector in placement.labels.items())


def _workers(placement: Placement) -> str:
    return "1 worker" if placement.workers == 1 else f"{placement.workers} workers"


def _total(placement: Placement) -> dict[str, float]:
    count = placement.replicas * placement.workers
    return {name: count * amount for name, amount in placement.bundle().items()}


def _amounts(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{_number(amount)} {name}" for name, amount in amounts.items() if amount)


def _number(amount: float) -> str:
    return f"{amount:.4f}".rstrip("0").rstrip(".")
