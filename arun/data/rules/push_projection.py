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

from arun.data.logical import AllToAll, Node, OneToOne, Plan, Read, Union
from arun.data.rules.pushing import Passed, push_down
from arun.data.steps import Limit, Select, Step

__all__ = ("push_projection",)


def push_projection(plan: Plan) -> Plan:
    """See the module."""
    return push_down(plan, _visit)


def _visit(node: Node, coming: Step | None) -> Passed:
    above = [] if coming is None else [coming]
    match node:
        case OneToOne(steps=(Select() as select,)):
            fewer = isinstance(coming, Select) and set(coming.columns) <= set(select.columns)
            return Passed(None, [coming]) if fewer else Passed(None, [select], above)
        case OneToOne(steps=(Limit(),)) if coming is not None:
            return Passed(node, [coming])
        case Union() if coming is not None:
            return Passed(node, [coming] * len(node.inputs))
        case AllToAll() if node.barrier.traits.keeps_rows:
            needed = node.barrier.traits.columns
            # Rows without any column, as a count wants them, can't be spilled.
            columns = coming.columns if isinstance(coming, Select) else ()
            passes = bool(columns) and needed is not None and set(needed) <= set(columns)
            return Passed(node, [coming]) if passes else Passed(node, (), above)
        case AllToAll() if node.barrier.traits.columns is not None:
            # Where nobody has asked for fewer columns, only a source that then reads less is worth it.
            select = Select(tuple(dict.fromkeys(node.barrier.traits.columns)))
            return Passed(node, [select if isinstance(below, Read) else None for below in node.inputs], above)
        case Read() if isinstance(coming, Select) and (coming.columns or getattr(node.source, "columnless", False)):
            fewer_read = node.source.select(coming.columns)
            return Passed(node, (), above) if fewer_read is None else Passed(Read(fewer_read, node.filtered))
        case _:
            return Passed(node, (), above)
