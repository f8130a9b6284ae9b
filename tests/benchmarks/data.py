"""What datasets cost: against plain loops over the same Arrow batches, and against Ray Data on the same file."""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arun.data import Dataset, from_rows, read_parquet

from .harness import Check, Contestant, Options, Row, medians
from .memory import _resident, _start_of_peak

__all__ = ("ROWS",)

_BATCH = 1 << 16


def batches(options: Options) -> Row:
    """Parquet through two identity functions of batches, counted."""
    rows = options.n(1_000_000)
    path = _file(rows)

    async def arun() -> float:
        return await _timed(read_parquet(path).map_batches(_same).map_batches(_same), rows)

    async def floor() -> float:
        start = perf_counter()
        read = sum(_same(_same(batch)).num_rows for batch in pq.ParquetFile(path).iter_batches(_BATCH))
        assert read == rows
        return perf_counter() - start

    async def ray() -> float:
        dataset = _ray().read_parquet(path)
        for _ in range(2):
            dataset = dataset.map_batches(_same, batch_format="pyarrow", batch_size=None)
        return _counted(dataset, rows)

    cost = medians({"arun": arun, "floor": floor, "ray": ray}, options)
    return Row(
        f"{rows:,} rows of Parquet, map_batches x 2, count (peer: Ray Data)",
        "ms",
        *(cost[name] for name in ("arun", "floor", "ray")),
        [
            Check(">= 5 x Ray Data", cost.ratio("ray", "arun"), 5, at_least=True),
            Check(">= 0.8 of a pyarrow loop", cost.ratio("floor", "arun"), 0.8, at_least=True),
        ],
    )


def rows_(options: Options) -> Row:
    """Parquet through a small Python function of a row."""
    rows = options.n(1_000_000)
    path = _file(rows)

    async def arun() -> float:
        return await _timed(read_parquet(path).map(_scaled), rows)

    async def floor() -> float:
        start = perf_counter()
        read = 0
        for batch in pq.ParquetFile(path).iter_batches(_BATCH):
            read += pa.RecordBatch.from_pylist([_scaled(row) for row in batch.to_pylist()]).num_rows
        assert read == rows
        return perf_counter() - start

    async def ray() -> float:
        return _counted(_ray().read_parquet(path).map(_scaled), rows)

    cost = medians({"arun": arun, "floor": floor, "ray": ray}, options)
    return Row(
        f"{rows:,} rows of Parquet, map of a small function (peer: Ray Data)",
        "ms",
        *(cost[name] for name in ("arun", "floor", "ray")),
        [
            Check(">= 3 x Ray Data", cost.ratio("ray", "arun"), 3, at_least=True),
            Check(">= 0.8 of a loop over the same batches", cost.ratio("floor", "arun"), 0.8, at_least=True),
        ],
    )


def one_row(options: Options) -> Row:
    """One row through one function, warm."""
    dataset = from_rows([{"id": 1, "x": 1.0}]).map(_scaled)

    async def arun() -> float:
        await dataset.collect()
        start = perf_counter()
        for _ in range(20):
            await dataset.collect()
        return (perf_counter() - start) / 20

    async def ray() -> float:
        source = _ray().from_items([{"id": 1, "x": 1.0}])
        start = perf_counter()
        source.map(_scaled).take_all()
        return perf_counter() - start

    cost = medians({"arun": arun, "ray": ray}, options)
    return Row(
        "a pipeline of one row, warm (peer: Ray Data)",
        "ms",
        cost["arun"],
        None,
        cost["ray"],
        [Check(">= 50 x Ray Data", cost.ratio("ray", "arun"), 50, at_least=True)],
    )


def fused(options: Options) -> Row:
    """Five functions of a row, fused and not."""
    rows = options.n(200_000)
    path = _file(rows)

    def chain(*, fuse: bool) -> Contestant:
        async def contestant() -> float:
            dataset = read_parquet(path)
            for _ in range(5):
                dataset = dataset.map(_scaled, fuse=fuse)
            return await _timed(dataset, rows)

        return contestant

    cost = medians({"fused": chain(fuse=True), "unfused": chain(fuse=False)}, options)
    return Row(
        f"{rows:,} rows, map x 5, fused (floor: not fused)",
        "ms",
        cost["fused"],
        cost["unfused"],
        None,
        [Check(">= 1.5 x faster than not fused", cost.ratio("unfused", "fused"), 1.5, at_least=True)],
    )


