"""JSON lines in: ranges of lines, late fields, other types, and lines that are broken."""

from __future__ import annotations

import datetime
import decimal
import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun.data.files import jsonl_sink, jsonl_source, lines
from arun.data.files.lines import chunks, line_at
from arun.data.files.paths import Listing
from arun.errors import DataError
from tests.data.reading import read, rows, write


def file(folder: Path, content: str | bytes, name: str = "x.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(
    st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b" ")), max_size=9),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_ranges_of_lines_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], ended: bool, size: int, chunk: int
) -> None:
    data = b"\n".join(content) + (b"\n" if ended else b"")
    path = file(tmp_path_factory.mktemp("ranges"), data)
    (found,) = Listing(path, (".jsonl",)).files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        starts = range(0, len(data), size)
        parts = [part for start in starts for part in chunks(found, start, min(len(data), start + size))]
        assert b"".join(part.data for part in parts) == data
        for part in parts:
            assert data[part.offset :].startswith(part.data)
            assert part.offset == 0 or data[part.offset - 1 : part.offset] == b"\n"
            assert line_at(found, part.offset) == data[: part.offset].count(b"\n") + 1


def test_a_fragment_is_a_range_of_bytes(tmp_path: Path) -> None:
    path = file(tmp_path, "".join(f'{{"n":{n}}}\n' for n in range(100)))
    source = jsonl_source(path, fragment_bytes=100)
    assert len(list(source.fragments())) == 9
    assert [row["n"] for row in rows(source)] == [*range(100)]
    fragment = list(source.fragments())[1]
    (block,) = source.read(fragment, skip=3)
    assert block.column("n")[0].as_py() == 13 + 3


