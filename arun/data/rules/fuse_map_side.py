"""Fuse a chain, or a source, into the map side of the all-to-all operation that it feeds.

::

    read + map(f) + filter(p) -> sort(id)           before: a queue between the two
    read + map(f) + filter(p) + sort(id)            after: the sort pulls the chain itself

    read parquet -> sort(id)
    read parquet + sort(id)                         after: the sort may scan the file in its own way

Not where something else reads the chain, too, nor after a step with ``fuse=False``.
"""

from __future__ import annotations

from collections.abc import Callable

from arun.data.logical import AllToAll, Iterate, Node, OneToOne, Plan, Read

__all__ = ("fuse_map_side",)


def fuse_map_side(plan: Plan) -> Plan:
    """See the module."""
    return plan.rewrite(_fuse)


def _fuse(node: Node, alone: Callable[[Node], bool]) -> Node:
    if isinstance(node, AllToAll) and all(alone(below) and _may_fuse(below) for below in node.inputs):
        return AllToAll(node.barrier, node.inputs, inline=True)
    return node


def _may_fuse(below: Node) -> bool:
    return isinstance(below, Read | Iterate) or (isinstance(below, OneToOne) and below.steps[-1].fuse)
