"""What every store does, on both event loops."""

from __future__ import annotations

import gc
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from arun import RunConflictError, SQLiteStore, StoreError
from arun.store import History, Step

pytestmark = pytest.mark.anyio
Open = Callable[[], Any]
ROOT = Path(__file__).parents[2]


async def test_a_new_application_is_unknown_and_a_begun_one_is_known(open_store: Open) -> None:
    async with open_store() as store:
        opened = await store.open_run("a", None)
        assert (opened.graph, opened.sequence_id, opened.pending, opened.lease.epoch) == (None, 0, 0, 1)
        await store.begin(opened.lease, "graph", b"initial", fresh=True)
        await store.close_run(opened.lease)
    async with open_store() as store:
        again = await store.open_run("a", None)
        assert (again.graph, again.sequence_id, again.lease.epoch) == ("graph", 0, 2)
        assert await store.load(again.lease) == History(b"initial", [])
        other = await store.open_run("a", "partition")
        assert other.graph is None


async def test_steps_come_back_in_order(open_store: Open) -> None:
    steps = [Step(0, "x", b"d0"), Step(1, "y", b"d1", b"base"), Step(2, "x", b"d2")]
    async with open_store() as store:
        lease = (await store.open_run("a", None)).lease
        await store.begin(lease, "g", b"i", fresh=True)
        for step in steps:
            await store.commit(lease, step)
        assert await store.load(lease) == History(b"i", steps)
        await store.begin(lease, "g2", b"i2", fresh=True)
        assert await store.load(lease) == History(b"i2", [])


@pytest.mark.parametrize("sequence_id", [0, 2])
async def test_a_step_that_is_not_the_next_one_is_a_conflict(open_store: Open, sequence_id: int) -> None:
    async with open_store() as store:
        lease = (await store.open_run("a", None)).lease
        await store.begin(lease, "g", b"i", fresh=True)
        await store.commit(lease, Step(0, "x", b"d"))
        with pytest.raises(RunConflictError, match=f"step {sequence_id}, but 1 are committed"):
            await store.commit(lease, Step(sequence_id, "x", b"d"))
        assert len((await store.load(lease)).steps) == 1


async def test_the_ledger_gives_back_occurrences_and_a_commit_forgets_them(open_store: Open) -> None:
    async with open_store() as store:
        lease = (await store.open_run("a", None)).lease
        await store.begin(lease, "g", b"i", fresh=True)
        async with anyio.create_task_group() as group:
            for occurrence in (1, 0, 3):
                group.start_soon(store.record, lease, b"p", b"c", occurrence, b"d%d" % occurrence, b"k%d" % occurrence)
            group.start_soon(store.record, lease, b"p", b"other", 0, b"", b"k")
        assert await store.recall(lease, b"p", b"c") == [(0, b"d0"), (1, b"d1"), (3, b"d3")]
        assert await store.recall(lease, b"q", b"c") == []
        await store.commit(lease, Step(0, "x", b"d"))
        assert await store.recall(lease, b"p", b"c") == []


async def test_recording_a_subtask_forgets_what_was_recorded_below_it(open_store: Open) -> None:
    async with open_store() as store:
        lease = (await store.open_run("a", None)).lease
        await store.begin(lease, "g", b"i", fresh=True)
        await store.record(lease, b"inner", b"c", 0, b"d", b"leaf")
        await store.record(lease, b"root", b"c", 0, b"d", b"inner")
        assert await store.recall(lease, b"inner", b"c") == []
        assert await store.recall(lease, b"root", b"c") == [(0, b"d")]


async def test_an_application_that_somebody_runs_is_refused(open_store: Open) -> None:
    async with open_store() as store:
        first = await store.open_run("a", None)
        with pytest.raises(RunConflictError, match="being run already"):
            await store.open_run("a", None)
        await store.open_run("b", None)
        await store.close_run(first.lease)
        assert (await store.open_run("a", None)).lease.epoch == 2


