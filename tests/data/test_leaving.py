"""Leaving a run early, by taking enough, by cancelling or by forgetting about it, leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pytest

from arun.data import Dataset, from_iterable, from_rows, read, run
from arun.data.source import Fragment

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]
Row = dict[str, Any]


class Counting:
    """A source of one-row blocks that notes what is read, and what is closed."""

    name = "counting"

    def __init__(self, fragments: int = 10, blocks: int = 10) -> None:
        self.read_blocks = 0
        self.open = 0
        self._fragments = fragments
        self._blocks = blocks

    def schema(self) -> None:
        return None

    def fragments(self) -> Iterator[Fragment]:
        for number in range(self._fragments):
            yield Fragment(key=str(number), place=number)

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        self.open += 1
        try:
            for n in range(self._blocks):
                self.read_blocks += 1
                yield pa.record_batch({"n": [fragment.place * self._blocks + n]})
        finally:
            self.open -= 1

    def count(self) -> None:
        return None

    def select(self, columns: Any) -> None:
        return None

    def where(self, predicate: Any) -> None:
        return None


async def slow(row: Row) -> Row:
    await anyio.sleep_forever()
    return row


async def test_taking_a_few_rows_reads_no_more_than_it_must() -> None:
    source, called = Counting(), []

    def note(row: Row) -> Row:
        called.append(row["n"])
        return row

    assert await read(source).map(note).filter(lambda row: row["n"] % 2 == 1).take(3) == [{"n": 1}, {"n": 3}, {"n": 5}]
    assert called == list(range(6))
    assert (source.read_blocks, source.open) == (6, 0)


async def test_a_limit_behind_an_async_step_asks_it_for_no_row_too_many() -> None:
    called: list[int] = []

    async def note(row: Row) -> Row:
        called.append(row["n"])
        return row

    assert len(await from_rows([{"n": i} for i in range(1000)]).map(note).select("n").take(5)) == 5
    assert called == list(range(5))


async def test_leaving_a_stream_closes_the_source_and_cancels_what_is_at_work() -> None:
    source = Counting()
    begun: list[int] = []
    cancelled: list[int] = []

    async def note(row: Row) -> Row:
        try:
            if row["n"]:
                begun.append(row["n"])
                await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.append(row["n"])
            raise
        return row

    async with read(source).map(note, concurrency=3).astream() as blocks:
        assert (await anext(blocks))["n"].to_pylist() == [0]
        while len(begun) < 3:
            await anyio.lowlevel.checkpoint()
    assert len(cancelled) == 3
    assert source.open == 0


async def test_a_stream_that_is_dropped_ends_its_run() -> None:
    source = Counting()
    blocks = read(source).map(slow).astream()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anext, blocks)
        while not source.read_blocks:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    del blocks, tasks
    gc.collect()
    while source.open or any("arun" in (task.name or "") for task in anyio.get_running_tasks()):
        await anyio.lowlevel.checkpoint()


async def test_a_cancelled_run_cleans_up_before_it_returns() -> None:
    source = Counting()
    begun: list[int] = []
    cleaned: list[str] = []

    async def held(row: Row) -> Row:
        try:
            begun.append(row["n"])
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
                cleaned.append("row")
        return row

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read(source).map(held, concurrency=2).map(lambda row: row, fuse=False).sort("n").arun)
        while len(begun) < 2:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert cleaned == ["row", "row"]
    assert source.open == 0


@pytest.mark.usefixtures("asyncio_only")
async def test_asyncios_own_timeout_works_as_any() -> None:
    source = Counting()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await read(source).map(slow).collect()
    assert source.open == 0


async def test_a_plain_function_is_cancelled_between_two_rows() -> None:
    began, never = threading.Event(), threading.Event()
    calls: list[int] = []

    def work(row: Row) -> Row:
        calls.append(row["n"])
        began.set()
        never.wait(0.06)
        return row

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(from_rows([{"n": i} for i in range(1000)]).map(work).arun)
        await anyio.to_thread.run_sync(began.wait)
        tasks.cancel_scope.cancel()
    assert len(calls) < 5


async def test_a_branch_that_has_enough_frees_the_other() -> None:
    source = Counting()
    shared = read(source).map(lambda row: row)
    few, all_of_it = await run(shared.limit(2).map_batches(lambda b: b), shared.map_batches(lambda b: b))
    assert (few.rows, all_of_it.rows) == (2, 100)


async def test_a_branch_that_is_never_read_is_left_too() -> None:
    source = Counting()
    shared = read(source)
    both = shared.filter(lambda row: True).union(shared.map(lambda row: row, fuse=False).filter(lambda row: True))
    assert await both.take(1) == [{"n": 0}]
    assert source.open == 0


async def test_an_async_generator_of_the_user_is_closed() -> None:
    closed: list[str] = []

    async def endless() -> AsyncIterator[Row]:
        try:
            while True:
                yield {"n": 0}
        finally:
            await anyio.lowlevel.checkpoint()
            closed.append("source")

    async def many(row: Row) -> AsyncIterator[Row]:
        try:
            yield row
        finally:
            closed.append("row")

    assert len(await from_iterable(endless).flat_map(many, concurrency=1).take(1)) == 1
    assert "source" in closed
    assert "row" in closed


async def test_a_cancelled_write_leaves_no_part(tmp_path: Path) -> None:
    async def slow_later(row: Row) -> Row:
        return row if row["n"] < 5 else await slow(row)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read(Counting()).map(slow_later).write_parquet(tmp_path / "out").arun)
        while not list(tmp_path.glob("out/*")):  # noqa: ASYNC240 - it has to see the file while it is being written
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert list((tmp_path / "out").iterdir()) == []


async def test_datasets_run_one_after_the_other_and_beside_each_other() -> None:
    dataset: Dataset = from_rows([{"n": i} for i in range(50)]).map(lambda row: row).sort("n")
    counts: list[int] = []

    async def count() -> None:
        counts.append((await dataset.arun()).rows)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(count)
    assert counts == [50, 50, 50]
