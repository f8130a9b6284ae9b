"""Datasets on Ray Data: the same rows as here, and what can't be had there is refused by name."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import signal
import threading
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from actors.actor import actor
from actors.dataset import RayEngine
from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster
from actors.ray_cluster import RayCluster
from arun.data import Dataset, RunOptions, from_iterable, from_ray, from_rows, read_parquet, run
from arun.data.backends import backend_of
from arun.data.running import plan_of
from arun.errors import MisuseError
from arun.executors import ProcessExecutor

RAY = RayEngine()

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


@actor(concurrency=1)
class Adder:
    def __init__(self, by: int, notes: str) -> None:
        self.by = by
        self.notes = Path(notes)

    async def add(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 11:
            with contextlib.suppress(FileExistsError):
                (self.notes / "died").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return {**row, "id": row["id"] + self.by}


def numbers() -> Any:
    return ({"n": n} for n in itertools.count())


def key(row: dict[str, Any]) -> str:
    return repr(row)


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    return table.to_pylist()


async def on_ray_data(*datasets: Dataset) -> list[pa.Table]:
    options = RunOptions()
    return await RAY.collect(plan_of([dataset.node for dataset in datasets], options), options)


async def same_on_ray(dataset: Dataset, *, ordered: bool = True) -> None:
    here = rows_of(await dataset.collect())
    (there,) = map(rows_of, await on_ray_data(dataset))
    if not ordered:
        here, there = sorted(here, key=key), sorted(there, key=key)
    assert list(map(key, there)) == list(map(key, here))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=20)
    return str(folder / "rows.parquet")


# Each of Ray's shuffles takes seconds, so what one run can show is in one run.

IN_ORDER: dict[str, Callable[[Dataset], Dataset]] = {
    "one to one": lambda d: (
        d
        .map(shout)
        .map(later, concurrency=4)
        .flat_map(twice)
        .filter(odd)
        .filter(pc.field("id") > 3)
        .map_batches(same, batch_size=7)
        .with_column("y", pc.field("id") * 2)
        .limit(17)
    ),
    "sort": lambda d: d.sort("x", "id", descending=[True, False]),
    "sort of null": lambda d: d.filter(odd).sort("k", "id", nulls="first"),
    "repartition": lambda d: d.repartition(3),
    "union": lambda d: d.select("id").union(d.map(shout).drop("s"), d.limit(3)),
    "zip": lambda d: d.zip(d.select("id").repartition(3), d.map(shout)),
    "endless": lambda d: from_iterable(numbers).limit(20000).filter(pc.field("n") > 19990),
}
IN_ANY_ORDER: dict[str, Callable[[Dataset], Dataset]] = {
    "distinct": lambda d: d.union(d).select("k", "x").distinct(),
    "distinct by": lambda d: d.sort("s").distinct("k"),
    "shuffle": lambda d: d.random_shuffle(seed=1),
    "cross join": lambda d: d.join(from_rows([{"id": n, "j": n} for n in range(3)]), how="cross"),
    "semi join": lambda d: d.join(from_rows([{"id": n} for n in range(3)]), "id", "semi"),
}
WANTED: Any = {
    "rows": "count",
    "total": ("sum", "id"),
    "least": ("min", "s"),
    "q": ("quantile", "id", 0.5),
    "first": ("first", "s"),
    "last": ("last", "x"),
    "all": ("list", "id"),
}

on_ray = [pytest.mark.ray, pytest.mark.asyncio, pytest.mark.usefixtures("ray_session")]


class TestOnRay:
    pytestmark = on_ray

    @pytest.mark.parametrize("what", IN_ORDER)
    async def test_rows_and_their_order_are_the_same(self, path: str, what: str) -> None:
        await same_on_ray(IN_ORDER[what](read_parquet(path)))

    @pytest.mark.parametrize("what", IN_ANY_ORDER)
    async def test_rows_are_the_same(self, path: str, what: str) -> None:
        await same_on_ray(IN_ANY_ORDER[what](read_parquet(path)), ordered=False)

    @pytest.mark.parametrize("keys", [("k",), ()])
    async def test_groups_are_the_same(self, path: str, keys: tuple[str, ...]) -> None:
        await same_on_ray(read_parquet(path).group_by(*keys).aggregate(**WANTED), ordered=False)

    @pytest.mark.parametrize("how", ["left", "outer", "anti"])
    async def test_joins_are_the_same(self, path: str, how: Any) -> None:
        other = from_rows([{"k": n % 4, "j": None if n == 3 else n, "s": f"other {n}"} for n in range(6)])
        await same_on_ray(read_parquet(path).join(other, {"k": "j"}, how), ordered=False)

    async def test_no_rows_are_no_rows(self, path: str) -> None:
        nobody = read_parquet(path).filter(pc.field("id") < 0)
        groups = nobody.group_by("k").aggregate(rows="count")
        told = await on_ray_data(
            nobody.group_by().aggregate(rows="count"), groups, nobody.sort("id"), nobody.distinct()
        )
        assert list(map(rows_of, told)) == [[{"rows": 0}], [], [], []]
        pairs = [nobody.zip(nobody), nobody.union(nobody), nobody.join(nobody, how="cross")]
        assert list(map(rows_of, await on_ray_data(*pairs))) == [[], [], []]

    async def test_sides_of_a_zip_must_be_as_long(self, path: str) -> None:
        rows = read_parquet(path)
        with pytest.raises(MisuseError, match="one side has more rows than another: 40, 7"):
            await on_ray_data(rows.zip(rows.limit(7)))

    async def test_what_is_written_is_read_here(self, path: str, tmp_path: Path) -> None:
        rows = read_parquet(path).map(shout)
        many, one = (
            rows.write_parquet(tmp_path / "many"),
            rows.sort("id", descending=True).write_jsonl(tmp_path / "one.jsonl"),
        )
        folders = rows.write_parquet(tmp_path / "folders", partition_by="k")
        reports = await run(many, one, folders, engine=RAY)
        assert [report.rows for report in reports] == [len(ROWS)] * 3
        assert await read_parquet(tmp_path / "folders").filter(pc.field("k") == 2).count() == 10
        written = await read_parquet(tmp_path / "many").collect()
        assert written["s"].to_pylist() == [row["s"].upper() for row in ROWS]
        assert {part.path for part in reports[0].parts} == {str(p) for p in (tmp_path / "many").glob("*.parquet")}
        assert len(reports[1].parts) == 1
        assert (tmp_path / "one.jsonl").read_text().startswith('{"id":39,')

    async def test_one_file_is_written_of_no_rows_too(self, path: str, tmp_path: Path) -> None:
        (tmp_path / "none.jsonl").write_text("old\n")
        none = read_parquet(path).filter(lambda row: False).write_jsonl(tmp_path / "none.jsonl", mode="overwrite")
        report = await none.arun(engine=RAY)
        assert (report.rows, len(report.parts), (tmp_path / "none.jsonl").read_bytes()) == (0, 1, b"")

    async def test_branches_of_one_run_share_what_is_before_them(self, path: str, tmp_path: Path) -> None:
        def note(row: dict[str, Any]) -> dict[str, Any]:
            with (tmp_path / "calls").open("a") as calls:
                calls.write(".")
            return row

        shared = read_parquet(path).map(note)
        await run(shared.filter(odd), shared.map(shout), engine=RAY)
        assert len((tmp_path / "calls").read_text()) == len(ROWS)

    async def test_a_cache_that_is_filled_and_a_dataset_of_ray_are_read(self, path: str) -> None:
        cached = read_parquet(path).map(shout).cache()
        await cached.count()
        await same_on_ray(cached.filter(odd))
        import ray.data

        await same_on_ray(from_ray(ray.data.range(10)).select("id").flat_map(twice), ordered=False)

    async def test_an_error_of_a_function_reaches_the_program(self, path: str) -> None:
        def fail(row: dict[str, Any]) -> dict[str, Any]:
            raise ValueError(f"no {row['id']}")

        with pytest.raises(ValueError, match="no 0"):
            await read_parquet(path).map(fail).arun(engine=RAY)

    async def test_rows_go_to_actors_that_are_started_again(self, path: str, tmp_path: Path) -> None:
        async with LocalCluster(isolation="task") as cluster:
            added = read_parquet(path).map_actor(cluster, Adder, "add", 5, str(tmp_path), replicas=2, restarts=3)
            table = (await on_ray_data(added))[0]
        assert table["id"].to_pylist() == [row["id"] + 5 for row in ROWS]
        assert (tmp_path / "died").exists()

    async def test_rows_go_to_the_engines_of_a_detached_pool(self, path: str) -> None:
        rows = read_parquet(path).select("id", "s")
        async with RayCluster.connect() as cluster:
            for runner in ("generate", "pooling"):  # of one name, which workers must not take for each other
                spec = EngineSpec(model="echo", engine="echo", runner=runner)  # type: ignore[arg-type]  # one of them
                async with cluster.engines(spec, name="pool", lifetime="detached", cpus=0.5) as pool:
                    if runner == "pooling":
                        await same_on_ray(rows.embed(pool, prompt="s"))
                    else:
                        await same_on_ray(rows.generate(pool, prompt="s").chat(pool, messages="s", output="said"))
                await pool.close()

    async def test_an_engine_that_dies_costs_no_row(self, path: str) -> None:
        spec = EngineSpec(model="echo", engine="echo", engine_args={"die_after": 30})
        async with RayCluster.connect() as cluster:
            pool = cluster.engines(spec, name="mortal", lifetime="detached", replicas=2, cpus=0.5, restarts=50)
            async with pool:
                table = (await on_ray_data(read_parquet(path).generate(pool, prompt="s")))[0]
            restarts = [replica.restarts for replica in pool.stats().replicas]
            await pool.close()
        assert table["answer"].to_pylist() == [row["s"] for row in ROWS]
        assert sum(restarts)


ECHO = EngineSpec(model="echo", engine="echo")
LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        (lambda: from_rows(ROWS).cache(), "cache of read rows is not filled yet"),
        (lambda: from_rows(ROWS).split(2)[0], "run what it is a split of"),
        (lambda: from_rows(ROWS).map(shout, executor=ProcessExecutor(1)), "leave executor= out"),
        (lambda: from_rows(ROWS).map(lambda row: LOCK), r"map\(<lambda>\) can't be sent to a worker"),
        (lambda: from_rows(ROWS).generate(LocalCluster().engines(ECHO)), "attach to a detached one by its name"),
        (lambda: from_rows(ROWS).map_actor(LocalCluster(), Adder, "add", group=0), "leave it out"),
    ],
)
@pytest.mark.asyncio
async def test_what_ray_can_not_do_is_refused_before_anything_runs(dataset: Any, why: str) -> None:
    with pytest.raises(MisuseError, match=f"can't run with engine='ray': .*{why}"):
        await dataset().arun(engine=RAY)
    assert re.search(f"-> refused: .*{why}", dataset().explain(engine=RAY))


def test_explain_shows_what_ray_would_run() -> None:
    told = from_rows(ROWS).map(shout).limit(3).sort("id").explain(engine=RAY)
    assert told.splitlines()[0] == "read rows -> put into Ray's object store"
    assert told.splitlines()[-1] == "sort(id) -> map_batches + sort"


def test_engines_are_found_by_name() -> None:
    assert backend_of("local") is None
    assert backend_of(RAY) is RAY
    with pytest.raises(MisuseError, match="no engine 'spark'; there are local"):
        backend_of("spark")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["arun.data.backends"]["ray"].partition(":")
    assert getattr(import_module(module), name) is RayEngine
