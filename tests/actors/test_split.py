"""Splits on a cluster: one run in an actor, consumers here and in workers."""

from __future__ import annotations

import asyncio
import gc
import pickle
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from actors.local_cluster import LocalCluster
from actors.ray_cluster import RayCluster
from actors.split import split
from arun.data import Dataset, from_iterable, from_rows
from arun.errors import ArunError, MisuseError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROWS = 60


async def numbers() -> AsyncIterator[dict[str, int]]:
    import pyarrow as pa

    for n in range(0, ROWS, 2):
        yield pa.record_batch({"n": [n, n + 1], "k": [n % 3] * 2})


async def read(dataset: Dataset, into: list[int]) -> None:
    async for row in dataset.rows():
        into.append(row["n"])
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_consumers_share_the_run_of_an_actor() -> None:
    async with LocalCluster() as cluster:
        parts = await split(from_iterable(numbers).filter(lambda row: row["n"] != 7), 3, cluster=cluster)
        for _ in range(2):
            got: list[list[int]] = [[], [], []]
            await asyncio.gather(*map(read, parts, got))
            assert sorted(n for some in got for n in some) == [n for n in range(ROWS) if n != 7]


@pytest.mark.asyncio
async def test_a_consumer_that_leaves_hands_on_what_it_held() -> None:
    async with LocalCluster(isolation="task") as cluster:
        one, other = await split(from_iterable(numbers), 2, cluster=cluster)
        async with one.astream() as blocks:
            held = (await anext(blocks)).column("n").to_pylist()
        got: list[int] = []
        await read(other, got)
        assert held == [0, 1]
        assert sorted(got) == list(range(ROWS))


@pytest.mark.asyncio
async def test_parts_may_be_equal_or_by_key() -> None:
    async with LocalCluster(isolation="task") as cluster:
        for how in ({"equal": True}, {"by": "k"}):
            parts = await split(from_iterable(numbers), 3, cluster=cluster, **how)
            got: list[list[dict[str, Any]]] = [[row async for row in part.rows()] for part in parts]
            assert sorted(row["n"] for rows in got for row in rows) == list(range(ROWS))
            if "equal" in how:
                assert [len(rows) for rows in got] == [ROWS // 3] * 3
            else:
                keys = [row["k"] for rows in got for row in {r["k"]: r for r in rows}.values()]
                assert sorted(keys) == [0, 1, 2]


@pytest.mark.asyncio
async def test_large_blocks_come_in_pieces() -> None:
    rows = [{"n": n, "text": "x" * 2_000_000} for n in range(20)]
    async with LocalCluster() as cluster:
        (part,) = await split(from_rows(rows), 1, cluster=cluster)
        sizes = [(len(block), block.nbytes) async for block in part]
        assert sum(length for length, _ in sizes) == 20
        assert max(size for _, size in sizes) <= 16 * 2**20


@pytest.mark.asyncio
async def test_an_error_of_the_run_reaches_the_consumer() -> None:
    def fail(row: dict[str, Any]) -> dict[str, Any]:
        raise ArunError(f"row {row['n']} is bad")

    async with LocalCluster(isolation="task") as cluster:
        (part,) = await split(from_iterable(numbers).map(fail), 1, cluster=cluster)
        with pytest.raises(ArunError, match="row 0 is bad"):
            await part.collect()


@pytest.mark.asyncio
async def test_a_part_that_nobody_else_could_find_can_not_be_sent() -> None:
    async with LocalCluster(isolation="task") as cluster:
        part, _ = await split(from_iterable(numbers), 2, cluster=cluster)
        with pytest.raises(MisuseError, match="ends with this program"):
            pickle.dumps(part)
        with pytest.raises(MisuseError, match="into at least 1"):
            await split(from_iterable(numbers), 0, cluster=cluster)


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.asyncio
async def test_workers_of_ray_pull_their_parts_and_one_that_dies_hands_on_what_it_held(ray_session: None) -> None:
    import ray

    @ray.remote(num_cpus=0.1, max_retries=0)
    def consume(part: Dataset, dies: bool) -> list[int]:
        import os

        async def run() -> list[int]:
            got: list[int] = []
            async for row in part.rows():
                got.append(row["n"])
                if dies:
                    os._exit(1)
                await asyncio.sleep(0.02)
            return got

        return asyncio.run(run())

    async with RayCluster.connect() as cluster:
        parts = await split(from_iterable(numbers), 3, cluster=cluster, name="shared", linger=5)

        def there() -> bool:
            return "shared" in [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]

        assert there()
        consuming = [consume.remote(part, dies=number == 0) for number, part in enumerate(parts)]
        got = []
        for one in consuming[1:]:
            got += await one
        with pytest.raises(ray.exceptions.RayError):
            await consuming[0]
        assert there()
        del parts
        gc.collect()
        with anyio.fail_after(60):
            while there():  # noqa: ASYNC110 - Ray tells nobody
                await asyncio.sleep(0.2)
    assert Counter(got) == Counter(range(ROWS))  # nothing that the dead one had was done
