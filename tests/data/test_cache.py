"""Caches: computed once, shared while they fill, forgotten when that fails, freed with the last dataset."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pyarrow as pa
import pytest

from arun.data import from_iterable
from arun.data.cache import Cache

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]


class Source:
    """Ten blocks, counted as they are made."""

    def __init__(self, *, fails: bool = False) -> None:
        self.given = 0
        self.fails = fails

    async def __call__(self) -> AsyncIterator[pa.RecordBatch]:
        for number in range(10):
            if self.fails and number == 5:
                raise ValueError("the source failed")
            self.given += 1
            yield pa.record_batch({"n": [number]})


def cache(source: Any, memory: int = 2**20) -> Cache:
    return Cache(from_iterable(source).astream, memory=memory, folder=None, name="source")


async def numbers(cached: Cache) -> list[int]:
    return [n async for block in cached() for n in block.column(0).to_pylist()]


@pytest.mark.parametrize("memory", [0, 30, 2**20])
async def test_it_is_computed_once(memory: int) -> None:
    source = Source()
    cached = cache(source, memory)
    assert not cached.whole
    for _ in range(3):
        assert await numbers(cached) == list(range(10))
        assert cached.whole
    assert source.given == 10


async def test_runs_at_the_same_time_share_what_is_computed() -> None:
    source = Source()
    cached = cache(source)
    got: list[list[int]] = []

    async def run() -> None:
        got.append(await numbers(cached))

    early = cached()
    assert len(await anext(early)) == 1
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(run)
    assert got == [list(range(10))] * 3
    assert [block.column(0)[0].as_py() async for block in early] == list(range(1, 10))
    assert source.given == 10


async def test_an_interrupted_filling_is_forgotten() -> None:
    source = Source()
    cached = cache(source, 0)
    files = len(os.listdir("/proc/self/fd"))
    iteration = cached()
    await anext(iteration)
    await iteration.aclose()
    assert len(os.listdir("/proc/self/fd")) <= files  # what earlier tests have left may go meanwhile
    source.given = 0
    assert await numbers(cached) == list(range(10))
    assert source.given == 10


async def test_a_reader_that_leaves_does_not_end_the_filling_of_the_others() -> None:
    source = Source()
    cached = cache(source)
    one, other = cached(), cached()
    await anext(one)
    await anext(other)
    await one.aclose()
    assert len([block async for block in other]) == 9
    assert source.given == 10


async def test_a_filling_that_fails_is_not_kept() -> None:
    source = Source(fails=True)
    cached = cache(source)
    with pytest.raises(ValueError, match="the source failed"):
        await numbers(cached)
    source.fails = False
    assert await numbers(cached) == list(range(10))


async def test_it_goes_with_the_last_that_refers_to_it() -> None:
    cached = cache(Source(), 0)
    gc.collect()  # what other tests have left open
    files = len(os.listdir("/proc/self/fd"))
    await numbers(cached)
    assert len(os.listdir("/proc/self/fd")) == files + 1
    del cached
    while len(os.listdir("/proc/self/fd")) > files:  # the thread that has read last is about to let go of it, too
        gc.collect()
        await anyio.lowlevel.checkpoint()
