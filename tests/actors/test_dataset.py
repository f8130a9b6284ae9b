"""Datasets on Ray Data: the same rows as here, and what can't be had there is refused by name."""

from __future__ import annotations

import math
import tomllib
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.dataset import RayEngine
from arun.data import Dataset, RunOptions, from_iterable, from_rows, read_parquet
from arun.data.backends import backend_of
from arun.data.running import plan_of
from arun.errors import MisuseError
from arun.executors import ProcessExecutor

RAY = RayEngine()
on_ray = [pytest.mark.ray, pytest.mark.timeout(280)]

ROWS = [
    {"id": n, "k": None if n % 5 == 0 else n % 3, "x": [1.5, None, math.nan, -2.0][n % 4], "s": f"row {n}"}
    for n in range(40)
]


def shout(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "s": row["s"].upper()}


async def later(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "id": row["id"] + 1000}


def twice(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row, {**row, "id": -row["id"]}]


def odd(row: dict[str, Any]) -> bool:
    return bool(row["id"] % 2)


def same(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch


def key(row: dict[str, Any]) -> str:
    return repr(row)


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    return table.to_pylist()


async def on_ray_data(dataset: Dataset) -> pa.Table:
    options = RunOptions()
    (table,) = await RAY.collect(plan_of([dataset.node], options), options)
    return table


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=10)
    return str(folder / "rows.parquet")


ONE_TO_ONE: list[Any] = [
    lambda d: d.map(shout),
    lambda d: d.map(later, concurrency=4),
    lambda d: d.flat_map(twice),
    lambda d: d.filter(odd),
    lambda d: d.filter(pc.field("id") > 3),
    lambda d: d.map_batches(same, batch_size=7),
    lambda d: d.with_column("y", pc.field("id") * 2),
    lambda d: d.limit(17),
]
ALL_TO_ALL: list[Any] = [
    lambda d: d.sort("x", "id", descending=[True, False]),
    lambda d: d.sort("k", "id", nulls="first"),
    lambda d: d.distinct(),
    lambda d: d.random_shuffle(seed=1),
    lambda d: d.repartition(3),
    lambda d: d.union(d.map(shout)),
    lambda d: d.join(d.select("id", "s"), "id", "left"),
]


@pytest.mark.ray
@pytest.mark.timeout(280)
@given(st.lists(st.sampled_from(ONE_TO_ONE), max_size=3), st.sampled_from(ALL_TO_ALL))
@settings(max_examples=5, suppress_health_check=list(HealthCheck))
def test_random_plans_give_the_same_rows_on_ray(ray_session: None, path: str, steps: list[Any], last: Any) -> None:
    import asyncio

    dataset = read_parquet(path)
    for step in steps:
        dataset = step(dataset)
    dataset = last(dataset)

    async def both() -> tuple[pa.Table, pa.Table]:
        return await dataset.collect(), await on_ray_data(dataset)

    here, there = map(rows_of, asyncio.run(both()))
    if "sort" in dataset.node.label:
        assert list(map(key, there)) == list(map(key, here))
    else:
        assert sorted(map(key, there)) == sorted(map(key, here))


@pytest.mark.ray
@pytest.mark.timeout(280)
@pytest.mark.asyncio
async def test_groups_are_the_same_on_ray(ray_session: None, path: str) -> None:
    wanted = {"rows": "count", "total": ("sum", "id"), "least": ("min", "s"), "q": ("quantile", "id", 0.5)}
    for keys in (("k",), ("x", "k"), ()):
        dataset = read_parquet(path).group_by(*keys).aggregate(**wanted)
        here, there = await dataset.collect(), await on_ray_data(dataset)
        assert sorted(map(key, rows_of(there))) == sorted(map(key, rows_of(here)))
    nobody = read_parquet(path).filter(pc.field("id") < 0)
    assert rows_of(await on_ray_data(nobody.group_by().aggregate(rows="count"))) == [{"rows": 0}]
    for nothing in (nobody.group_by("k").aggregate(rows="count"), nobody.sort("id"), nobody.distinct()):
        assert rows_of(await on_ray_data(nothing)) == []
    left = read_parquet(path).select("id").join(nobody.select("id"), "id", "left")
    assert len(await on_ray_data(left)) == len(ROWS)


