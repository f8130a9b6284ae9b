"""Batch by batch: functions of batches that are async, or want batches of a size, or several of them at a time."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pyarrow as pa

from arun.data.block import Block
from arun.data.execution.batch_functions import call_on_batch, from_results, in_format, joined
from arun.data.execution.elsewhere import Elsewhere
from arun.data.execution.fan import fan
from arun.data.execution.statistics import StepStatistics
from arun.data.steps import BatchFunction, RowFunction
from arun.handles import Handle
from arun.hosting import GRACE, close
from arun.threads import run_in_thread

if TYPE_CHECKING:
    from arun.data.execution.execution import Execution

__all__ = ("batchwise",)


async def batchwise(
    blocks: AsyncIterator[Block],
    steps: Sequence[BatchFunction | RowFunction],
    counters: Sequence[StepStatistics],
    execution: Execution,
) -> AsyncGenerator[Block]:
    """What the steps of one segment make of blocks: one function here, or several in an executor."""
    first = steps[0]
    executor = first.executor
    limit = first.concurrency or (1 if executor is None else 2 * (os.cpu_count() or 1))
    label = " + ".join(step.label for step in steps)
    elsewhere = None if executor is None else Elsewhere(steps, counters, executor, execution.options.block_rows)
    batches = blocks
    if isinstance(first, BatchFunction):
        if first.batch_size is not None:
            batches = rebatched(blocks, first.batch_size)
    else:
        batches = _spread(blocks, limit, execution.options.block_rows)
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
        if elsewhere is not None:
            return await elsewhere.run(block)
        assert isinstance(first, BatchFunction)
        return await _here(first, counters[0], block)

    done = fan(source, work, execution, limit=limit, ordered=first.ordered, name=label)
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


async def _here(step: BatchFunction, counter: StepStatistics, block: Block) -> Block:
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


async def _spread(blocks: AsyncIterator[Block], parts: int, most: int) -> AsyncGenerator[Block]:
    """Each block in so many parts, or more, of at most so many rows."""
    try:
        async for block in blocks:
            size = max(1, min(most, -(-block.rows // parts)))
            offset = 0
            while offset < block.rows:
                end = block.whole(offset + size)
                yield block.slice(offset, end - offset)
                offset = end
            if not block.rows and block.dropped:
                yield block
    finally:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
            await close(blocks)


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