async def test_a_lease_that_nobody_holds_any_more_is_taken_over_and_its_writer_fenced_off(open_store: Open) -> None:
    async with open_store() as store:
        opened = await store.open_run("a", None)
        await store.begin(opened.lease, "g", b"i", fresh=True)
        stale = opened.lease.__copy__()
        del opened
        gc.collect()
        lease = (await store.open_run("a", None)).lease
        for write in (
            lambda: store.commit(stale, Step(0, "x", b"d")),
            lambda: store.record(stale, b"p", b"c", 0, b"d", b"k"),
            lambda: store.begin(stale, "g", b"i", fresh=True),
        ):
            with pytest.raises(RunConflictError, match="this run has epoch 1, and epoch 2 has begun since"):
                await write()
        await store.close_run(stale)  # not ours any more
        await store.commit(lease, Step(0, "x", b"d"))


async def test_a_cancelled_request_leaves_the_store_usable(open_store: Open) -> None:
    async with open_store() as store:
        for _ in range(20):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await store.open_run("a", None)
        lease = (await store.open_run("a", None)).lease
        await store.begin(lease, "g", b"i", fresh=True)
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(store.record, lease, b"p", b"c", number, b"d", b"k%d" % number)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        await store.commit(lease, Step(0, "x", b"d"))


# -- SQLiteStore alone ------------------------------------------------------------------------------------------


async def test_a_store_is_in_wal_mode_and_closes_its_thread_and_its_files(tmp_path: Path) -> None:
    async with SQLiteStore(tmp_path / "s.db") as store:
        await store.open_run("a", None)
        assert (tmp_path / "s.db-wal").exists()
        assert [thread.name for thread in threading.enumerate()].count("arun s.db") == 1
    assert os.listdir(tmp_path) == ["s.db"]
    await store.aclose()
    with pytest.raises(StoreError, match="is closed"):
        await store.open_run("a", None)
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("arun s.db") for name in names)


async def test_a_store_that_is_dropped_closes_itself(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.db")
    await store.open_run("a", None)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "arun s.db"]
    del store
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert os.listdir(tmp_path) == ["s.db"]


@pytest.mark.parametrize(("layout", "age"), [(99, "a newer"), (0, "an older")])
async def test_a_file_of_another_layout_is_refused(tmp_path: Path, layout: int, age: str) -> None:
    async with SQLiteStore(tmp_path / "s.db") as store:
        await store.open_run("a", None)
    with sqlite3.connect(tmp_path / "s.db") as db:
        db.execute(f"PRAGMA user_version = {layout}")
    db.close()
    async with SQLiteStore(tmp_path / "s.db") as store:
        with pytest.raises(StoreError, match=f"written by {age} arun .layout {layout}, this one knows 1"):
            await store.open_run("a", None)


async def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    (tmp_path / "text.db").write_bytes(b"just some text, and more than a hundred bytes of it" * 40)
    refused = {"other.db": "none of arun's", "text.db": "not a database", "no/s.db": "no folder .*/no; make it first"}
    for name, message in refused.items():
        async with SQLiteStore(tmp_path / name) as store:
            with pytest.raises(StoreError, match=message):
                await store.open_run("a", None)
    assert (tmp_path / "text.db").read_bytes().startswith(b"just some text")


def test_a_store_in_memory_is_another_one() -> None:
    with pytest.raises(ValueError, match=r"MemoryStore\(\) keeps them in memory"):
        SQLiteStore(":memory:")


async def test_two_stores_on_one_file_see_each_other(tmp_path: Path) -> None:
    async with SQLiteStore(tmp_path / "s.db") as one, SQLiteStore(tmp_path / "s.db", synchronous="full") as two:
        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon((one, two)[number % 2].open_run, f"app {number}", None)
        await one.open_run("a", None)


def test_a_process_that_is_alive_keeps_its_lease_and_a_killed_one_loses_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, sys\nfrom arun import SQLiteStore\n"
            "async def main():\n    opened = await store.open_run('a', None)\n    print('held', flush=True)\n"
            "    await asyncio.sleep(60)\n    print(opened)\n"
            "store = SQLiteStore(sys.argv[1])\nasyncio.run(main())\n",
            str(tmp_path / "s.db"),
        ],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )

    async def open_run() -> int:
        async with SQLiteStore(tmp_path / "s.db") as store:
            return (await store.open_run("a", None)).lease.epoch

    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunConflictError, match=f"by process {holder.pid}"):
            anyio.run(open_run)
        holder.kill()
    assert anyio.run(open_run) == 2