@pytest.mark.ray
@pytest.mark.timeout(280)
@pytest.mark.asyncio
async def test_joins_are_the_same_on_ray(ray_session: None, path: str) -> None:
    other = from_rows([{"k": n % 4, "j": None if n == 3 else n, "s": f"other {n}"} for n in range(6)])
    for how in ("right", "outer", "anti"):  # each is a shuffle of Ray's, which takes seconds
        dataset = read_parquet(path).join(other, {"k": "j"}, how)  # type: ignore[arg-type]  # one of its values
        here, there = await dataset.collect(), await on_ray_data(dataset)
        assert sorted(map(key, rows_of(there))) == sorted(map(key, rows_of(here))), how


@pytest.mark.ray
@pytest.mark.timeout(280)
@pytest.mark.asyncio
async def test_what_is_written_on_ray_is_read_here(ray_session: None, path: str, tmp_path: Path) -> None:
    report = await read_parquet(path).map(shout).write_parquet(tmp_path / "many").arun(engine=RAY)
    assert report.rows == len(ROWS)
    written = await read_parquet(tmp_path / "many").collect()
    assert rows_of(written.sort_by("id"))[7]["s"] == "ROW 7"
    assert {part.path for part in report.parts} == {str(p) for p in (tmp_path / "many").glob("*.parquet")}
    one = await read_parquet(path).sort("id", descending=True).write_jsonl(tmp_path / "one.jsonl").arun(engine=RAY)
    assert len(one.parts) == 1
    assert (tmp_path / "one.jsonl").read_text().startswith('{"id":39,')


@pytest.mark.ray
@pytest.mark.timeout(280)
@pytest.mark.asyncio
async def test_an_error_of_a_function_reaches_the_program(ray_session: None, path: str) -> None:
    def fail(row: dict[str, Any]) -> dict[str, Any]:
        raise ValueError(f"no {row['id']}")

    with pytest.raises(ValueError, match="no 0"):
        await read_parquet(path).map(fail).arun(engine=RAY)


async def endless() -> AsyncIterator[dict[str, int]]:
    while True:
        yield {"id": 1}


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        (
            lambda: from_iterable(endless),
            "iterate over endless can't run with engine='ray': endless is of this process",
        ),
        (lambda: from_rows(ROWS).cache(), "cache of read rows is of this process"),
        (lambda: from_rows(ROWS).zip(from_rows(ROWS)), "keeps no order to zip by"),
        (lambda: from_rows(ROWS).map(shout, executor=ProcessExecutor(1)), "leave executor= out"),
        (lambda: from_rows(ROWS).distinct("k"), r"distinct\(k\) can't run .* depends on their order"),
        (lambda: from_rows(ROWS).group_by("k").aggregate(all=("list", "id")), "'all' depends on the order"),
        (lambda: from_rows(ROWS).join(from_rows(ROWS), how="cross"), "no cross join"),
    ],
)
@pytest.mark.asyncio
async def test_what_ray_can_not_do_is_refused_before_anything_runs(dataset: Any, why: str) -> None:
    with pytest.raises(MisuseError, match=why):
        await dataset().arun(engine=RAY)
    told = dataset().explain(engine=RAY)
    assert why.rpartition("' ")[2].rpartition(": ")[2].split(" .* ")[-1].replace("\\", "") in told


def test_explain_shows_what_ray_would_run() -> None:
    told = from_rows(ROWS).map(shout).limit(3).sort("id").explain(engine=RAY)
    assert told.splitlines()[0] == "read rows -> read_datasource"
    assert told.splitlines()[-1] == "sort(id) -> map_batches + sort"


def test_engines_are_found_by_name() -> None:
    assert backend_of("local") is None
    assert backend_of(RAY) is RAY
    with pytest.raises(MisuseError, match="no engine 'spark'; there are local"):
        backend_of("spark")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["arun.data.backends"]["ray"].partition(":")
    assert getattr(import_module(module), name) is RayEngine
