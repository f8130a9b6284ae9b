"""Pushing: moves a step towards the sources, from node to node. What a step may pass is a rule's to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from arun.data.logical import Node, OneToOne, Plan
from arun.data.steps import Step

__all__ = ("Passed", "Visit", "push_down")


class Passed(msgspec.Struct, frozen=True, eq=False):
    """What becomes of a node, and of the step that has come down to it.

    :ivar node: the node itself, or what stands in its place; None: its input does.
    :ivar below: for each input, the step that goes on to it.
    :ivar above: steps that stay on top of the node, the lower one first.
    """

    node: Node | None
    below: Sequence[Step | None] = ()
    above: Sequence[Step] = ()


#: Given a node and the step that has come down to it, if one has.
Visit: TypeAlias = Callable[[Node, Step | None], Passed]


def push_down(plan: Plan, visit: Visit) -> Plan:
    """Visit all nodes, those that read before what they read, and make the plan that comes of it.

    A step that would go on to a node that several read stays before it, on the way to the one that it came from.
    """
    coming: dict[int, Step] = {}
    passed: dict[int, Passed] = {}
    for node in reversed(plan.nodes):
        result = passed[node.id] = visit(node, coming.get(node.id))
        for below, step in zip(node.inputs, result.below, strict=False):
            if step is not None and plan.consumers(below) == 1:
                coming[below.id] = step
    new: dict[int, Node] = {}
    for node in plan.nodes:
        result = passed[node.id]
        steps = [*result.below, *[None] * (len(node.inputs) - len(result.below))]
        inputs = [
            new[below.id] if step is None or plan.consumers(below) == 1 else OneToOne((step,), new[below.id])
            for below, step in zip(node.inputs, steps, strict=True)
        ]
        made = inputs[0] if result.node is None else result.node
        if result.node is not None and any(a is not b for a, b in zip(inputs, made.inputs, strict=True)):
            made = made.over(inputs)
        for step in result.above:
            made = OneToOne((step,), made)
        new[node.id] = made
    roots = [new[root.id] for root in plan.roots]
    return plan if all(a is b for a, b in zip(roots, plan.roots, strict=True)) else Plan(roots)
