"""Make one node of nodes that do the same to the same.

::

    run(read(p) -> select(a) -> f, read(p) -> select(a) -> g)       before: the file is read twice
    run(shared -> f, shared -> g), shared = read(p) -> select(a)    after: once

Sources, choices of columns, names, limits and unions are compared by what they are. Functions are not: called twice,
one may give two different things. (What is *one* node in the plan runs once without any rule.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from arun.data.logical import Node, OneToOne, Plan, Read, Union
from arun.data.steps import Drop, Limit, Rename, Select, Step

__all__ = ("share_subplans",)


def share_subplans(plan: Plan) -> Plan:
    """See the module."""
    known: dict[Hashable, Node] = {}

    def share(node: Node, _: Callable[[Node], bool]) -> Node:
        identity = _identity(node)
        return node if identity is None else known.setdefault(identity, node)

    return plan.rewrite(share)


def _identity(node: Node) -> Hashable:
    below = tuple(one.id for one in node.inputs)
    match node:
        case Read():
            return "read", id(node.source)
        case Union():
            return "union", below
        case OneToOne():
            steps = [_step_identity(step) for step in node.steps]
            return None if None in steps else ("steps", tuple(steps), below)
        case _:
            return None


def _step_identity(step: Step) -> Hashable:
    match step:
        case Select() | Drop():
            return type(step), step.columns
        case Rename():
            return Rename, tuple(step.names.items())
        case Limit():
            return Limit, step.rows
        case _:
            return None
