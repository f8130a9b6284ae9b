"""Runs: from a plan to a result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from arun.data import consumers
from arun.data.checkpoint.progress import Progress
from arun.data.execution.execution import Consumer, Execution
from arun.data.execution.statistics import Statistics
from arun.data.logical import Node, Plan
from arun.data.options import RunOptions
from arun.data.physical import PhysicalPlan
from arun.data.rules import RULES, optimise
from arun.data.sink import Part

__all__ = ("Report", "plan_of", "run_plan")


class Report(msgspec.Struct, frozen=True):
    """What ``arun()`` of a dataset gives.

    :ivar rows: that came out of it.
    :ivar parts: that its sink has written.
    """

    rows: int
    parts: tuple[Part, ...]
    statistics: Statistics

    def __str__(self) -> str:
        """In a line: ``30 rows in 2 parts of 950 bytes, 0.031 s``."""
        size = sum(part.size for part in self.parts)
        parts = (
            f" in {len(self.parts):,} part{'s' if len(self.parts) > 1 else ''} of {size:,} bytes" if self.parts else ""
        )
        return f"{self.rows:,} rows{parts}, {self.statistics.seconds:.3f} s"


def plan_of(roots: Sequence[Node], options: RunOptions) -> Plan:
    """The plan that runs."""
    return optimise(Plan(roots), RULES if options.rules is None else options.rules)


async def run_plan(
    plan: PhysicalPlan, consume: Sequence[Consumer | None], options: RunOptions, progress: Progress | None = None
) -> tuple[list[Any], Statistics]:
    """Run a physical plan.

    :param consume: for each root, what reads it; None where it has a sink, which then does.
    :param progress: what need not be done again, where a checkpoint is kept.
    """
    execution = Execution(plan, options, progress=progress)
    consumed: list[Consumer] = []
    for own, sink in zip(consume, plan.sinks, strict=True):
        if own is not None:
            consumed.append(own)
        else:
            consumed.append(consumers.count if sink is None else partial(consumers.write, sink.sink))
    results = await execution.run(consumed)
    return results, execution.statistics()
