"""Batch by batch: functions of batches that are async, or want batches of a size, or several of them at a time."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pyarrow as pa

from arun.data.block import Block
from arun.data.execution.batch_functions import call_on_batch, from_results, in_format, joined
from arun.data.execution.fan import fan
from arun.data.execution.statistics import StepStatistics
from arun.data.steps import BatchFunction
from arun.handles import Handle
from arun.hosting import GRACE, close
from arun.threads import run_in_thread

if TYPE_CHECKING:
    from arun.data.execution.execution import Execution

__all__ = ("batchwise",)


async def batchwise(
    blocks: AsyncIterator[Block], step: BatchFunction, counter: StepStatistics, execution: Execution
) -> AsyncGenerator[Block]:
    """What a function makes of the batches of blocks."""

    batches = blocks if step.batch_size is None else rebatched(blocks, step.batch_size)
    dropped: list[int] = []

    async def source() -> AsyncGenerator[Block]:
        try:
            async for block in batches:
                if block.rows:
                    yield block
                else:
                    dropped.extend(block.dropped)
        finally:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
                await close(batches)

    async def work(handle: Handle[Block]) -> Block:
        block: Block = handle.spec
        handle.spec = None  # the function owns it now
        number = counter.rows_in
        counter.rows_in += block.rows
        counter.begin()
        began = time.perf_counter()
        try:
            batch = await _called(step, block.batch, number)
        finally:
            counter.in_flight -= 1
            counter.seconds += time.perf_counter() - began
        counter.rows_out += batch.num_rows
        return Block(batch, block.origins if step.keeps_rows else None, block.dropped)

    done = fan(source, work, execution, limit=step.concurrency or 1, ordered=step.ordered, name=step.label)
    try:
        async for handles in done:
            handles.reverse()
            while handles:
                yield handles.pop().outcome_now.value  # type: ignore[union-attr]  # errors are not handed on
        if dropped:
            yield Block(pa.RecordBatch.from_arrays([], names=[]), [], dropped)
    finally:
        with anyio.CancelScope(shield=True):
            await close(done)


async def _called(step: BatchFunction, batch: pa.RecordBatch, number: int) -> pa.RecordBatch:
    if "async" not in step.kind and step.kind != "coroutine":
        return await run_in_thread(partial(call_on_batch, step, batch, number), label=step.label)
    given: Any = batch if step.format == "arrow" else await run_in_thread(partial(in_format, batch, step.format))
    try:
        if step.kind == "coroutine":
            given = await step.function(given)
        else:
            async with aclosing(step.function(given)) as some:
                given = [one async for one in some]
        return from_results(step, batch, given)
    except Exception as exc:
        exc.add_note(f"in {step.label}, rows {number} to {number + batch.num_rows - 1} of what it was given")
        raise


async def rebatched(blocks: AsyncIterator[Block], size: int) -> AsyncGenerator[Block]:
    """Blocks of so many rows each, but for the last one."""
    waiting: list[Block] = []
    rows = 0
    try:
        async for block in blocks:
            if not block.rows and block.dropped:
                yield block
            while block.rows:
                some = block.slice(0, size - rows) if block.rows > size - rows else block
                block = block.slice(some.rows)
                waiting.append(some)
                rows += some.rows
                if rows == size:
                    yield _together(waiting)
                    waiting, rows = [], 0
        if waiting:
            yield _together(waiting)
    finally:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
            await close(blocks)


def _together(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    batch = joined([block.batch for block in blocks])
    dropped = [origin for block in blocks for origin in block.dropped]
    if blocks[0].origins is None:
        return Block(batch, None, dropped)
    return Block(batch, [origin for block in blocks for origin in block.origins or ()], dropped)
