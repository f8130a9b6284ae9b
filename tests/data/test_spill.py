"""Blocks that wait: the order, the memory, and what is let go when."""

from __future__ import annotations

import os
from typing import Any

import anyio
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arun.data.spill import SpillFile, SpillingQueue
from arun.errors import MisuseError

pytestmark = pytest.mark.anyio


def block(number: int, rows: int = 4) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.array([number] * rows, pa.int64())})


def number(got: pa.RecordBatch) -> int:
    return int(got.column(0)[0].as_py())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_file_gives_back_any_block_of_any_schema() -> None:
    file = SpillFile()
    blocks = [
        block(1),
        pa.record_batch({"y": pa.array(["a", "b", "a"]).dictionary_encode()}),
        block(2).slice(1, 2),
        pa.record_batch({"z": pa.array([[{"k": 1.5}], None])}),
    ]
    places = [file.append(one) for one in blocks]
    for place, one in reversed(list(zip(places, blocks, strict=True))):
        assert file.read(place).equals(one)
    file.close()


STEPS = st.lists(
    st.one_of(
        st.just(("put",)),
        st.tuples(st.just("read"), st.integers(0, 2)),
        st.tuples(st.just("leave"), st.integers(0, 2)),
        st.just(("join",)),
        st.just(("end",)),
    ),
    max_size=30,
)


@given(STEPS, st.integers(0, 5), st.booleans())
@settings(max_examples=60)
def test_every_reader_sees_every_block_once_and_in_order(steps: list[Any], in_memory: int, keep: bool) -> None:
    async def run() -> None:
        files = open_files()
        queue = SpillingQueue(memory=in_memory * block(0).nbytes, keep=keep)
        readers = [queue.reader()]
        # What each of them has read, and is to have read at the end; by number.
        places: list[int | None] = [0]
        put, ended, held_from = 0, False, 0
        for step in steps:
            if step[0] == "put" and not ended:
                await queue.put(block(put))
                put += bool(keep or any(place is not None for place in places))
            elif step[0] == "join":
                readers.append(queue.reader())
                places.append(0 if keep else held_from)
            elif step[0] == "end":
                queue.end()
                ended = True
            elif step[0] in {"read", "leave"} and step[1] < len(readers):
                index, place = step[1], places[step[1]]
                if step[0] == "leave":
                    await readers[index].aclose()
                    places[index] = None
                elif place is not None and place < put:
                    assert number(await anext(readers[index])) == place
                    places[index] = place + 1
                elif place is None or ended:
                    with pytest.raises(StopAsyncIteration):
                        await anext(readers[index])
            reading = [place for place in places if place is not None]
            held_from = 0 if keep else min(reading, default=put)
            if ended and held_from == put:
                assert open_files() == files  # also without a release
            assert queue.statistics().blocks == put - held_from
            assert queue.statistics().memory <= in_memory * block(0).nbytes
        queue.release()
        assert queue.statistics()[:3] == (0, 0, 0)
        assert open_files() == files

    anyio.run(run)


async def test_a_reader_that_waits_gets_the_block_that_comes() -> None:
    queue, got = SpillingQueue(memory=0), []
    reader = queue.reader()

    async def read() -> None:
        got.extend([number(one) async for one in reader])

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        for n in range(3):
            await anyio.wait_all_tasks_blocked()
            await queue.put(block(n))
        queue.end()
    assert got == [0, 1, 2]


async def test_a_cancelled_read_loses_no_block() -> None:
    queue = SpillingQueue(memory=0)
    reader = queue.reader()
    for n in range(2):
        await queue.put(block(n))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anext(reader)
    assert [number(await anext(reader)) for _ in range(2)] == [0, 1]
    queue.release()


async def test_an_error_reaches_a_reader_after_the_blocks_before_it() -> None:
    queue = SpillingQueue(memory=2**20)
    reader = queue.reader()
    await queue.put(block(0))
    queue.end(ValueError("the source failed"))
    assert number(await anext(reader)) == 0
    with pytest.raises(ValueError, match="the source failed"):
        await anext(reader)


async def test_what_nobody_reads_any_more_is_not_kept() -> None:
    queue = SpillingQueue(memory=2**20)
    reader = queue.reader()
    await queue.put(block(0))
    await reader.aclose()
    assert not queue.wanted
    await queue.put(block(1))
    assert queue.statistics().blocks == 0


async def test_disk_is_given_back_while_the_queue_goes_on() -> None:
    queue = SpillingQueue(memory=0)
    reader = queue.reader()
    large = pa.record_batch({"x": pa.array([b"x" * 2**24])})
    peak = 0
    for _ in range(12):
        await queue.put(large)
        await anext(reader)
        peak = max(peak, queue.statistics().disk)
    assert peak < 6 * large.nbytes
    assert queue.statistics().spilled == 12
    queue.release()


async def test_a_queue_that_has_ended_takes_no_more() -> None:
    queue = SpillingQueue(memory=0)
    queue.end()
    with pytest.raises(MisuseError, match="has ended"):
        await queue.put(block(0))
