"""Datasets beside Ray Data, which does the same on the same files, and beside the loops over pyarrow and DuckDB below.

Ray Data is measured twice at most: some of its runs take a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from arun.data import RunOptions, from_rows, read_parquet, run
from arun.data.rules import fuse_chains, without

from .harness import Check, Contestant, Options, Row, medians
from .memory import resident, start_of_peak

__all__ = ("ROWS",)

_LIMIT = 500 * 10**6
_GROUP_BYTES = 32 << 20


# Functions that everybody runs.


def identity(batch: Any) -> Any:
    return batch


def render(row: dict[str, Any]) -> dict[str, Any]:
    row["text"] = f"{row['id']}: {row['name']}"
    return row


def add(row: dict[str, Any]) -> dict[str, Any]:
    row["value"] += 1.0
    return row


def batches(options: Options) -> Row:
    """Two identities over batches, and how many rows came."""
    n = options.n(1_000_000)
    path = _rows(n)

    async def ours() -> float:
        start = time.perf_counter()
        both = read_parquet(path).map_batches(identity).map_batches(identity)
        assert (await both.arun()).rows == n
        return (time.perf_counter() - start) / n

    async def floor() -> float:
        start, rows = time.perf_counter(), 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1 << 14):
                rows += len(identity(identity(batch)))
        assert rows == n
        return (time.perf_counter() - start) / n

    def peer() -> float:
        start = time.perf_counter()
        both = _ray_data().read_parquet(path).map_batches(identity, batch_format="pyarrow")
        # Its count() may know the answer from the file; so the rows are asked for.
        rows = sum(map(len, both.map_batches(identity, batch_format="pyarrow").iter_batches(batch_format="pyarrow")))
        assert rows == n
        return (time.perf_counter() - start) / n

    took = medians({"arun": ours, "floor": floor}, options)
    took["ray"] = _ray(peer)
    return Row(
        "map_batches x 2, count, a row (floor: pyarrow; peer: Ray Data)",
        "us",
        took["arun"],
        took["floor"],
        took["ray"],
        [
            Check("5 times Ray Data's rate", took["ray"] / took["arun"], 5, at_least=True),
            Check("0.8 of a pyarrow loop's", took.ratio("floor", "arun"), 0.8, at_least=True),
        ],
    )


def rows(options: Options) -> Row:
    """A small function of every row."""
    n = options.n(1_000_000)
    path = _rows(n)

    async def ours() -> float:
        start = time.perf_counter()
        assert (await read_parquet(path).map(render).arun()).rows == n
        return (time.perf_counter() - start) / n

    async def floor() -> float:
        start, count = time.perf_counter(), 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(8192):
                count += len(pa.RecordBatch.from_pylist([render(row) for row in batch.to_pylist()]))
        assert count == n
        return (time.perf_counter() - start) / n

    def peer() -> float:
        start = time.perf_counter()
        mapped = _ray_data().read_parquet(path).map(render)
        assert sum(map(len, mapped.iter_batches(batch_format="pyarrow"))) == n
        return (time.perf_counter() - start) / n

    took = medians({"arun": ours, "floor": floor}, options)
    took["ray"] = _ray(peer)
    return Row(
        "map of a small function, a row (floor: a loop over rows of the same batches; peer: Ray Data)",
        "us",
        took["arun"],
        took["floor"],
        took["ray"],
        [
            Check("3 times Ray Data's rate", took["ray"] / took["arun"], 3, at_least=True),
            Check("0.8 of the loop's", took.ratio("floor", "arun"), 0.8, at_least=True),
        ],
    )


def one_row(options: Options) -> Row:
    """A pipeline of one row, warm."""
    dataset = from_rows([{"id": 1, "name": "one"}]).map(render)

    async def ours() -> float:
        await dataset.take(1)
        start = time.perf_counter()
        assert await dataset.take(1) == [{"id": 1, "name": "one", "text": "1: one"}]
        return time.perf_counter() - start

    def peer() -> float:
        start = time.perf_counter()
        assert len(_ray_data().from_items([{"id": 1, "name": "one"}]).map(render).take(1)) == 1
        return time.perf_counter() - start

    took = medians({"arun": ours}, options, times=5)
    took["ray"] = _ray(peer, times=3)
    checks = [Check("50 times faster than Ray Data", took["ray"] / took["arun"], 50, at_least=True)]
    return Row("a warm pipeline of one row (peer: Ray Data)", "ms", took["arun"], None, took["ray"], checks)


def fusion(options: Options) -> Row:
    """Five functions of rows, as one stage and as five."""
    n = options.n(200_000)
    path = _rows(n)

    def contestant(settings: RunOptions) -> Contestant:
        async def contestant() -> float:
            start = time.perf_counter()
            dataset = read_parquet(path)
            for _ in range(5):
                dataset = dataset.map(add)
            assert (await dataset.arun(settings)).rows == n
            return (time.perf_counter() - start) / n

        return contestant

    apart = RunOptions(rules=without(fuse_chains))
    took = medians({"fused": contestant(RunOptions()), "apart": contestant(apart)}, options)
    checks = [Check("1.5 times as fast fused", took.ratio("apart", "fused"), 1.5, at_least=True)]
    return Row("5 maps fused, a row (floor: not fused)", "us", took["fused"], took["apart"], None, checks)


def streaming(options: Options) -> Row:
    """Peak memory of map, filter and write."""
    small, large = (_child("stream", str(_wide(options.n(size)))) for size in (500_000, 2_000_000))
    return Row(
        f"peak memory, {options.n(2_000_000) / 1e6:g} GB through map, filter, write (floor: a quarter of it)",
        "MB",
        large["peak"],
        small["peak"],
        None,
        [
            Check("< 300 MB", large["peak"] / 1e6, 300, "MB"),
            Check("flat: at most 1.2 times a quarter's", large["peak"] / small["peak"], 1.2),
        ],
    )


def sort(options: Options) -> list[Row]:
    """Sort, with 500 MB."""
    return _all_to_all(
        options,
        "sort",
        lambda dataset: dataset.sort("id"),
        lambda dataset: dataset.sort("id"),
    )


def group_by(options: Options) -> list[Row]:
    """Group-by, with 500 MB."""
    return _all_to_all(
        options,
        "group-by",
        lambda dataset: dataset.group_by("key").aggregate(rows="count", total=("sum", "value")),
        _ray_group_by,
    )


def straggler(options: Options) -> Row:
    """Rows that wait for one that takes a second."""
    n = options.n(1000)

    async def work(row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(1.0 if row["id"] == 0 else 0.005)
        return row

    async def ours() -> float:
        dataset = from_rows([{"id": number} for number in range(n)]).map(work, concurrency=32, ordered=False)
        order = [row["id"] async for row in dataset.rows()]
        assert sorted(order) == list(range(n))
        return float(n - 1 - order.index(0))

    took = medians({"arun": ours}, options)
    checks = [Check("none", took["arun"], 0, "rows")]
    return Row(f"rows after a straggler of 1 s among {n:,} of 5 ms", "", took["arun"], None, None, checks)


ROWS: dict[str, Callable[[Options], Row | list[Row]]] = {
    "data_batches": batches,
    "data_rows": rows,
    "data_one_row": one_row,
    "data_fusion": fusion,
    "data_memory": streaming,
    "data_sort": sort,
    "data_group_by": group_by,
    "data_straggler": straggler,
}


def _all_to_all(options: Options, what: str, ours: Callable[[Any], Any], peer: Callable[[Any], Any]) -> list[Row]:
    n = options.n(10_000_000)
    path = _rows(n)

    async def arun_() -> float:
        return await _consume(ours(read_parquet(path))) / n

    async def duckdb_() -> float:
        return _duckdb(_SQL[what].format(path=path)) / n

    def ray_() -> float:
        start = time.perf_counter()
        for _ in peer(_ray_data().read_parquet(path)).iter_batches(batch_format="pyarrow"):
            pass
        return (time.perf_counter() - start) / n

    took = medians({"arun": arun_, "duckdb": duckdb_}, options)
    took["ray"] = _ray(ray_, warm=False)  # up to minutes, of which its start is nothing
    child = _child(what, path)
    return [
        Row(
            f"{what} of {n:,} rows, memory_limit 500 MB, a row (floor: DuckDB; peer: Ray Data)",
            "us",
            took["arun"],
            took["duckdb"],
            took["ray"],
            [
                Check("0.8 of DuckDB's rate", took.ratio("duckdb", "arun"), 0.8, at_least=True),
                Check("faster than Ray Data", took["ray"] / took["arun"], 1, at_least=True),
            ],
        ),
        Row(
            "its resident memory above the imports' (floor: DuckDB's)",
            "MB",
            child["peak"],
            _child(f"duckdb {what}", path)["peak"],
            None,
            [Check("reported: times its limit", child["peak"] / _LIMIT, 2)],
        ),
    ]


_SQL = {
    "sort": "SELECT * FROM read_parquet('{path}') ORDER BY id",
    "group-by": "SELECT key, count(*), sum(value) FROM read_parquet('{path}') GROUP BY key",
}


async def _consume(dataset: Any) -> float:
    start = time.perf_counter()
    async for _ in dataset.astream(RunOptions(memory_limit=_LIMIT)):
        pass
    return time.perf_counter() - start


def _duckdb(sql: str) -> float:
    import duckdb

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        config = {"memory_limit": f"{_LIMIT}B", "temp_directory": folder}
        with duckdb.connect(config=config) as connection:
            for _ in connection.sql(sql).to_arrow_reader(32_768):
                pass
        return time.perf_counter() - start


def _ray_group_by(dataset: Any) -> Any:
    from ray.data.aggregate import Count, Sum

    return dataset.groupby("key").aggregate(Count(), Sum("value"))


# Ray Data.


def _ray(measure: Callable[[], float], *, times: int = 1, warm: bool = True) -> float:
    """The best of a few, once warm: what it takes is so far from ours that more would only take longer."""
    with _ray_runs():
        if warm:
            measure()
        return min(measure() for _ in range(times))


@cache
def _ray_session() -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


@contextlib.contextmanager
def _ray_runs() -> Iterator[None]:
    _ray_session()
    _ray_data().DataContext.get_current().enable_progress_bars = False
    yield


def _ray_data() -> Any:
    import ray.data

    return ray.data


# Files, made once and gone with this process.


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="arun-bench-")


@cache
def _rows(n: int) -> str:
    """A Parquet file of ``n`` rows in row groups of 100,000."""
    path = f"{_folder().name}/rows-{n}.parquet"
    draw = random.Random(0)
    schema = pa.schema({"id": pa.int64(), "key": pa.int64(), "value": pa.float64(), "name": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, n, 100_000):
            size = min(100_000, n - start)
            columns = {
                "id": [draw.getrandbits(60) for _ in range(size)],
                "key": [draw.randrange(100_000) for _ in range(size)],
                "value": [draw.random() for _ in range(size)],
                "name": [f"n{start + number}" for number in range(size)],
            }
            writer.write_table(pa.table(columns, schema=schema))
    return path


@cache
def _wide(n: int) -> str:
    """A Parquet file of ``n`` rows of a kilobyte that don't compress, in row groups of 32 MiB."""
    path = f"{_folder().name}/wide-{n}.parquet"
    draw = random.Random(0)
    schema = pa.schema({"id": pa.int64(), "data": pa.binary()})
    size = _GROUP_BYTES // 1000
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, n, size):
            ids = range(start, min(start + size, n))
            writer.write_table(pa.table({"id": ids, "data": [draw.randbytes(1000) for _ in ids]}, schema=schema))
    return path


# In a process of its own: peak memory above what it had with everything imported.


def _child(what: str, path: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.data", what, path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    told: dict[str, float] = json.loads(done.stdout)
    return told


def _main(what: str, path: str) -> None:
    asyncio.run(from_rows([{"id": 1}]).map(render_id).sort("id").collect())  # what is imported late
    gc.collect()
    before = start_of_peak()
    if what == "stream":
        _stream(path)
    elif what.startswith("duckdb "):
        _duckdb(_SQL[what.removeprefix("duckdb ")].format(path=path))
    else:
        dataset = read_parquet(path)
        grouped = dataset.group_by("key").aggregate(rows="count", total=("sum", "value"))
        asyncio.run(_consume(dataset.sort("id") if what == "sort" else grouped))
    print(json.dumps({"peak": resident("VmHWM") - before}))


def render_id(row: dict[str, Any]) -> dict[str, Any]:
    row["text"] = f"row {row['id']}"
    return row


def _stream(path: str) -> None:
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        kept = read_parquet(path).map(render_id).filter(lambda row: row["id"] % 2 == 0)
        (report,) = asyncio.run(run(kept.write_parquet(f"{folder}/out", compression="none")))
        assert report.rows > 0


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
