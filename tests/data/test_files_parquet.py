"""Parquet in: columns and conditions are pushed into the reading, and change nothing but what is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun.data.files import parquet_source
from arun.errors import DataError
from tests.data.reading import read, rows


def test_a_fragment_is_a_row_group_with_its_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": range(10)}), tmp_path / "x.parquet", row_group_size=4)
    source = parquet_source(tmp_path / "x.parquet")
    assert [fragment.rows for fragment in source.fragments()] == [4, 4, 2]
    assert len({fragment.key for fragment in source.fragments()}) == 3
    assert source.count() == 10
    assert rows(source) == [{"a": a} for a in range(10)]


def test_rows_at_the_beginning_of_a_fragment_can_be_skipped(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": range(10)}), tmp_path / "x.parquet")
    source = parquet_source(tmp_path)
    (fragment,) = source.fragments()
    for skip in range(12):
        assert [row["a"] for block in source.read(fragment, skip=skip) for row in block.to_pylist()] == [
            *range(skip, 10)
        ]


def test_columns_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": ["x"], "c": [{"d": 1}]}), tmp_path / "x.parquet")
    assert read(parquet_source(tmp_path, ["c", "a"])).column_names == ["c", "a"]
    assert read(parquet_source(tmp_path).select([])).shape == (1, 0)
    with pytest.raises(DataError, match=r"parquet .* has no column 'z'; it has a, b, c"):
        parquet_source(tmp_path, ["z"]).schema()


def test_files_with_other_columns_are_read_as_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([1], pa.int32()), "b": ["x"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"c": [True], "a": pa.array([2], pa.int64())}), tmp_path / "2.parquet")
    source = parquet_source(tmp_path)
    assert source.schema() == pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.bool_())])
    assert rows(source) == [{"a": 1, "b": "x", "c": None}, {"a": 2, "b": None, "c": True}]
    assert rows(source.where(pc.field("c") & (pc.field("a") > 1)).select(["b"])) == [{"b": None}]


def test_files_whose_columns_do_not_fit_together_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "2.parquet")
    message = r"the column 'a' is int64 in .*1\.parquet, but string in .*2\.parquet; read them one by one"
    with pytest.raises(DataError, match=message):
        parquet_source(tmp_path).schema()


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello, world")
    with pytest.raises(DataError, match=r"x\.parquet can't be read as Parquet"):
        parquet_source(tmp_path).schema()


def test_a_condition_reads_only_the_row_groups_that_may_hold_such_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": range(100), "b": ["x"] * 100}), tmp_path / "x.parquet", row_group_size=10)
    source = parquet_source(tmp_path).where(pc.field("a") >= 55)
    assert len(list(source.fragments())) == 5
    assert source.count() is None
    assert read(source.select(["b"])).num_rows == 45
    assert source.where(pc.field("a") < 58) is None


def test_a_condition_on_what_is_not_there_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"\(z > 1\) can't be computed on the columns a, b: No match"):
        read(parquet_source(tmp_path).where(pc.field("z") > 1))
    with pytest.raises(DataError, match="a is int64, no condition"):
        read(parquet_source(tmp_path).where(pc.field("a")))
    with pytest.raises(DataError, match=r"\(b > 1\) can't be computed on the columns a: No match"):
        read(parquet_source(tmp_path, ["a"]).where(pc.field("b") > 1))


def test_an_empty_file_has_a_schema_and_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.int8())}), tmp_path / "x.parquet")
    assert read(parquet_source(tmp_path)) == pa.table({"a": pa.array([], pa.int8())})


def test_a_huge_row_group_is_read_in_blocks_of_a_few_megabytes(tmp_path: Path) -> None:
    text = ["x" * 1000 + str(n) for n in range(40_000)]
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet", use_dictionary=False)
    source = parquet_source(tmp_path)
    (fragment,) = source.fragments()
    assert max(block.nbytes for block in source.read(fragment)) < 10 << 20


@pytest.mark.parametrize(
    "condition",
    [
        ~(pc.field("f") > 5),
        pc.field("f") != 6,
        (pc.field("f") > 5) == pc.scalar(False),
        (pc.field("f") > 5) == (pc.field("n") < 0),
    ],
)
def test_a_row_with_nan_is_found_though_statistics_leave_it_out(tmp_path: Path, condition: pc.Expression) -> None:
    pq.write_table(pa.table({"f": [6.0, math.nan], "n": [0, 1]}), tmp_path / "x.parquet")
    assert [row["n"] for row in rows(parquet_source(tmp_path).where(condition))] == [1]


NUMBERS = st.one_of(st.none(), st.integers(-3, 3))
FLOATS = st.one_of(st.none(), st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0, math.nan, math.inf]))
CONDITIONS = st.recursive(
    st.one_of(
        st.builds(
            lambda column, compare, value: compare(pc.field(column), value),
            st.sampled_from(["i", "f"]),
            st.sampled_from([
                lambda a, b: a < b,
                lambda a, b: a <= b,
                lambda a, b: a == b,
                lambda a, b: a != b,
                lambda a, b: a > b,
                lambda a, b: a.isin([b, 7]),
                lambda a, b: a.is_null() | (a > b),
            ]),
            st.sampled_from([-1, 0, 1, 2]),
        ),
        st.builds(lambda compare: compare(pc.field("i"), pc.field("f")), st.sampled_from([lambda a, b: a < b])),
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda a, b: a == b, inner, inner),
    ),
    max_leaves=4,
)


@given(st.lists(st.tuples(NUMBERS, FLOATS), max_size=12), st.integers(1, 4), CONDITIONS)
def test_a_condition_gives_exactly_the_rows_that_filtering_gives(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[Any, Any]], group: int, condition: pc.Expression
) -> None:
    """Also where arrow's pruning by statistics is wrong: they leave NaN out."""
    table = pa.table({
        "i": pa.array([i for i, _ in values], pa.int64()),
        "f": pa.array([f for _, f in values], pa.float64(), from_pandas=False),
        "n": range(len(values)),
    })
    path = tmp_path_factory.mktemp("exact") / "x.parquet"
    pq.write_table(table, path, row_group_size=group)
    assert read(parquet_source(path).where(condition).select(["n"])) == table.filter(condition).select(["n"])
