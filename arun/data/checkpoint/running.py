"""Runs with a checkpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import cast

from arun.data.block import Block
from arun.data.checkpoint.job import job_of, obstacle, source_of
from arun.data.checkpoint.journal import Journal, ResumableSink
from arun.data.execution.statistics import Statistics
from arun.data.logical import Node, Plan, Write
from arun.data.options import RunOptions
from arun.data.physical import lower
from arun.data.running import Report, plan_of, run_plan
from arun.data.sink import Part
from arun.errors import MisuseError
from arun.threads import run_in_thread

__all__ = ("run_with_checkpoint",)


async def run_with_checkpoint(node: Node, folder: Path, options: RunOptions) -> Report:
    """Run a plan from where an earlier run of it has come.

    :raises MisuseError: the plan can't be gone on with after a kill.
    :raises CheckpointError: the folder is of another job, or in use.
    """
    plan = plan_of([node], options)
    why = obstacle(plan)
    if why is not None:
        raise MisuseError(f"checkpoint={str(folder)!r}: {why}")
    sink = cast("ResumableSink", cast("Write", node).sink)
    journal = await run_in_thread(partial(_opened, folder, Plan([node]), plan))
    try:
        statistics = Statistics((), 0.0)
        if not journal.complete:
            await run_in_thread(partial(journal.begin, sink), label=f"begin {sink.name}")
            write = partial(_write, journal, sink)
            _, statistics = await run_plan(lower(plan), [write], options, progress=journal.progress)
        return Report(sum(part.rows for part in journal.parts), tuple(journal.parts), statistics)
    finally:
        journal.close()


def _opened(folder: Path, logical: Plan, plan: Plan) -> Journal:
    fragments = list(source_of(plan).fragments())
    return Journal(folder, job_of(logical, plan, fragments), fragments)


async def _write(journal: Journal, sink: ResumableSink, blocks: AsyncIterator[Block]) -> list[Part]:
    label = f"write {sink.name}"
    async for block in blocks:
        size = await run_in_thread(partial(journal.append, block), label=label)
        del block
        if sink.part_bytes is not None and size >= sink.part_bytes:
            await run_in_thread(partial(journal.commit, sink), label=label)
    return await run_in_thread(partial(journal.finish, sink), label=label)
