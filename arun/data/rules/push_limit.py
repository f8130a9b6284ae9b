"""Move a limit towards the source, so that what is cut off is never computed.

::

    read -> map(f) -> limit(5)                      before: f sees a whole block
    read -> limit(5) -> map(f)                      after: f sees five rows

    union(a, b) -> limit(5)
    union(a -> limit(5), b -> limit(5)) -> limit(5)

    sort(x) -> limit(5)                             before: all rows are kept, in order
    sort(x, limit=5) -> limit(5)                    after: the first five of those that have come

Past steps that keep rows only; two limits become the smaller one. Not past a node that something else reads, too.
"""

from __future__ import annotations

import msgspec

from arun.data.all_to_all import Sort
from arun.data.logical import AllToAll, Node, OneToOne, Plan, Union
from arun.data.rules.pushing import Passed, push_down
from arun.data.steps import Limit, Step

__all__ = ("push_limit",)


def push_limit(plan: Plan) -> Plan:
    """See the module."""
    return push_down(plan, _visit)


def _visit(node: Node, coming: Step | None) -> Passed:
    match node:
        case OneToOne(steps=(Limit() as limit,)):
            rows = min(limit.rows, coming.rows) if isinstance(coming, Limit) else limit.rows
            return Passed(None, [Limit(rows)])
        case OneToOne(steps=(step,)) if coming is not None and step.keeps_rows:
            return Passed(node, [coming])
        case Union() if coming is not None:
            return Passed(node, [coming] * len(node.inputs), [coming])
        case AllToAll(barrier=Sort() as sort) if isinstance(coming, Limit):
            return Passed(AllToAll(msgspec.structs.replace(sort, limit=coming.rows), node.inputs), (), [coming])
        case _:
            return Passed(node, (), [] if coming is None else [coming])
