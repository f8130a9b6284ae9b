"""Move a limit towards the source, so that what is cut off is never computed.

::

    read -> map(f) -> limit(5)                      before: f sees a whole block
    read -> limit(5) -> map(f)                      after: f sees five rows

    union(a, b) -> limit(5)
    union(a -> limit(5), b -> limit(5)) -> limit(5)

Past steps that keep rows only; two limits become the smaller one. Not past a node that something else reads, too.
"""

from __future__ import annotations

from arun.data.logical import Node, OneToOne, Plan, Union
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
        case _:
            return Passed(node, (), [] if coming is None else [coming])
