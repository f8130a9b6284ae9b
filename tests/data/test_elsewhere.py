"""Plain functions of a dataset in an executor."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from arun import MisuseError, ProcessExecutor, Runtime, ThreadExecutor
from arun.data import Dataset, from_rows

sys.path.insert(0, str(Path(__file__).parent))  # worker processes are told

from dataset_functions import batch_pid, fifth_fails, odd, with_pid

pytestmark = [pytest.mark.anyio]
Row = dict[str, Any]


@pytest.fixture(scope="module", params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
async def processes(anyio_backend: str) -> AsyncIterator[ProcessExecutor]:
    async with Runtime(), ProcessExecutor(2) as executor:
        yield executor


def numbers(n: int) -> Dataset:
    return from_rows([{"n": i} for i in range(n)])


async def test_rows_are_computed_in_other_processes_and_come_in_order(processes: ProcessExecutor) -> None:
    dataset = numbers(40).map(with_pid, executor=processes).filter(odd, executor=processes)
    table = await dataset.collect()
    assert table["n"].to_pylist() == list(range(1, 40, 2))
    assert os.getpid() not in table["pid"].to_pylist()
    assert [(step.rows_in, step.rows_out) for step in dataset.stats().stages[0].steps] == [(40, 40), (40, 20)]


async def test_batches_are_computed_in_other_processes(processes: ProcessExecutor) -> None:
    table = await numbers(40).map_batches(batch_pid, batch_size=10, concurrency=2, executor=processes).collect()
    assert table["n"].to_pylist() == list(range(40))
    assert os.getpid() not in table["pid"].to_pylist()


async def test_an_error_there_names_step_and_row(processes: ProcessExecutor) -> None:
    with pytest.raises(ValueError, match="five") as caught:
        await numbers(8).map(fifth_fails, executor=processes).collect()
    assert any("in map(fifth_fails), row 5 of what it was given" in note for note in caught.value.__notes__)
    skipping = numbers(8).map(fifth_fails, executor=processes, on_error="skip")
    assert await skipping.count() == 7
    assert skipping.stats().stages[0].steps[0].failed == 1


async def test_what_can_not_cross_is_refused_by_name(processes: ProcessExecutor) -> None:
    with pytest.raises(MisuseError, match=r"map\(<lambda>\).*can't import it"):
        await numbers(1).map(lambda row: row, executor=processes).collect()


async def test_threads_are_an_executor_too() -> None:
    dataset = numbers(100).map(lambda row: row, executor=ThreadExecutor(2), schema=pa.schema([("n", pa.int32())]))
    table = await dataset.collect()
    assert table.schema == pa.schema([("n", pa.int32())])
    assert table["n"].to_pylist() == list(range(100))


async def test_an_async_function_is_refused_there(processes: ProcessExecutor) -> None:
    async def later(row: Row) -> Row:
        return row

    with pytest.raises(MisuseError, match="runs plain functions elsewhere"):
        numbers(1).map(later, executor=processes)


async def test_a_killed_job_goes_on_with_steps_in_processes(processes: ProcessExecutor, tmp_path: Path) -> None:
    await numbers(50).write_parquet(tmp_path / "in.parquet").arun()
    from arun.data import read_jsonl, read_parquet

    job = read_parquet(tmp_path / "in.parquet").filter(odd, executor=processes).write_jsonl(tmp_path / "out.jsonl")
    report = await job.arun(checkpoint=tmp_path / "job")
    assert report.rows == 25
    assert (await read_jsonl(tmp_path / "out.jsonl").collect())["n"].to_pylist() == list(range(1, 50, 2))
