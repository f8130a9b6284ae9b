"""Move a limit towards the source, so that what is cut off is never computed.

::

    read -> map(f) -> limit(5)                      before: f sees a whole block
    read -> limit(5) -> map(f)                      after: f sees five rows

    union(a, b) -> limit(5)
    union(a -> limit(5), b -> limit(5)) -> limit(5)

Past steps that keep rows only; two limits become the smaller one. Not past a node that something else reads, too.
"""

from __future__ import annotations

from collections.abc import Callable

from arun.data.logical import Node, OneToOne, Plan, Union
from arun.data.steps import Limit

__all__ = ("push_limit",)


def push_limit(plan: Plan) -> Plan:
    """See the module."""
    return plan.rewrite(_visit)


def _visit(node: Node, alone: Callable[[Node], bool]) -> Node:
    if not isinstance(node, OneToOne) or len(node.steps) != 1:
        return node
    limit = node.steps[0]
    return _push(limit, node.input, alone) if isinstance(limit, Limit) else node


def _push(limit: Limit, below: Node, alone: Callable[[Node], bool]) -> Node:
    if alone(below):
        if isinstance(below, OneToOne) and len(below.steps) == 1:
            step = below.steps[0]
            if isinstance(step, Limit):
                return _push(Limit(min(limit.rows, step.rows)), below.input, alone)
            if step.keeps_rows:
                return OneToOne(below.steps, _push(limit, below.input, alone))
        elif isinstance(below, Union):
            below = Union(tuple(_push(limit, branch, alone) for branch in below.inputs))
    return OneToOne((limit,), below)
