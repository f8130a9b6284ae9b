"""Sinks: parts appear whole under their names, what was there is refused, replaced or added to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arun.data import from_rows
from arun.data.files import (
    FileSink,
    csv_sink,
    csv_source,
    ipc_sink,
    ipc_source,
    jsonl_sink,
    jsonl_source,
    parquet_sink,
    parquet_source,
)
from arun.errors import DataError, MisuseError
from tests.data.reading import read, rows, write

KINDS = {
    "parquet": (parquet_sink, parquet_source, ".parquet"),
    "jsonl": (jsonl_sink, jsonl_source, ".jsonl"),
    "csv": (csv_sink, csv_source, ".csv"),
    "ipc": (ipc_sink, ipc_source, ".arrow"),
}
BLOCK = pa.record_batch({"a": [1, 2], "s": ["x", None]})
ROWS = BLOCK.to_pylist()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Callable[..., FileSink], Callable[..., Any], str]:
    return KINDS[request.param]  # type: ignore[return-value]  # three things each


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place on this disk, and one behind a URL."""
    if request.param == "local":
        yield str(tmp_path)
        return
    yield f"memory://{tmp_path.name}"
    memory = fsspec.filesystem("memory")
    if memory.exists(tmp_path.name):
        memory.rm(tmp_path.name, recursive=True)


def names(folder: str) -> list[str]:
    filesystem, path = fsspec.url_to_fs(folder)
    return sorted(os.path.basename(found) for found in filesystem.find(path))


def test_a_file_is_written_and_read_back(kind: Any, folder: str) -> None:
    sink, source, suffix = kind
    part = write(sink(f"{folder}/deep/x{suffix}"), BLOCK, BLOCK)
    assert part.rows == 4
    assert part.size > 0
    assert names(f"{folder}/deep") == [f"x{suffix}"]
    assert rows(source(f"{folder}/deep/x{suffix}")) == ROWS * 2


def test_a_folder_of_parts_is_written_and_read_back(kind: Any, folder: str) -> None:
    sink, source, suffix = kind
    out = sink(f"{folder}/out")
    out.begin()
    for number in (1, 0):
        part = out.part(f"part-0000{number}")
        part.write(BLOCK)
        part.commit()
    assert names(f"{folder}/out") == [f"part-00000{suffix}", f"part-00001{suffix}"]
    out.end()
    assert names(f"{folder}/out") == ["_SUCCESS", f"part-00000{suffix}", f"part-00001{suffix}"]
    assert rows(source(f"{folder}/out")) == ROWS * 2


def test_nothing_is_there_under_a_name_before_it_is_whole(kind: Any, folder: str) -> None:
    sink, source, suffix = kind
    out = sink(f"{folder}/out/")
    out.begin()
    part = out.part("part-00000")
    part.write(BLOCK)
    with pytest.raises(DataError, match=rf"no \{suffix}"):
        source(f"{folder}/out").schema()
    part.abort()
    assert names(f"{folder}/out") == []


def test_what_is_there_already_is_refused(kind: Any, folder: str) -> None:
    sink, _, suffix = kind
    write(sink(f"{folder}/out"), BLOCK)
    write(sink(f"{folder}/x{suffix}"), BLOCK)
    with pytest.raises(DataError, match=rf"has files already \(1, such as part-00000\{suffix}\); mode=\"overwrite\""):
        sink(f"{folder}/out").begin()
    with pytest.raises(DataError, match=r"exists already; mode=\"overwrite\" replaces it"):
        sink(f"{folder}/x{suffix}").begin()


def test_appending_adds_parts(kind: Any, folder: str) -> None:
    sink, source, _ = kind
    for _ in range(3):
        write(sink(f"{folder}/out", mode="append"), BLOCK)
    assert rows(source(f"{folder}/out")) == ROWS * 3


