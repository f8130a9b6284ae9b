"""Segments: how the steps of a fused chain run, one segment after the other in one generator."""

from __future__ import annotations

from typing import Literal

import msgspec

from arun.data.steps import RowFunction, Step

__all__ = ("Segment", "segments")


class Segment(msgspec.Struct, frozen=True, eq=False):
    """Steps that run together.

    :ivar kind: "plain": as one function of a block, in a thread; "rows": row by row, many rows at a time; "batches":
        batch by batch, or block by block in an executor.
    """

    kind: Literal["plain", "rows", "batches"]
    steps: tuple[Step, ...]

    @property
    def label(self) -> str:
        """For people."""
        steps = " + ".join(step.label for step in self.steps)
        return steps if self.kind == "plain" else f"{steps} [{self._how()}]"

    def _how(self) -> str:
        step = self.steps[0]
        limit = getattr(step, "concurrency", None)
        where = getattr(step, "executor", None)
        order = "" if getattr(step, "ordered", True) else ", unordered"
        return f"{self.kind}{f', {limit} at a time' if limit else ''}{f', {where!r}' if where else ''}{order}"


def segments(steps: tuple[Step, ...]) -> list[Segment]:
    """Cut a chain into segments."""
    cut: list[Segment] = []
    for step in steps:
        kind = _kind(step)
        if cut and cut[-1].kind == kind and _together(cut[-1].steps[-1], step):
            cut[-1] = Segment(kind, (*cut[-1].steps, step))
        else:
            cut.append(Segment(kind, (step,)))
    return cut


def _kind(step: Step) -> Literal["plain", "rows", "batches"]:
    if step.plain:
        return "plain"
    return "rows" if isinstance(step, RowFunction) and step.executor is None else "batches"


def _together(before: Step, step: Step) -> bool:
    if step.plain:
        return True
    if not isinstance(before, RowFunction) or not isinstance(step, RowFunction):
        return False
    return (
        (before.concurrency, before.ordered) == (step.concurrency, step.ordered)
        and before.executor is step.executor
        and before.schema is None  # which holds for its rows, and not for those that the next step makes of them
        and not (before.streams or step.streams)
        # What knows how many rows it wants at a time is not held up by the step after it, nor by the one before.
        and not any(hasattr(one.function, "batch_limit") for one in (before, step))
    )
