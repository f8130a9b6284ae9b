"""The physical plan: stages, each of which one task runs, with a queue between two of them.

A stage is an operator, ``blocks in -> blocks out``, as an async generator. What a rule has fused is one stage and has
no queue inside.
"""

from __future__ import annotations

import msgspec

from arun.data.logical import AllToAll, Node, OneToOne, Plan, Write
from arun.data.steps import Limit

__all__ = ("PhysicalPlan", "Stage", "inline", "lower")


class Stage(msgspec.Struct, frozen=True, eq=False):
    """One operator and what it reads.

    :ivar number: from 0, inputs before what reads them.
    :ivar top: the node of the logical plan whose rows it gives; it runs those that are inline below, too.
    :ivar inputs: stages by the node that they stand for.
    :ivar readers: how many stages, or consumers of the whole, read it.
    :ivar apart: whether its readers are connected otherwise, too, so that one may have to wait for another and a
        bounded queue could be a deadlock: what waits for a reader spills to disk.
    """

    number: int
    top: Node
    inputs: dict[int, Stage]
    readers: int
    apart: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return _name(self.top)


class PhysicalPlan(msgspec.Struct, frozen=True, eq=False):
    """Stages, inputs first, and those that somebody outside reads: one a root of the logical plan.

    :ivar sinks: for each root, the Write above its stage; None where its blocks are what was asked for.
    :ivar limited: nodes that a limit may end before their inputs do.
    """

    stages: tuple[Stage, ...]
    roots: tuple[Stage, ...]
    sinks: tuple[Write | None, ...]
    limited: frozenset[int] = frozenset()


def lower(plan: Plan) -> PhysicalPlan:
    """The stages of an optimised plan."""
    apart = _apart(plan)
    inlined = {below.id for node in plan.nodes if inline(node) for below in node.inputs}
    made: dict[int, Stage] = {}
    for node in plan.nodes:
        if node.id not in inlined and not isinstance(node, Write):
            inputs = {below.id: made[below.id] for below in _inputs(node)}
            made[node.id] = Stage(len(made), node, inputs, plan.consumers(node), node.id in apart)
    tops = [root.input if isinstance(root, Write) else root for root in plan.roots]
    sinks = [root if isinstance(root, Write) else None for root in plan.roots]
    stages, roots = tuple(made.values()), tuple(made[top.id] for top in tops)
    return PhysicalPlan(stages, roots, tuple(sinks), frozenset(_limited(plan)))


def inline(node: Node) -> bool:
    """Whether a node's inputs are run by its own stage."""
    return isinstance(node, OneToOne | AllToAll) and node.inline


def _inputs(node: Node) -> list[Node]:
    """What a stage with this node on top reads from others."""
    found: list[Node] = []
    for below in node.inputs:
        found.extend(_inputs(below) if inline(node) else [below])
    return found


def _name(node: Node) -> str:
    below = [_name(one) for one in node.inputs] if inline(node) else []
    return f"{', '.join(below)} + {node.label}" if below else node.label


def _limited(plan: Plan) -> set[int]:
    """Nodes below a limit."""
    limited: set[int] = set()
    for node in reversed(plan.nodes):
        limits = isinstance(node, OneToOne) and any(isinstance(step, Limit) for step in node.steps)
        if limits or node.id in limited:
            limited.update(below.id for below in node.inputs)
    return limited


def _apart(plan: Plan) -> set[int]:
    """Nodes of whose readers one may have to wait for another.

    Bounded queues can only deadlock around a cycle, whichever way its edges point: a node's readers are safe from each
    other if nothing else connects them.
    """
    return {node.id for node in plan.nodes if plan.consumers(node) > 1 and _connected(plan, node)}


def _connected(plan: Plan, shared: Node) -> bool:
    component: dict[int, int] = {node.id: node.id for node in plan.nodes}

    def find(number: int) -> int:
        while component[number] != number:
            number = component[number]
        return number

    readers = [node.id for node in plan.nodes for below in node.inputs if below is shared]
    for node in plan.nodes:
        for below in node.inputs:
            if below is not shared and node is not shared:
                component[find(node.id)] = find(below.id)
    return len({find(reader) for reader in readers}) < len(readers)