def test_overwriting_replaces_everything_at_the_end(kind: Any, folder: str) -> None:
    sink, source, suffix = kind
    write(sink(f"{folder}/out"), BLOCK, BLOCK)
    out = sink(f"{folder}/out", mode="overwrite")
    out.begin()
    part = out.part("part-00000")
    part.write(BLOCK)
    part.commit()
    assert rows(source(f"{folder}/out")) == ROWS * 2
    assert "_SUCCESS" not in names(f"{folder}/out")
    out.end()
    assert rows(source(f"{folder}/out")) == ROWS
    assert len(names(f"{folder}/out")) == 2

    write(sink(f"{folder}/x{suffix}"), BLOCK, BLOCK)
    write(sink(f"{folder}/x{suffix}", mode="overwrite"), BLOCK)
    assert rows(source(f"{folder}/x{suffix}")) == ROWS


@pytest.mark.parametrize("name", ["out", "x"])
def test_of_two_writers_the_second_is_refused_and_the_first_keeps_its_rows(kind: Any, folder: str, name: str) -> None:
    sink, source, suffix = kind
    path = f"{folder}/{name}" if name == "out" else f"{folder}/{name}{suffix}"
    one, other = sink(path), sink(path)
    one.begin()
    other.begin()
    first, second = one.part("part-00000"), other.part("part-00000")
    second.write(BLOCK.slice(1))
    first.write(BLOCK)
    first.commit()
    with pytest.raises(DataError, match="another run has written to this place meanwhile; let one run at a time"):
        second.commit()
    second.abort()
    one.end()
    assert rows(source(path)) == ROWS
    assert len(names(folder)) == (2 if name == "out" else 1)


def test_what_a_later_writer_has_tidied_away_is_told(kind: Any, folder: str) -> None:
    sink, _, _ = kind
    one = sink(f"{folder}/out")
    one.begin()
    part = one.part("part-00000")
    part.write(BLOCK)
    sink(f"{folder}/out").begin()
    with pytest.raises(DataError, match="another run has written to this place meanwhile"):
        part.commit()
    part.abort()


def test_two_writers_may_append(kind: Any, folder: str) -> None:
    sink, source, _ = kind
    one, other = sink(f"{folder}/out", mode="append"), sink(f"{folder}/out", mode="append")
    one.begin()
    other.begin()
    for out in (one, other):
        part = out.part("part-00000")
        part.write(BLOCK)
        part.commit()
    one.end()
    other.end()
    assert rows(source(f"{folder}/out")) == ROWS * 2


def test_of_two_writers_that_overwrite_the_second_is_refused(kind: Any, folder: str) -> None:
    sink, source, _ = kind
    write(sink(f"{folder}/out"), BLOCK, BLOCK, BLOCK)
    one, other = sink(f"{folder}/out", mode="overwrite"), sink(f"{folder}/out", mode="overwrite")
    one.begin()
    other.begin()
    for out, block in ((one, BLOCK), (other, BLOCK.slice(1))):
        part = out.part("part-00000")
        part.write(block)
        part.commit()
    one.end()
    with pytest.raises(DataError, match=r"another run has replaced part-00000\..* meanwhile, so what this one has"):
        other.end()
    assert rows(source(f"{folder}/out")) == ROWS
    assert len(names(f"{folder}/out")) == 2


@pytest.mark.anyio
@pytest.mark.usefixtures("runtime", "nothing_left")
async def test_one_file_is_written_of_no_rows_too_and_replaces_what_was_there(tmp_path: Path, kind: Any) -> None:
    _, _, suffix = kind
    word = kind[0].__name__.removesuffix("_sink")
    path = tmp_path / f"x{suffix}"
    some = from_rows([{"a": 1, "s": "x"}])
    await getattr(some, f"write_{word}")(path).arun()
    for none in (some.filter(lambda row: False), some.flat_map(lambda row: [])):  # the columns of one are known
        report = await getattr(none, f"write_{word}")(path, mode="overwrite").arun()
        assert (report.rows, len(report.parts)) == (0, 1)
        assert str(report).startswith("0 rows in 1 part of ")
        assert '"x"' not in path.read_text(errors="replace")
        assert names(str(tmp_path)) == [path.name]