def test_a_field_that_comes_late_is_null_before(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a":1}\n{"a":2,"b":{"c":[1]}}\n{"b":{"d":"x"}}\n')
    assert rows(jsonl_source(path)) == [
        {"a": 1, "b": None},
        {"a": 2, "b": {"c": [1], "d": None}},
        {"a": None, "b": {"c": None, "d": "x"}},
    ]


def test_integers_and_floats_in_one_column_are_floats(tmp_path: Path) -> None:
    assert rows(jsonl_source(file(tmp_path, '{"a":1}\n{"a":1.5}\n'))) == [{"a": 1.0}, {"a": 1.5}]


def test_strings_that_look_like_dates_stay_strings(tmp_path: Path) -> None:
    source = jsonl_source(file(tmp_path, '{"a":"2024-01-01","b":["2024-01-01"],"c":{"d":"2024-01-01"}}\n'))
    assert rows(source) == [{"a": "2024-01-01", "b": ["2024-01-01"], "c": {"d": "2024-01-01"}}]


def test_types_that_do_not_fit_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a":1}\n{"a":null}\n{"a":"x"}\n')
    with pytest.raises(DataError, match=r"the column 'a' is int64 in .*:1, but string in .*:3; give schema="):
        jsonl_source(path).schema()


def test_a_string_column_of_a_given_schema_takes_everything(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a":1}\n{"a":"x\\n"}\n{"a":{"b":[1.50, null]}}\n{"a":null,"z":1}\n{}\n')
    schema = pa.schema([("a", pa.string())])
    assert [row["a"] for row in rows(jsonl_source(path, schema=schema))] == [
        "1",
        "x\n",
        '{"b":[1.50, null]}',
        None,
        None,
    ]


def test_what_json_has_no_types_for_is_read_by_the_schema(tmp_path: Path) -> None:
    times = '"d":"2024-01-02","t":"2024-01-02T03:04:05+01:00"'
    line = f'{{{times},"b":"aGk=","n":1.10,"m":{{"k":1}},"c":"x","u":18446744073709551615}}'
    schema = pa.schema([
        ("d", pa.date32()),
        ("t", pa.timestamp("us", "UTC")),
        ("b", pa.binary()),
        ("n", pa.decimal128(5, 2)),
        ("m", pa.map_(pa.string(), pa.int64())),
        ("c", pa.dictionary(pa.int32(), pa.string())),
        ("u", pa.uint64()),
    ])
    table = read(jsonl_source(file(tmp_path, line), schema=schema))
    assert table.schema == schema
    assert table.to_pylist() == [
        {
            "d": datetime.date(2024, 1, 2),
            "t": datetime.datetime(2024, 1, 2, 2, 4, 5, tzinfo=datetime.UTC),
            "b": b"hi",
            "n": decimal.Decimal("1.10"),
            "m": [("k", 1)],
            "c": "x",
            "u": 2**64 - 1,
        }
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"a":', "Input data was truncated"),
        ("[1]", "Expected `object`, got `array`"),
        ('{"a":1} x', "JSON is malformed"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = file(tmp_path, '{"a":1}\n' * 20 + line + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:21: .*{why}"):
        read(jsonl_source(path, schema=pa.schema([("a", pa.int64())]), fragment_bytes=50))
    with pytest.raises(DataError, match=rf"x\.jsonl:21: .*{why}"):
        read(jsonl_source(path, fragment_bytes=50))


def test_a_line_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    path = file(tmp_path, b'{"a":"x"}\n' * 20 + b'{"a":"\xff"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:21: .*can't decode byte 0xff"):
        read(jsonl_source(path))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"a":1,"b":2}', r"unknown field `b`"),
        ('{"a":"x"}', r"Expected `int \| null`, got `str` - at `\$\.a`"),
    ],
)
def test_a_later_line_that_does_not_fit_is_named_with_the_remedy(tmp_path: Path, line: str, why: str) -> None:
    path = file(tmp_path, '{"a":1}\n' * 20 + line)
    with pytest.raises(DataError, match=rf"x\.jsonl:21: .*{why}.*give schema=, or sample_bytes=None"):
        read(jsonl_source(path, sample_bytes=10))


def test_everything_is_looked_at_for_the_columns_when_asked_to(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a":1}\n' * 20 + '{"b":"x"}\n')
    assert jsonl_source(path, sample_bytes=None, fragment_bytes=10).schema().names == ["a", "b"]


def test_columns_that_are_not_asked_for_need_not_fit(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a":1,"b":1}\n' * 20 + '{"a":2,"b":"x","c":{}}\n')
    assert rows(jsonl_source(path, ["a"], sample_bytes=10))[-1] == {"a": 2}
    with pytest.raises(DataError, match="has no column 'z'; it has a, b"):
        jsonl_source(path, ["z"], sample_bytes=10).schema()


def test_a_new_field_within_a_chosen_column_is_not_lost_silently(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a":{"b":1}}\n' * 20 + '{"a":{"b":1,"c":2},"z":1}\n')
    with pytest.raises(DataError, match=r":21: Object contains unknown field `c` - at `\$\.a`"):
        read(jsonl_source(path, ["a"], sample_bytes=10))


def test_empty_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = file(tmp_path, b'\xef\xbb\xbf{"a":1}\r\n\r\n  \n{"a":2}')
    assert rows(jsonl_source(path)) == [{"a": 1}, {"a": 2}]


def test_rows_without_fields_are_rows(tmp_path: Path) -> None:
    assert read(jsonl_source(file(tmp_path, "{}\n{}\n"))).num_rows == 2
    assert read(jsonl_source(file(tmp_path, "")).select([])).num_rows == 0


def test_a_compressed_file_is_one_fragment(tmp_path: Path) -> None:
    path = file(tmp_path, gzip.compress(b'{"a":1}\n' * 100), "x.jsonl.gz")
    source = jsonl_source(path, fragment_bytes=10)
    assert len(list(source.fragments())) == 1
    assert read(source).num_rows == 100


def test_a_line_longer_than_a_chunk_is_one_row(tmp_path: Path) -> None:
    path = file(tmp_path, f'{{"a":"{"x" * (9 << 20)}"}}\n{{"a":"y"}}\n')
    source = jsonl_source(path, fragment_bytes=1 << 20, sample_bytes=100)
    assert [len(row["a"]) for row in rows(source)] == [9 << 20, 1]


def test_a_list_of_several_types_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a": [1]}\n{"a": [1, "x"]}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*; give schema=, where pa\.string\(\) takes everything"):
        read(jsonl_source(path))
    schema = pa.schema([("a", pa.string())])
    assert rows(jsonl_source(path, schema=schema)) == [{"a": "[1]"}, {"a": '[1, "x"]'}]


def test_whole_numbers_above_the_largest_int64_are_not_rounded(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a":1,"b":{"c":[9223372036854775809]}}\n{"a":18446744073709551615,"b":null}\n')
    table = read(jsonl_source(path))
    assert table.schema.field("a").type == pa.uint64()
    assert table.to_pylist() == [{"a": 1, "b": {"c": [2**63 + 1]}}, {"a": 2**64 - 1, "b": None}]
    file(tmp_path, '{"a":1.5}\n{"a":9223372036854775809}\n')
    assert read(jsonl_source(path)).schema.field("a").type == pa.float64()


def test_types_of_several_files_that_do_not_fit_are_refused_with_both_files(tmp_path: Path) -> None:
    for name, value in (("1.jsonl", "1"), ("2.jsonl", "2"), ("3.jsonl", '"x"'), ("4.jsonl", "18446744073709551615")):
        file(tmp_path, f'{{"a":{value}}}\n', name)
    with pytest.raises(DataError, match=r"'a' is int64 in .*1\.jsonl, but string in .*3\.jsonl; give schema="):
        jsonl_source(tmp_path).schema()


def test_utf_16_is_told_from_broken_json(tmp_path: Path) -> None:
    path = file(tmp_path, '{"a":1}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"x\.jsonl:1: that is UTF-16, or no text; convert it to UTF-8"):
        read(jsonl_source(path))


def test_a_map_is_an_object_and_comes_back_by_its_type(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.int64())
    block = pa.record_batch({"m": pa.array([[("a", 1), ("b", 2)], None, []], kind)})
    write(jsonl_sink(tmp_path / "x.jsonl"), block)
    assert (tmp_path / "x.jsonl").read_text() == '{"m":{"a":1,"b":2}}\n{"m":null}\n{"m":{}}\n'
    assert read(jsonl_source(tmp_path / "x.jsonl", schema=block.schema)) == pa.Table.from_batches([block])
    twice = pa.record_batch({"m": pa.array([[("a", 1), ("a", 2)]], kind)})
    with pytest.raises(DataError, match=r"JSON objects can't hold a map with one key twice: .* was 'a'"):
        write(jsonl_sink(tmp_path / "y.jsonl"), twice)


def test_a_field_may_have_any_name_but_is_not_read_exactly_with_quotes_in_it(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    table = pa.table({'"quoted"\n': [1, 2], "at": [datetime.date(2026, 1, 1), None]})
    write(jsonl_sink(path), *table.to_batches())
    assert rows(jsonl_source(path)) == [{'"quoted"\n': 1, "at": "2026-01-01"}, {'"quoted"\n': 2, "at": None}]
    with pytest.raises(DataError, match="a field's name can't be read line by line: "):
        rows(jsonl_source(path, schema=table.schema))
