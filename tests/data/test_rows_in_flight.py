"""Rows that are at work: how many, in which order they come, and who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pyarrow as pa
import pytest
from anyio import wait_all_tasks_blocked

from arun.data import Dataset, RunOptions, from_iterable, from_rows

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]
Row = dict[str, Any]


def numbers(n: int) -> Dataset:
    return from_rows([{"n": i} for i in range(n)])


def of(block: pa.RecordBatch) -> list[int]:
    return block["n"].to_pylist()


async def test_no_row_waits_for_a_slow_one_when_order_is_given_up() -> None:
    slow = anyio.Event()

    async def work(row: Row) -> Row:
        if row["n"] == 0:
            await slow.wait()
        return row

    seen: list[int] = []
    async with numbers(100).map(work, concurrency=4, ordered=False).astream() as blocks:
        while len(seen) < 99:
            seen += of(await anext(blocks))
        slow.set()
        async for block in blocks:
            seen += of(block)
    assert seen[-1] == 0
    assert sorted(seen) == list(range(100))


async def test_in_order_rows_after_a_slow_one_are_computed_but_wait_to_be_handed_on() -> None:
    slow = anyio.Event()
    done: list[int] = []

    async def work(row: Row) -> Row:
        if row["n"] == 0:
            await slow.wait()
        done.append(row["n"])
        return row

    async with numbers(6).map(work, concurrency=3).astream() as blocks:
        with anyio.move_on_after(0.05):
            await anext(blocks)
        assert done == [1, 2]  # with the first one in flight that makes three
        slow.set()
        assert [n async for block in blocks for n in of(block)] == list(range(6))


async def test_rows_that_are_ready_are_a_block_as_soon_as_one_is_wanted() -> None:
    steps = [anyio.Event() for _ in range(4)]

    async def work(row: Row) -> Row:
        await steps[row["n"]].wait()
        return row

    async with numbers(4).map(work).astream() as blocks:
        steps[0].set()
        assert of(await anext(blocks)) == [0]
        steps[1].set()
        steps[2].set()
        assert of(await anext(blocks)) == [1, 2]
        steps[3].set()
        assert of(await anext(blocks)) == [3]


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_no_more_rows_are_at_work_than_was_said(concurrency: int) -> None:
    now = peak = 0
    full = anyio.Event()

    async def work(row: Row) -> Row:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        if now == concurrency:
            full.set()
        await full.wait()
        await anyio.lowlevel.checkpoint()
        now -= 1
        return row

    dataset = numbers(20).map(work, concurrency=concurrency)
    assert (await dataset.arun()).rows == 20
    assert peak == concurrency
    (step,) = dataset.stats().stages[-1].steps
    assert (step.rows_in, step.rows_out, step.in_flight, step.peak_in_flight) == (20, 20, 0, concurrency)


async def test_plain_functions_with_a_concurrency_run_in_as_many_threads() -> None:
    meet = threading.Barrier(3, timeout=10)

    def work(row: Row) -> Row:
        meet.wait()
        return row

    assert (await numbers(6).map(work, concurrency=3).arun()).rows == 6


async def test_plain_functions_run_in_another_thread_than_the_event_loop() -> None:
    def work(row: Row) -> Row:
        return {"n": threading.get_ident()}

    table = await numbers(2).map(work).collect()
    assert threading.get_ident() not in table["n"].to_pylist()


async def test_async_steps_of_a_kind_run_as_one_fan_out_and_others_do_not() -> None:
    async def one(row: Row) -> Row:
        return row

    together = numbers(1).map(one).map(one, ordered=True)
    apart = numbers(1).map(one).map(one, concurrency=7)
    assert "map(one) + map(one) [rows]" in together.explain()
    assert "map(one) [rows, 7 at a time]" in apart.explain()


async def test_a_stage_that_nobody_reads_stops_at_its_queue() -> None:
    made: list[int] = []

    async def source() -> AsyncIterator[pa.RecordBatch]:
        for n in range(100):
            made.append(n)
            yield pa.record_batch({"n": [n]})

    def same(row: Row) -> Row:
        return row

    dataset = from_iterable(source).map(same, fuse=False).map(same, fuse=False)
    async with dataset.astream(RunOptions(queue_blocks=1)) as blocks:
        await anext(blocks)
        await anyio.sleep(0.05)
        # One at each queue and one in each hand: the stream's, two stages', the source's.
        assert len(made) <= 10
        assert len([block async for block in blocks]) == 99


async def test_rows_of_an_async_iterable_go_on_while_it_waits_for_more() -> None:
    more = anyio.Event()

    async def trickle() -> AsyncIterator[Row]:
        yield {"n": 0}
        await more.wait()
        yield {"n": 1}

    async with from_iterable(trickle).map(lambda row: row).rows() as rows:
        assert await anext(rows) == {"n": 0}
        more.set()
        assert await anext(rows) == {"n": 1}


async def test_rows_with_a_common_prefix_run_together() -> None:
    from arun.data.declare import row_function
    from arun.data.logical import OneToOne

    begun: list[str] = []

    async def work(row: Row) -> Row:
        begun.append(row["p"])
        await anyio.lowlevel.checkpoint()
        return row

    prompts = [{"p": f"{i % 2} {i}", "n": i} for i in range(10)]
    step = row_function("map", work, {"concurrency": 1})
    for ordered in (True, False):
        begun.clear()
        import msgspec

        grouped = msgspec.structs.replace(step, prefix=lambda row: row["p"], ordered=ordered)
        table = await Dataset(OneToOne((grouped,), from_rows(prompts).node)).collect()
        assert begun == sorted(row["p"] for row in prompts)
        came = table["n"].to_pylist()
        assert came == list(range(10)) if ordered else came != list(range(10))


async def test_a_stream_has_one_reader() -> None:
    from arun import MisuseError

    never = anyio.Event()

    async def work(row: Row) -> Row:
        await never.wait()
        return row

    async with numbers(1).map(work).astream() as blocks:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anext, blocks)
            await wait_all_tasks_blocked()
            with pytest.raises(MisuseError, match="two tasks iterate over one stream of blocks"):
                await anext(blocks)
            tasks.cancel_scope.cancel()
