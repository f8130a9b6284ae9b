"""Move a filter by an Arrow expression towards the source, and into a source that can do it.

::

    read parquet -> sort(id) -> filter(x > 3)       before: everything is read and sorted
    read parquet where x > 3 -> sort(id)            after: row groups without such rows are not read

Past select, repartition, sort, random_shuffle and union, which neither make nor change the columns that it reads; not
past functions, which may. Not past a node that something else reads, too.
"""

from __future__ import annotations

from collections.abc import Callable

from arun.data.logical import AllToAll, Node, OneToOne, Plan, Read, Union
from arun.data.steps import Select, Where

__all__ = ("push_filter",)


def push_filter(plan: Plan) -> Plan:
    """See the module."""
    return plan.rewrite(_visit)


def _visit(node: Node, alone: Callable[[Node], bool]) -> Node:
    if not isinstance(node, OneToOne) or len(node.steps) != 1:
        return node
    where = node.steps[0]
    return _push(where, node.input, alone) if isinstance(where, Where) else node


def _push(where: Where, below: Node, alone: Callable[[Node], bool]) -> Node:
    if alone(below):
        if isinstance(below, Read):
            fewer = None if below.filtered else below.source.where(where.expression)
            if fewer is not None:
                return Read(fewer, filtered=True)
        elif isinstance(below, OneToOne) and len(below.steps) == 1 and isinstance(below.steps[0], Select):
            return OneToOne(below.steps, _push(where, below.input, alone))
        elif isinstance(below, Union):
            return Union(tuple(_push(where, branch, alone) for branch in below.inputs))
        elif isinstance(below, AllToAll) and below.barrier.keeps_rows:
            return AllToAll(below.barrier, (_push(where, below.inputs[0], alone),))
    return OneToOne((where,), below)
