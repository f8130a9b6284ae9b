"""Move a choice of columns towards the source, and into a source that can read just these.

::

    read parquet -> sort(id) -> select(id, x)       before: all columns are read and sorted
    read parquet [id, x] -> sort(id)                after: two

    read parquet -> group_by(k).aggregate(sum x)
    read parquet [k, x] -> group_by(k).aggregate(sum x)

Past a sort, a shuffle or a repartition if it needs no other columns; into all branches of a union. Two choices become
one. Not past functions, which may need any column, nor a node that something else reads, too.
"""

from __future__ import annotations

from collections.abc import Callable

from arun.data.logical import AllToAll, Node, OneToOne, Plan, Read, Union
from arun.data.steps import Limit, Select

__all__ = ("push_projection",)


def push_projection(plan: Plan) -> Plan:
    """See the module."""
    return plan.rewrite(_visit)


def _visit(node: Node, alone: Callable[[Node], bool]) -> Node:
    if isinstance(node, OneToOne) and len(node.steps) == 1 and isinstance(node.steps[0], Select):
        return _push(node.steps[0], node.input, alone)
    if isinstance(node, AllToAll) and not node.barrier.keeps_rows and node.barrier.columns is not None:
        select = Select(tuple(dict.fromkeys(node.barrier.columns)))
        fewer = tuple(_into_source(select, below, alone) for below in node.inputs)
        if any(a is not b for a, b in zip(fewer, node.inputs, strict=True)):
            return AllToAll(node.barrier, fewer)
    return node


def _push(select: Select, below: Node, alone: Callable[[Node], bool]) -> Node:
    if alone(below):
        if isinstance(below, Read):
            fewer = below.source.select(select.columns)
            if fewer is not None:
                return Read(fewer, below.filtered)
        elif isinstance(below, OneToOne) and len(below.steps) == 1:
            step = below.steps[0]
            if isinstance(step, Limit):
                return OneToOne(below.steps, _push(select, below.input, alone))
            if isinstance(step, Select) and set(select.columns) <= set(step.columns):
                return _push(select, below.input, alone)
        elif isinstance(below, Union):
            return Union(tuple(_push(select, branch, alone) for branch in below.inputs))
        elif isinstance(below, AllToAll) and below.barrier.keeps_rows:
            needed = below.barrier.columns
            if needed is not None and set(needed) <= set(select.columns):
                return AllToAll(below.barrier, (_push(select, below.inputs[0], alone),))
    return OneToOne((select,), below)


def _into_source(select: Select, below: Node, alone: Callable[[Node], bool]) -> Node:
    """Where nobody asked for fewer columns, only a source that reads fewer is worth it."""
    if isinstance(below, Read) and alone(below):
        fewer = below.source.select(select.columns)
        if fewer is not None:
            return Read(fewer, below.filtered)
    return below
