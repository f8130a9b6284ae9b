"""Move a filter by an Arrow expression towards the source, and into a source that can do it.

::

    read parquet -> sort(id) -> filter(x > 3)       before: everything is read and sorted
    read parquet where x > 3 -> sort(id)            after: row groups without such rows are not read

Past select, sort, random_shuffle without a seed, and union, which neither make nor change the columns that it reads,
nor treat a row otherwise when others are missing. Not past functions, which may, nor past another filter, whose rows it
may not be fit for. Not past a node that something else reads, too.
"""

from __future__ import annotations

from arun.data.logical import AllToAll, Node, OneToOne, Plan, Read, Union
from arun.data.rules.pushing import Passed, push_down
from arun.data.steps import Select, Step, Where

__all__ = ("push_filter",)


def push_filter(plan: Plan) -> Plan:
    """See the module."""
    return push_down(plan, _visit)


def _visit(node: Node, coming: Step | None) -> Passed:
    match node:
        case OneToOne(steps=(Where() as where,)):
            return Passed(None, [where], [] if coming is None else [coming])
        case OneToOne(steps=(Select(),)) if coming is not None:
            return Passed(node, [coming])
        case Union() if coming is not None:
            return Passed(node, [coming] * len(node.inputs))
        case AllToAll() if coming is not None and node.barrier.traits.row_by_row:
            return Passed(node, [coming])
        case Read() if isinstance(coming, Where) and not node.filtered:
            fewer = node.source.where(coming.expression)
            return Passed(node, (), [coming]) if fewer is None else Passed(Read(fewer, filtered=True))
        case _:
            return Passed(node, (), [] if coming is None else [coming])
