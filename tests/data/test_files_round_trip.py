"""What is written is what is read: values of every type that a format can hold."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from arun.data.files import (
    csv_sink,
    csv_source,
    ipc_sink,
    ipc_source,
    jsonl_sink,
    jsonl_source,
    parquet_sink,
    parquet_source,
)
from tests.data.reading import read, write

TEXT = st.text(max_size=4)
TIMES = st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(2200, 1, 1))
SCALARS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.bool_(), st.booleans()),
    (pa.int8(), st.integers(-128, 127)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float64(), st.floats(allow_nan=False, allow_infinity=False)),
    (pa.float32(), st.floats(width=32, allow_nan=False, allow_infinity=False)),
    (pa.string(), TEXT),
    (pa.large_string(), TEXT),
    (pa.date32(), TIMES.map(datetime.datetime.date)),
    (pa.timestamp("us"), TIMES),
    (pa.timestamp("us", "UTC"), TIMES.map(lambda time: time.replace(tzinfo=datetime.UTC))),
    (pa.timestamp("ms", "Europe/Berlin"), TIMES.map(lambda t: t.replace(microsecond=0, tzinfo=datetime.UTC))),
    (pa.time64("us"), st.times()),
    (pa.decimal128(9, 2), st.integers(-(10**8), 10**8).map(lambda n: decimal.Decimal(n) / 100)),
]
BINARY = [(pa.binary(), st.binary(max_size=4)), (pa.binary(2), st.binary(min_size=2, max_size=2))]
OTHERS = [
    (pa.duration("us"), st.timedeltas(datetime.timedelta(-9), datetime.timedelta(9))),
    (pa.dictionary(pa.int32(), pa.string()), TEXT),
    (pa.null(), st.none()),
]


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def a_list(kind: Any) -> Any:
        return pa.list_(kind[0]), st.lists(st.none() | kind[1], max_size=3)

    def a_struct(kinds: Any) -> Any:
        names = [f"f {index}" for index in range(len(kinds))]
        fields = [pa.field(name, kind[0]) for name, kind in zip(names, kinds, strict=True)]
        values = {name: st.none() | kind[1] for name, kind in zip(names, kinds, strict=True)}
        return pa.struct(fields), st.fixed_dictionaries(values)

    return st.one_of(inner.map(a_list), st.lists(inner, min_size=1, max_size=3).map(a_struct))


def kinds(*scalars: Any) -> st.SearchStrategy[Any]:
    return st.recursive(st.sampled_from(scalars), nested, max_leaves=3)


def valid(array: pa.Array) -> bool:
    """Not so where a struct with a dictionary in it is null: pyarrow's builder then points into an empty dictionary."""
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


@st.composite
def tables(draw: st.DrawFn, columns: st.SearchStrategy[Any]) -> list[pa.RecordBatch]:
    """Blocks of one schema, of which any may be empty."""
    chosen = draw(st.lists(columns, min_size=1, max_size=4))
    schema = pa.schema([(f"c{index}", kind) for index, (kind, _) in enumerate(chosen)])
    blocks = []
    for rows in draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)):
        values = [draw(st.lists(st.none() | one, min_size=rows, max_size=rows)) for _, one in chosen]
        arrays = [pa.array(column, kind) for column, (kind, _) in zip(values, chosen, strict=True)]
        assume(all(map(valid, arrays)))
        blocks.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return blocks


def same(read: pa.Table, blocks: list[pa.RecordBatch]) -> None:
    written = pa.Table.from_batches(blocks)
    assert read.schema == written.schema
    assert read.to_pylist() == written.to_pylist()


@settings(max_examples=30)
@given(tables(kinds(*SCALARS, *BINARY, *OTHERS)))
def test_parquet(tmp_path_factory: pytest.TempPathFactory, blocks: list[pa.RecordBatch]) -> None:
    path = tmp_path_factory.mktemp("round") / "x.parquet"
    write(parquet_sink(path), *blocks)
    same(read(parquet_source(path)), blocks)


@settings(max_examples=30)
@given(tables(kinds(*SCALARS, *BINARY, OTHERS[0], OTHERS[2])))
def test_ipc(tmp_path_factory: pytest.TempPathFactory, blocks: list[pa.RecordBatch]) -> None:
    path = tmp_path_factory.mktemp("round") / "x.arrow"
    write(ipc_sink(path, compression="zstd"), *blocks)
    same(read(ipc_source(path)), blocks)


@settings(max_examples=30)
@given(tables(kinds(*SCALARS, *BINARY, *OTHERS)), st.integers(1, 50))
def test_json_lines_with_a_schema(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[pa.RecordBatch], fragment_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("round") / "x.jsonl"
    write(jsonl_sink(path), *blocks)
    same(read(jsonl_source(path, schema=blocks[0].schema, fragment_bytes=fragment_bytes)), blocks)


@settings(max_examples=30)
@given(tables(st.sampled_from([kind for kind in SCALARS if not pa.types.is_time(kind[0])])))
def test_csv_with_types(tmp_path_factory: pytest.TempPathFactory, blocks: list[pa.RecordBatch]) -> None:
    schema = blocks[0].schema.append(pa.field("last", pa.int64()))
    blocks = [
        pa.RecordBatch.from_arrays([*block.columns, pa.array(range(block.num_rows), pa.int64())], schema=schema)
        for block in blocks
    ]
    path = tmp_path_factory.mktemp("round") / "x.csv"
    write(csv_sink(path), *blocks)
    same(read(csv_source(path, types=dict(zip(schema.names, schema.types, strict=True)))), blocks)