def straggler(options: Options) -> Row:
    """How many rows wait for a slow one when order is given up."""

    async def work(row: dict[str, Any]) -> dict[str, Any]:
        await anyio.sleep(1.0 if row["id"] == 5 else 0.005)
        return row

    async def arun() -> float:
        late = 0
        slow = False
        dataset = from_rows([{"id": i} for i in range(1000)]).map(work, concurrency=32, ordered=False)
        async for block in dataset:
            ids = block["id"].to_pylist()
            late += len(ids) if slow else 0
            slow = slow or 5 in ids
        return late

    cost = medians({"arun": arun}, options)
    return Row(
        "1,000 rows of 5 ms and one of 1 s, 32 at a time, unordered: rows after the slow one",
        "",
        cost["arun"],
        None,
        None,
        [Check("none", cost["arun"], 0, "")],
    )


def memory(options: Options) -> Row:
    """Peak memory of a stream from Parquet to Parquet."""
    small, large = (_peak(size / options.shrink) for size in (0.5, 2.0))
    return Row(
        f"peak memory, {2 / options.shrink:g} GiB of Parquet, map, filter, write (floor: a quarter of it)",
        "MB",
        large,
        small,
        None,
        [
            Check("< 300 MB", large / 1e6, 300, "MB"),
            Check("flat: at most 30 MB above a quarter of it", (large - small) / 1e6, 30, "MB"),
        ],
    )


ROWS = {
    "data_batches": batches,
    "data_rows": rows_,
    "data_one_row": one_row,
    "data_fused": fused,
    "data_straggler": straggler,
    "data_memory": memory,
}


def _same(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch


def _scaled(row: dict[str, Any]) -> dict[str, Any]:
    row["x"] = row["x"] * 2 + row["id"]
    return row


async def _timed(dataset: Dataset, rows: int) -> float:
    start = perf_counter()
    report = await dataset.arun()
    seconds = perf_counter() - start
    assert report.rows == rows
    return seconds


def _counted(dataset: Any, rows: int) -> float:
    start = perf_counter()
    assert sum(bundle.num_rows() for bundle in dataset.iter_internal_ref_bundles()) == rows
    return perf_counter() - start


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="arun-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _file(rows: int) -> str:
    """A Parquet file of four columns."""
    draw = np.random.default_rng(0)
    table = pa.table({
        "id": np.arange(rows),
        "x": draw.random(rows),
        "lang": pa.array(["en", "de"]).take(pa.array(draw.integers(0, 2, rows))),
        "text": [f"hello world {i}" for i in range(rows)],
    })
    path = str(_folder() / f"{rows}.parquet")
    pq.write_table(table, path, row_group_size=1 << 17)
    return path


def _wide_file(path: Path, gib: float) -> None:
    """A Parquet file with row groups of 32 MiB, of rows of 1 KiB."""
    rows = 1 << 15
    draw = np.random.default_rng(0)
    schema = pa.schema([("id", pa.int64()), ("x", pa.float64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for group in range(max(1, round(gib * 32))):
            ids = np.arange(group * rows, (group + 1) * rows)
            text = [f"{number:08x}" * 124 for number in draw.integers(0, 2**32, rows)]
            table = pa.table({"id": ids, "x": draw.random(rows), "text": text}, schema=schema)
            writer.write_table(table, row_group_size=rows)


@cache
def _ray() -> Any:
    import ray

    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    atexit.register(ray.shutdown)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray.data


def _peak(gib: float) -> float:
    path = _folder() / f"{gib}.parquet"
    if not path.exists():
        _wide_file(path, gib)
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.data", str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def _run(path: str) -> float:
    """Stream a file through a function and a filter into another one: bytes above what was there before."""
    out = Path(path).with_suffix(".out")
    even = read_parquet(path).map(_scaled).filter(lambda row: row["id"] % 2 == 0)
    dataset = even.write_parquet(out, mode="overwrite")
    gc.collect()
    before = _start_of_peak()
    asyncio.run(dataset.arun())
    peak = _resident("VmHWM") - before
    shutil.rmtree(out)
    return peak


if __name__ == "__main__":
    print(_run(sys.argv[1]))