@pytest.mark.anyio
@pytest.mark.usefixtures("runtime", "nothing_left")
async def test_no_rows_of_unknown_columns_are_a_folder_without_parts(tmp_path: Path) -> None:
    report = await from_rows([{"a": 1}]).flat_map(lambda row: []).write_parquet(tmp_path / "out").arun()
    assert (report.rows, report.parts, names(str(tmp_path / "out"))) == (0, (), ["_SUCCESS"])


def test_overwriting_that_is_given_up_leaves_what_was_there(kind: Any, folder: str) -> None:
    sink, source, _ = kind
    write(sink(f"{folder}/out"), BLOCK, BLOCK)
    out = sink(f"{folder}/out", mode="overwrite")
    out.begin()
    out.part("part-00000").commit()
    assert rows(source(f"{folder}/out")) == ROWS * 2
    write(sink(f"{folder}/out", mode="overwrite"), BLOCK)
    assert rows(source(f"{folder}/out")) == ROWS
    assert len(names(f"{folder}/out")) == 2


@pytest.mark.parametrize("blocks", [[BLOCK.slice(0, 0)], [BLOCK.slice(0, 0), BLOCK, BLOCK.slice(0, 0)]])
def test_empty_blocks_are_no_rows(kind: Any, folder: str, blocks: list[pa.RecordBatch]) -> None:
    sink, source, suffix = kind
    write(sink(f"{folder}/x{suffix}"), *blocks)
    assert read(source(f"{folder}/x{suffix}")).num_rows == sum(block.num_rows for block in blocks)


def test_two_columns_of_one_name_are_refused(kind: Any, folder: str) -> None:
    sink, _, suffix = kind
    twice = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(DataError, match=r"what is written to .*x\..* has two columns 'a'; rename one"):
        write(sink(f"{folder}/x{suffix}"), twice)
    with pytest.raises(DataError, match="a later block has two columns 'a'; rename one"):
        write(sink(f"{folder}/y{suffix}"), twice.select([0]), twice)


@pytest.mark.parametrize("name", ["parquet", "ipc"])
def test_no_rows_keep_their_columns(tmp_path: Path, name: str) -> None:
    sink, source, suffix = KINDS[name]
    write(sink(tmp_path / f"x{suffix}"), BLOCK.slice(0, 0))
    assert source(tmp_path / f"x{suffix}").schema() == BLOCK.schema


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (pa.record_batch({"a": ["x"], "s": ["x"]}), "the column 'a' is string, not int64"),
        (pa.record_batch({"a": [1.5], "s": ["x"]}), "the column 'a' is double, not int64"),
        (pa.record_batch({"a": [1]}), "the column 's' is missing"),
        (pa.record_batch({"a": [1], "s": ["x"], "z": [1]}), "the column 'z' is new"),
    ],
)
def test_a_block_that_does_not_fit_is_refused_by_column(tmp_path: Path, kind: Any, block: Any, why: str) -> None:
    sink, _, suffix = kind
    out = sink(tmp_path / f"x{suffix}")
    out.begin()
    part = out.part("part-00000")
    part.write(BLOCK)
    with pytest.raises(DataError, match=rf"x\{suffix}: in a later block {why}; all blocks must have the same columns"):
        part.write(block)
    part.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_column_that_begins_with_nulls_gets_the_type_of_its_first_value(tmp_path: Path) -> None:
    untyped = pa.record_batch({"a": pa.nulls(2), "l": [[], [None]]})
    typed = pa.record_batch({"l": [["x"]], "a": [1]})
    write(parquet_sink(tmp_path / "x.parquet"), untyped, typed, untyped)
    assert rows(parquet_source(tmp_path / "x.parquet")) == [
        {"a": None, "l": []},
        {"a": None, "l": [None]},
        {"a": 1, "l": ["x"]},
        {"a": None, "l": []},
        {"a": None, "l": [None]},
    ]


def test_what_fits_without_loss_is_cast(tmp_path: Path) -> None:
    write(parquet_sink(tmp_path / "x.parquet"), pa.record_batch({"a": [1.5]}), pa.record_batch({"a": [2]}))
    assert rows(parquet_source(tmp_path / "x.parquet")) == [{"a": 1.5}, {"a": 2.0}]


