"""Fuse one-to-one steps that follow each other, and the source or union before them: one stage, no queue inside.

::

    read -> map(f) -> filter(p) -> select(a)        before: a queue at each arrow
    read + map(f) + filter(p) + select(a)           after: rows become a block once, at the end

A union has nothing to compute meanwhile, and a limit after it ends it before it goes on to its next input.

Not across a node that several others read, which would run twice, nor around a step with ``fuse=False``.
"""

from __future__ import annotations

from collections.abc import Callable

from arun.data.logical import Iterate, Node, OneToOne, Plan, Read, Union

__all__ = ("fuse_chains",)


def fuse_chains(plan: Plan) -> Plan:
    """See the module."""
    return plan.rewrite(_fuse)


def _fuse(node: Node, alone: Callable[[Node], bool]) -> Node:
    if not isinstance(node, OneToOne) or not node.steps[0].fuse or not alone(node.input):
        return node
    match node.input:
        case Read() | Iterate() | Union():
            return OneToOne(node.steps, node.input, inline=True)
        case OneToOne(steps=before) if before[-1].fuse:
            return OneToOne(before + node.steps, node.input.input, node.input.inline)
        case _:
            return node
