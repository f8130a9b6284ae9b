"""Hive partitions: folders that are columns, in and out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pd
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from arun.data import from_rows, read_parquet
from arun.data.files import csv_source, ipc_source, jsonl_source, parquet_source
from arun.errors import DataError, MisuseError
from tests.data.reading import read, rows

WRITERS: dict[str, tuple[Callable[[pa.Table, Path], object], Callable[..., Any]]] = {
    "parquet": (lambda table, path: pq.write_table(table, path), parquet_source),
    "csv": (lambda table, path: path.write_text("n\n" + "".join(f"{n}\n" for n in table["n"].to_pylist())), csv_source),
    "jsonl": (
        lambda table, path: path.write_text("".join(f'{{"n": {n}}}\n' for n in table["n"].to_pylist())),
        jsonl_source,
    ),
    "arrow": (lambda table, path: feather.write_feather(table, path), ipc_source),
}


def write(folder: Path, kind: str, *folders: str) -> None:
    for number, name in enumerate(folders):
        (folder / name).mkdir(parents=True)
        WRITERS[kind][0](pa.table({"n": [number]}), folder / name / f"part.{kind}")


@pytest.mark.parametrize("kind", WRITERS)
def test_folders_are_columns_behind_those_of_the_files(tmp_path: Path, kind: str) -> None:
    write(
        tmp_path,
        kind,
        "year=2023/city=S%C3%A3o Paulo",
        "year=2024/city=Rio",
        "year=2024/city=__HIVE_DEFAULT_PARTITION__",
    )
    source = WRITERS[kind][1](tmp_path)
    assert source.schema() == pa.schema([("n", pa.int64()), ("year", pa.int64()), ("city", pa.string())])
    found = sorted(rows(source), key=lambda row: row["n"])
    assert found == [
        {"n": 0, "year": 2023, "city": "São Paulo"},
        {"n": 1, "year": 2024, "city": "Rio"},
        {"n": 2, "year": 2024, "city": None},
    ]
    assert {tuple(row) for row in rows(source.select(["city"]))} == {("city",)}
    assert read(source.select(["year", "n"])).column_names == ["year", "n"]


def test_files_that_a_condition_on_folders_rules_out_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "parquet", "year=2022", "year=2023", "year=2024")
    source = parquet_source(tmp_path)
    late = source.where((pc.field("year") > 2022) & (pc.field("n") < 2))
    assert len(list(source.fragments())) == 3
    assert [fragment.place[0] for fragment in late.fragments()] == [1]
    assert rows(late) == [{"n": 1, "year": 2023}]
    assert rows(late.select(["n"])) == [{"n": 1}]
    told = read_parquet(tmp_path).filter(pc.field("year") == 2024).select("n").explain()
    assert f"  [0] read parquet {tmp_path} [n] where (year == 2024)\nphysical:" in told


def test_only_folders_below_what_was_named_are_columns(tmp_path: Path) -> None:
    write(tmp_path, "parquet", "year=2023/a=x", "year=2024/a=y")
    assert parquet_source(tmp_path / "year=2024").schema().names == ["n", "a"]
    assert parquet_source(f"{tmp_path}/year=*/a=y/*.parquet").schema().names == ["n", "year", "a"]
    assert parquet_source(tmp_path / "year=2024" / "a=y" / "part.parquet").schema().names == ["n"]


def test_what_files_have_themselves_is_read_from_them(tmp_path: Path) -> None:
    (tmp_path / "n=7").mkdir()
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "n=7" / "part.parquet")
    assert rows(parquet_source(tmp_path)) == [{"n": 1}, {"n": 2}]


PARTITIONED = [
    {"id": n, "lang": ["en", None, "a/b =%"][n % 3], "year": 2023 + n % 2, "s": f"row {n}"} for n in range(12)
]


@pytest.mark.anyio
async def test_what_is_written_by_folders_is_read_here_and_by_pyarrow(tmp_path: Path) -> None:
    written = from_rows(PARTITIONED).write_parquet(tmp_path / "out", partition_by=["year", "lang"])
    report = await written.arun()
    assert report.rows == 12
    assert len(list((tmp_path / "out").glob("year=2024/lang=*/*.parquet"))) == 3
    table = (await read_parquet(tmp_path / "out").collect()).sort_by("id").select(list(PARTITIONED[0]))
    assert table.to_pylist() == PARTITIONED
    (part,) = report.parts
    assert await read_parquet(part.path).count() == 12
    there = pd.dataset(tmp_path / "out", partitioning="hive").to_table().sort_by("id").select(list(PARTITIONED[0]))
    assert there.to_pylist() == PARTITIONED


@pytest.mark.anyio
async def test_folders_can_be_replaced_and_added_to(tmp_path: Path) -> None:
    rows_of = from_rows(PARTITIONED)
    for mode, count in (("error", 12), ("append", 24), ("overwrite", 12)):
        to: Any = {"partition_by": "lang", "mode": mode, "part_bytes": 1}
        await rows_of.map(lambda row: row, concurrency=3).write_parquet(tmp_path / "out", **to).arun()
        assert await read_parquet(tmp_path / "out").count() == count


@pytest.mark.anyio
async def test_a_killed_job_goes_on_with_folders(tmp_path: Path) -> None:
    WORKS.clear()
    await from_rows(PARTITIONED).write_parquet(tmp_path / "in", partition_by="year").arun()
    job = read_parquet(tmp_path / "in").map(fails_at_nine).write_parquet(tmp_path / "out", partition_by="year")
    with pytest.raises(ValueError, match="nine"):
        await job.arun(checkpoint=tmp_path / "job")
    WORKS.append(True)
    await job.arun(checkpoint=tmp_path / "job")
    table = await read_parquet(tmp_path / "out").collect()
    assert table.sort_by("id").select(list(PARTITIONED[0])).to_pylist() == PARTITIONED


WORKS: list[bool] = []


def fails_at_nine(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] == 9 and not WORKS:
        raise ValueError("nine")
    return row


@pytest.mark.anyio
async def test_what_makes_no_folders_is_refused(tmp_path: Path) -> None:
    rows_of = from_rows([{"id": n, "x": n / 2} for n in range(1200)])
    with pytest.raises(MisuseError, match="one file, which has no folders"):
        rows_of.write_parquet(tmp_path / "x.parquet", partition_by="id")
    with pytest.raises(MisuseError, match="'_x' does are hidden"):
        rows_of.write_parquet(tmp_path, partition_by="_x")
    for by, message in (("y", "no column 'y' to partition by; there are id, x"), ("x", "double makes no names")):
        with pytest.raises(DataError, match=message):
            await rows_of.write_parquet(tmp_path / "out", partition_by=by).arun()
    with pytest.raises(DataError, match="id has more than 1000 values, each a file"):
        await rows_of.write_parquet(tmp_path / "out", partition_by="id").arun()
    assert not list((tmp_path / "out").rglob("*.parquet"))
