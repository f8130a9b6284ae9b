"""CSV and Arrow IPC in."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arun.data.files import csv_sink, csv_source, ipc_sink, ipc_source, jsonl_source, parquet_source
from arun.errors import DataError, MisuseError
from tests.data.reading import read, rows, write


def file(folder: Path, content: str, name: str = "x.csv") -> Path:
    path = folder / name
    path.write_text(content)
    return path


def test_csv_types_are_taken_from_the_values(tmp_path: Path) -> None:
    path = file(tmp_path, 'n,x,s\n1,1.5,"a\nb"\n2,,NA\n')
    assert rows(csv_source(path)) == [{"n": 1, "x": 1.5, "s": "a\nb"}, {"n": 2, "x": None, "s": "NA"}]
    assert rows(csv_source(path, ["s"]).select(["s"])) == [{"s": "a\nb"}, {"s": "NA"}]
    assert read(csv_source(path, [])).shape == (2, 0)


def test_csv_types_names_delimiter_and_nulls_can_be_given(tmp_path: Path) -> None:
    path = file(tmp_path, "007;NA\n008;x\n", "x.tsv")
    source = csv_source(path, delimiter=";", names=["id", "s"], types={"id": pa.string()}, null_values=["NA"])
    assert rows(source) == [{"id": "007", "s": None}, {"id": "008", "s": "x"}]


def test_an_empty_string_within_quotes_is_no_null(tmp_path: Path) -> None:
    assert rows(csv_source(file(tmp_path, 'a,b\n"",1\n,2\n'))) == [{"a": "", "b": 1}, {"a": None, "b": 2}]


def test_csv_files_with_other_columns_are_read_as_one(tmp_path: Path) -> None:
    file(tmp_path, "a,b\n1,x\n", "1.csv")
    file(tmp_path, "c,a\ny,1.5\n", "2.csv")
    assert rows(csv_source(tmp_path)) == [{"a": 1.0, "b": "x", "c": None}, {"a": 1.5, "b": None, "c": "y"}]


def test_a_csv_value_of_another_type_is_named_with_its_row(tmp_path: Path) -> None:
    path = file(tmp_path, "a,b\n" + "1,2\n" * 2_000_000 + "1,x\n")
    with pytest.raises(DataError, match=r"x\.csv: In CSV column #1: Row #2000002: .* invalid value 'x'; types="):
        read(csv_source(path))


def test_a_csv_row_with_too_few_values_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.csv: CSV parse error: Row #3: Expected 2 columns, got 1: 3"):
        read(csv_source(file(tmp_path, "a,b\n1,2\n3\n")))


def test_two_csv_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.csv has two columns 'a'; rename one"):
        csv_source(file(tmp_path, "a,a\n1,2\n")).schema()


def test_a_compressed_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    assert rows(csv_source(tmp_path)) == [{"a": 1}]


@pytest.mark.parametrize("before", [0, 300_000])
def test_a_csv_row_longer_than_a_block_is_read(tmp_path: Path, before: int) -> None:
    path = file(tmp_path, "n,s\n" + "0,short\n" * before + f"1,{'x' * 9_000_000}\n2,y\n")
    table = read(csv_source(path))
    assert table.num_rows == before + 2
    assert [(row["n"], len(row["s"])) for row in table.slice(before).to_pylist()] == [(1, 9_000_000), (2, 1)]


def test_an_empty_csv_file_has_neither_rows_nor_columns(tmp_path: Path) -> None:
    file(tmp_path, "", "1.csv")
    assert read(csv_source(tmp_path)).shape == (0, 0)
    assert read(csv_source(tmp_path, names=["a"])).column_names == ["a"]
    file(tmp_path, "a\n1\n", "2.csv")
    assert rows(csv_source(tmp_path)) == [{"a": 1}]


@pytest.mark.parametrize("delimiter", ["", "||", "\n", '"', "é"])
def test_a_delimiter_that_csv_can_not_have_is_refused_at_once(tmp_path: Path, delimiter: str) -> None:
    for declare in (csv_source, csv_sink):
        with pytest.raises(MisuseError, match="it must be one ASCII character, and no quote or line end"):
            declare(tmp_path / "x.csv", delimiter=delimiter)


def test_a_csv_type_that_is_none_of_arrow_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"types= says that 'a' is a class, .*; give a type of pyarrow's"):
        csv_source(tmp_path / "x.csv", types={"a": str})  # type: ignore[dict-item]  # what is refused


def test_bytes_that_csv_can_not_hold_are_refused_by_their_column(tmp_path: Path) -> None:
    block = pa.record_batch({"n": [1], "blob": [b"\xff"]})
    with pytest.raises(DataError, match="no UTF-8 in 'blob', which CSV can't hold; JSON lines can"):
        write(csv_sink(tmp_path / "x.csv"), block)


def test_ipc_is_read_as_file_and_as_stream(tmp_path: Path) -> None:
    batch = pa.record_batch({"a": [1, 2, 3], "b": ["x", "y", None]})
    write(ipc_sink(tmp_path / "1.arrow"), batch, batch)
    with pa.ipc.new_stream(str(tmp_path / "2.arrows"), batch.schema) as stream:
        stream.write_batch(batch)
    assert ipc_source(tmp_path / "1.arrow").count() == 6
    source = ipc_source(tmp_path)
    assert source.count() is None
    assert read(source) == pa.Table.from_batches([batch] * 3)
    assert read(source.select(["b"])).column_names == ["b"]
    assert read(source.select([])).num_rows == 9
    first, _ = source.fragments()
    assert [block.num_rows for block in source.read(first, skip=4)] == [2]


def test_a_file_that_is_no_ipc_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.arrow can't be read as Arrow IPC"):
        ipc_source(file(tmp_path, "hello, world", "x.arrow")).schema()


def test_csv_text_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("word\nZürich\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.csv: the column 'word' holds text that is not UTF-8; .*pa\.binary\(\)"):
        read(csv_source(path))
    assert rows(csv_source(path, types={"word": pa.binary()})) == [{"word": "Zürich".encode("latin-1")}]


def test_utf_16_is_told_from_broken_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for encoding in ("utf-16", "utf-16-le"):
        path.write_bytes("a,b\n1,x\n".encode(encoding))
        with pytest.raises(DataError, match=r"x\.csv: that is UTF-16, or no text; convert it to UTF-8"):
            csv_source(path).schema()


def test_a_csv_header_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("é,b\n1,x\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.csv: its header is no UTF-8: .*; convert the file"):
        csv_source(path).schema()


def test_tabs_are_between_the_values_of_tsv_files_in_and_out(tmp_path: Path) -> None:
    block = pa.RecordBatch.from_pylist([{"a": 1, "b": "x,y"}])
    for name in ("x.tsv", "x.tsv.gz"):
        path = tmp_path / name
        write(csv_sink(path), block)
        assert path.is_file()
        assert read(csv_source(path, delimiter="\t")).to_pylist() == rows(csv_source(path)) == block.to_pylist()


@pytest.mark.parametrize("source", [csv_source, jsonl_source])
def test_a_compressed_file_that_breaks_off_is_named(tmp_path: Path, source: Callable[..., Any]) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b'{"a":1}\n' * 10_000)[:-20])
    with pytest.raises(DataError, match=r"x\.gz.*: Truncated compressed stream"):
        read(source(path))


def test_a_parquet_file_with_broken_data_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [f"text {n}" for n in range(10_000)]}), path, compression="zstd")
    data = path.read_bytes()
    path.write_bytes(data[:1000] + b"\xff" * 1000 + data[2000:])
    with pytest.raises(DataError, match=r"x\.parquet can't be read: "):
        read(parquet_source(path))