@pytest.mark.parametrize(
    ("make", "block", "why"),
    [
        (csv_sink, pa.record_batch({"l": [[1]]}), r"the column 'l' is list<.*>, which CSV can't hold; JSON lines can"),
        (csv_sink, pa.record_batch({"a": [1, None]}), "the column 'a' holds null, which in a CSV of one column"),
        (parquet_sink, pa.record_batch({"a": [{}]}), "parquet can't hold these columns: .*'a'"),
        (parquet_sink, BLOCK.select([]), "the rows have no columns, and parquet keeps none without"),
    ],
)
def test_what_a_format_can_not_hold_is_refused_by_column(tmp_path: Path, make: Any, block: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        write(make(tmp_path / "out"), block)


def test_small_blocks_make_large_row_groups(tmp_path: Path) -> None:
    write(parquet_sink(tmp_path / "x.parquet", compression="snappy"), *[BLOCK] * 1000)
    group = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0)
    assert (group.num_rows, group.column(0).compression) == (2000, "SNAPPY")


def test_the_size_of_a_part_counts_what_is_not_written_yet(kind: Any, tmp_path: Path) -> None:
    sink, _, _ = kind
    out = sink(tmp_path / "out", part_bytes=1000)
    assert out.part_bytes == 1000
    out.begin()
    part = out.part("part-00000")
    sizes = []
    for _ in range(3):
        part.write(pa.record_batch({"a": range(1000), "b": [1] * 1000}))
        sizes.append(part.size())
    part.commit()
    assert sizes == sorted(set(sizes))
    assert sizes[0] > 1000


def test_lines_are_compressed_by_suffix_or_by_name(tmp_path: Path) -> None:
    write(jsonl_sink(tmp_path / "x.jsonl.gz"), BLOCK)
    write(csv_sink(tmp_path / "out", compression="zstd"), BLOCK)
    assert (tmp_path / "x.jsonl.gz").read_bytes().startswith(b"\x1f\x8b")
    assert names(str(tmp_path / "out")) == ["_SUCCESS", "part-00000.csv.zst"]
    assert rows(jsonl_source(tmp_path / "x.jsonl.gz")) == rows(csv_source(tmp_path / "out")) == ROWS


@pytest.mark.parametrize(
    ("options", "path", "why"),
    [
        ({"mode": "replace"}, "out", r"mode='replace'; it is one of 'error', 'overwrite', 'append'"),
        ({"mode": "append"}, "x.parquet", "is one file, which can't be appended to; name a folder"),
        ({"part_bytes": 10}, "x.parquet", "is one file, so part_bytes has no meaning; name a folder"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, path: str, why: str) -> None:
    with pytest.raises(MisuseError, match=why):
        parquet_sink(path, **options)


def test_a_file_where_a_folder_is_wanted_is_refused_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(DataError, match=r"is a file; name a folder, or a file that ends in \.parquet"):
        parquet_sink(tmp_path / "out").begin()
    with pytest.raises(DataError, match="is a folder; name a file, or write a slash behind it"):
        parquet_sink(tmp_path / "x.parquet").begin()
    parquet_sink(f"{tmp_path}/x.parquet/").begin()


def test_what_a_killed_writer_left_is_not_read_and_goes_away(tmp_path: Path) -> None:
    """Kills themselves are in :mod:`tests.data.killed_jobs`."""
    write(parquet_sink(tmp_path / "out"), BLOCK)
    (tmp_path / "out" / ".arun-0011aabb-part-00000.parquet").write_bytes(b"PAR1, and no more")
    assert rows(parquet_source(tmp_path / "out")) == ROWS
    write(parquet_sink(tmp_path / "out", mode="append"), BLOCK)
    assert len(os.listdir(tmp_path / "out")) == 4  # another one may be appending
    write(parquet_sink(tmp_path / "out", mode="overwrite"), BLOCK)
    assert len(os.listdir(tmp_path / "out")) == 2
