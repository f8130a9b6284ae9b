"""What a run counts of its stages and steps."""

from __future__ import annotations

import msgspec

__all__ = ("StageStatistics", "Statistics", "StepStatistics")


class StepStatistics(msgspec.Struct, gc=False):
    """One step of a stage.

    :ivar name: as in the plan.
    :ivar rows_in: given to it.
    :ivar rows_out: that it gave.
    :ivar retried: calls that failed and were made again.
    :ivar failed: rows that were left out or marked by ``on_error``.
    :ivar seconds: spent in it; of steps that run row by row, over all rows.
    :ivar in_flight: rows, or batches, at work now, where they run row by row.
    :ivar peak_in_flight: most of them at a time.
    """

    name: str
    rows_in: int = 0
    rows_out: int = 0
    retried: int = 0
    failed: int = 0
    seconds: float = 0.0
    in_flight: int = 0
    peak_in_flight: int = 0

    def begin(self) -> None:
        """One more is at work."""
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)


class StageStatistics(msgspec.Struct):
    """One stage of a run.

    :ivar number: as in ``explain()``.
    :ivar rows: that it has given.
    :ivar size: bytes that it has given.
    :ivar blocks: that it has given.
    :ivar waited_in: seconds that it waited for its inputs.
    :ivar waited_out: seconds that it waited for whoever takes its blocks.
    :ivar peak_blocks: most blocks that have waited for whoever takes them.
    :ivar spilled: blocks that waited on disk.
    :ivar steps: what it does.
    """

    number: int
    name: str
    rows: int = 0
    size: int = 0
    blocks: int = 0
    waited_in: float = 0.0
    waited_out: float = 0.0
    peak_blocks: int = 0
    spilled: int = 0
    steps: list[StepStatistics] = []


class Statistics(msgspec.Struct, frozen=True):
    """What a run has done, by stage.

    :ivar seconds: from its start to its end, or till now.
    """

    stages: tuple[StageStatistics, ...]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.seconds:.3f} s"]
        for stage in self.stages:
            lines.append(
                f"[{stage.number}] {stage.name}: {stage.rows:,} rows in {stage.blocks:,} blocks, {stage.size:,} bytes; "
                f"waited {stage.waited_in:.3f} s for input, {stage.waited_out:.3f} s for its readers; at most "
                f"{stage.peak_blocks} blocks waited"
            )
            lines.extend(
                f"      {step.name}: {step.rows_in:,} -> {step.rows_out:,} rows in {step.seconds:.3f} s"
                + (f", {step.retried:,} times again" if step.retried else "")
                + (f", {step.failed:,} failed" if step.failed else "")
                + (f", at most {step.peak_in_flight} at a time" if step.peak_in_flight else "")
                for step in stage.steps
            )
        return "\n".join(lines)
