"""All-to-all operations: what they give, that types come back as they were, and that nothing stays behind."""

from __future__ import annotations

import datetime
import decimal
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import cmp_to_key
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arun.data import read_parquet
from arun.data.barriers import (
    Limits,
    Relation,
    aggregate,
    distinct,
    join,
    joined_schema,
    random_shuffle,
    repartition,
    sort,
)
from arun.errors import ArunError, DataError, MisuseError

from .blocks import cut, rows_of, table_of

pytestmark = pytest.mark.anyio

NOW = datetime.datetime(2026, 11, 26, 19, 30, 15, 123456, datetime.UTC)
SMALL = Limits(memory=2**20)

COLUMNS = {
    "null": pa.nulls(3),
    "float16": pa.array([1.5, None, -2.0], pa.float16()),
    "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "date64": pa.array([86_400_000, None, 0], pa.date64()),
    "time32": pa.array([1, None, 2], pa.time32("ms")),
    "time64": pa.array([1, None, 2], pa.time64("ns")),
    "naive": pa.array([1, None, 2], pa.timestamp("ns")),
    "zoned": pa.array([NOW, None, NOW], pa.timestamp("us", "Europe/Berlin")),
    "zoned nanoseconds": pa.array([1, None, 2], pa.timestamp("ns", "+02:00")),
    "duration": pa.array([1, None, 2], pa.duration("ns")),
    "large string": pa.array(["ä", None, ""], pa.large_string()),
    "string view": pa.array(["ä", None, ""], pa.string_view()),
    "binary": pa.array([b"\x00\xff", None, b""]),
    "fixed binary": pa.array([b"abcd", None, b"efgh"], pa.binary(4)),
    "decimal32": pa.array([decimal.Decimal("1.25"), None, None], pa.decimal32(5, 2)),
    "decimal128": pa.array([decimal.Decimal("1.25"), None, None], pa.decimal128(38, 2)),
    "decimal256": pa.array([decimal.Decimal("1.25"), None, None], pa.decimal256(38, 2)),
    "list": pa.array([[NOW], None, []], pa.list_(pa.field("x", pa.timestamp("ms", "UTC"), nullable=False))),
    "large list": pa.array([["a"], None, [None]], pa.large_list(pa.large_string())),
    "fixed list": pa.array([[1, 2], None, [None, 3]], pa.list_(pa.int8(), 2)),
    "struct": pa.array([{"a": NOW, "b": {"c": 1}}, None, {"a": None, "b": None}]),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.duration("s"))),
    "dictionary": pa.array(["a", None, "b"]).cast(pa.dictionary(pa.int8(), pa.string())),
    "dictionary of times": pa.array([NOW, None, NOW], pa.timestamp("us", "UTC")).dictionary_encode(),
    "list of dictionaries": pa.array([["a"], None, []]).cast(pa.list_(pa.dictionary(pa.int16(), pa.string()))),
    "uuid": pa.array([b"0123456789abcdef", None, b"0123456789abcdef"], pa.uuid()),
}


@pytest.mark.parametrize("kind", COLUMNS)
async def test_a_column_comes_back_as_it_was(kind: str) -> None:
    fields = [
        pa.field("x", COLUMNS[kind].type, metadata={"unit": "none"}),
        pa.field("at", pa.int64(), nullable=False),
    ]
    table = pa.table([COLUMNS[kind], pa.array([2, 0, 1])], schema=pa.schema(fields, metadata={"of": "all"}))
    ordered = await table_of(sort(Relation.of_blocks(cut(table, 1)), ["at"]))
    assert ordered is not None
    assert ordered.schema.equals(table.schema, check_metadata=True)
    assert ordered.to_pylist() == [table.to_pylist()[row] for row in (1, 2, 0)]


@pytest.mark.parametrize("kind", [kind for kind in COLUMNS if kind != "null"])
async def test_a_column_can_be_a_key_whatever_its_type(kind: str) -> None:
    table = pa.table({"x": COLUMNS[kind], "n": [1, 2, 3]})
    groups = await rows_of(aggregate(Relation.of_blocks(cut(table, 2)), ["x"], {"all": ("list", "x"), "n": "count"}))
    assert sum(group["n"] for group in groups) == 3
    for group in groups:
        assert group["all"] == [group["x"]] * group["n"]


async def test_an_unusual_type_is_refused_by_the_name_of_its_column() -> None:
    table = pa.table({"odd": pa.array([decimal.Decimal(1)], pa.decimal256(60, 0)), "at": [1]})
    with pytest.raises(MisuseError, match="column 'odd' is of type decimal256"):
        await rows_of(sort(Relation.of_blocks(cut(table)), ["at"]))


@pytest.mark.parametrize(
    "within", [pa.list_, lambda kind: pa.struct([("x", kind)]), lambda kind: pa.map_("int8", kind)]
)
async def test_dictionaries_of_numbers_are_refused_within_other_types(within: Any) -> None:
    table = pa.table({"odd": pa.nulls(1, within(pa.dictionary(pa.int8(), pa.int64()))), "at": [1]})
    with pytest.raises(MisuseError, match=r"column 'odd' is of type .*, which can't travel through DuckDB"):
        await rows_of(sort(Relation.of_blocks(cut(table)), ["at"]))


async def test_values_of_many_dictionaries_come_back_in_dictionaries_that_hold_them() -> None:
    kind = pa.dictionary(pa.int8(), pa.string())
    blocks = [pa.record_batch({"x": pa.array([f"{n}-{i}" for i in range(100)]).cast(kind)}) for n in range(5)]

    async def source() -> AsyncIterator[pa.RecordBatch]:
        for block in blocks:
            yield block

    for result in (sort(Relation.of_blocks(source()), ["x"]), random_shuffle(source(), seed=1)):
        gathered = [block async for block in result]
        assert all(block.schema.field("x").type == kind for block in gathered)
        assert Counter(x for b in gathered for x in b.column(0).to_pylist()) == Counter(
            x for b in blocks for x in b.column(0).to_pylist()
        )


NUMBERS = st.one_of(st.none(), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]))
ROWS = st.lists(st.tuples(NUMBERS, st.sampled_from(["", "a", "B", "ä", None])), max_size=12)


def compare(descending: bool, nulls: str) -> Any:
    def key(value: Any) -> Any:
        return (1, 0.0) if isinstance(value, float) and math.isnan(value) else (0, value)

    def order(one: Any, other: Any) -> int:
        if one is None or other is None:
            last = 1 if nulls == "last" else -1
            return last * ((one is None) - (other is None))
        a, b = key(one), key(other)
        return (-1 if descending else 1) * ((a > b) - (a < b))

    return order


@given(ROWS, st.integers(1, 5), st.tuples(st.booleans(), st.booleans()), st.sampled_from(["first", "last"]))
@settings(max_examples=25)
def test_sort_orders_as_python_does_and_leaves_equal_rows_in_their_order(
    rows: list[Any], size: int, descending: tuple[bool, bool], nulls: Any
) -> None:
    numbered = [{"x": x, "s": s, "n": n} for n, (x, s) in enumerate(rows)]
    schema = pa.schema({"x": pa.float64(), "s": pa.string(), "n": pa.int64()})
    table = pa.Table.from_pylist(numbered, schema=schema)
    got = anyio.run(
        rows_of, sort(Relation.of_blocks(cut(table, size), schema), ["x", "s"], descending=descending, nulls=nulls)
    )
    by_s = sorted(numbered, key=cmp_to_key(lambda a, b: compare(descending[1], nulls)(a["s"], b["s"])))
    expected = sorted(by_s, key=cmp_to_key(lambda a, b: compare(descending[0], nulls)(a["x"], b["x"])))
    assert [row["n"] for row in got] == [row["n"] for row in expected]


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.one_of(st.none(), st.integers(-9, 9))), max_size=12),
    st.integers(1, 4),
)
@settings(max_examples=25)
def test_aggregate_computes_what_python_does(rows: list[tuple[Any, Any]], size: int) -> None:
    schema = pa.schema({"k": pa.string(), "x": pa.int16()})
    table = pa.Table.from_pylist([{"k": k, "x": x} for k, x in rows], schema=schema)
    got = anyio.run(
        rows_of,
        aggregate(
            Relation.of_blocks(cut(table, size), schema),
            ["k"],
            {
                "rows": "count",
                "count": ("count", "x"),
                "sum": ("sum", "x"),
                "min": ("min", "x"),
                "max": ("max", "x"),
                "first": ("first", "x"),
                "last": ("last", "x"),
                "list": ("list", "x"),
                "different": ("count_distinct", "x"),
            },
        ),
    )
    groups: dict[Any, list[Any]] = {}
    for k, x in rows:
        groups.setdefault(k, []).append(x)
    expected = {}
    for k, xs in groups.items():
        known = [x for x in xs if x is not None]
        expected[k] = {
            "k": k,
            "rows": len(xs),
            "count": len(known),
            "sum": sum(known) if known else None,
            "min": min(known, default=None),
            "max": max(known, default=None),
            "first": xs[0],
            "last": xs[-1],
            "list": xs,
            "different": len(set(known)),
        }
    assert {group["k"]: group for group in got} == expected


async def test_aggregations_have_the_types_that_their_columns_ask_for() -> None:
    table = pa.table({
        "b": [True, False],
        "u": pa.array([1, 2], pa.uint8()),
        "f": pa.array([1.0, 2.0], pa.float32()),
        "d": pa.array([decimal.Decimal("0.10")] * 2, pa.decimal128(5, 2)),
        "t": pa.array([3, 4], pa.duration("s")),
        "z": pa.array([NOW] * 2, pa.timestamp("ms", "Asia/Tokyo")),
    })
    wanted = {
        "b": ("sum", "b"),
        "u": ("sum", "u"),
        "f": ("sum", "f"),
        "d": ("sum", "d"),
        "t": ("sum", "t"),
        "z": ("max", "z"),
        "mean": ("mean", "d"),
        "median": ("median", "u"),
        "q": ("quantile", "u", 0.25),
        "std": ("std", "u"),
        "any": ("any", "b"),
        "all": ("all", "b"),
    }
    (row,) = (got := await table_of(aggregate(Relation.of_blocks(cut(table)), [], wanted))).to_pylist()
    assert [str(t) for t in got.schema.types] == [
        *("int64", "uint64", "double", "decimal128(38, 2)", "duration[s]", "timestamp[ms, tz=Asia/Tokyo]"),
        *("double", "double", "double", "double", "bool", "bool"),
    ]
    assert (row["b"], row["u"], row["f"], row["d"]) == (1, 3, 3.0, decimal.Decimal("0.20"))
    assert (row["t"], row["median"], row["q"], row["std"]) == (datetime.timedelta(seconds=7), 1.5, 1.25, 0.5**0.5)
    assert (row["any"], row["all"]) == (True, False)


async def test_no_rows_are_one_group_without_keys_and_no_group_with_keys() -> None:
    nothing = pa.table({"x": pa.array([], pa.int64())})
    for schema in (nothing.schema, None):
        (row,) = await rows_of(
            aggregate(Relation.of_blocks(cut(nothing), schema), [], {"n": "count", "s": ("sum", "x")})
        )
        assert row == {"n": 0, "s": None}
        assert not await rows_of(aggregate(Relation.of_blocks(cut(nothing), schema), ["x"], {"n": "count"}))


async def test_a_sum_that_64_bits_do_not_hold_is_an_error() -> None:
    table = pa.table({"x": [2**63 - 1, 1]})
    with pytest.raises(Exception, match="INT64"):
        await rows_of(aggregate(Relation.of_blocks(cut(table)), [], {"s": ("sum", "x")}))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mode", "no aggregation 'mode'"),
        ("sum", "computed of a column"),
        (("quantile", "x"), "takes a number"),
        (("quantile", "x", 2.0), "from 0 to 1"),
    ],
)
async def test_an_aggregation_that_is_none_is_refused_where_it_is_written(spec: Any, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        aggregate(Relation.of_blocks(cut(pa.table({"x": [1]}))), [], {"y": spec})


async def test_an_aggregation_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(MisuseError, match="sum can't be computed of column 'x', which is of type string"):
        await rows_of(aggregate(Relation.of_blocks(cut(pa.table({"x": ["a"]}))), [], {"y": ("sum", "x")}))
    with pytest.raises(MisuseError, match="there is no column 'y'; the columns are 'x'"):
        await rows_of(aggregate(Relation.of_blocks(cut(pa.table({"x": ["a"]}))), ["y"], {"n": "count"}))


async def test_distinct_keeps_the_first_of_equal_rows(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 1, None, None], "b": [1, 2, 3, 4, 5]})
    got = await rows_of(distinct(Relation.of_blocks(cut(table, 1)), ["a"]))
    assert sorted(row["b"] for row in got) == [1, 2, 4]
    odd = pa.table({
        "x": pa.chunked_array([[0.0, math.nan, None], [-0.0, -math.nan, None]]),
        "n": pa.chunked_array([[0, None, 2], [3, 4, 5]]),
    })
    paths = [str(tmp_path / f"{part}.parquet") for part in range(2)]
    for part, path in enumerate(paths):
        pq.write_table(odd.slice(3 * part, 3), path)
    scanned = Relation.of_files(paths, odd.schema)
    assert scanned is not None
    for relation in (scanned, Relation.of_blocks(cut(odd, 2))):
        assert sorted(str(row["n"]) for row in await rows_of(distinct(relation, ["x"]))) == ["0", "2", "None"]
    twice = pa.table({"x": [math.nan, math.nan, None, None, 1.0]})
    assert len(await rows_of(distinct(Relation.of_blocks(cut(twice, 2))))) == 3


KEYS = st.lists(st.sampled_from([None, 1, 2, 3]), max_size=6)


@given(KEYS, KEYS, st.sampled_from(["inner", "left", "right", "outer", "semi", "anti", "cross"]))
@settings(max_examples=40)
def test_join_matches_as_nested_loops_do(left: list[Any], right: list[Any], how: Any) -> None:
    one = pa.table({"k": pa.array(left, pa.int32()), "a": pa.array(range(len(left)), pa.int64())})
    other = pa.table({"j": pa.array(right, pa.int64()), "a": pa.array(range(len(right)), pa.int64())})
    on = {} if how == "cross" else {"k": "j"}
    blocks = join(Relation.of_blocks(cut(one, 2), one.schema), Relation.of_blocks(cut(other, 2), other.schema), on, how)
    got = anyio.run(rows_of, blocks)

    pairs = [(i, j) for i, k in enumerate(left) for j, m in enumerate(right) if how == "cross" or k == m is not None]
    matched, wanted = ({i for i, _ in pairs}, {j for _, j in pairs}), {(i, j) for i, j in pairs}
    if how in {"left", "outer"}:
        wanted |= {(i, None) for i in range(len(left)) if i not in matched[0]}
    if how in {"right", "outer"}:
        wanted |= {(None, j) for j in range(len(right)) if j not in matched[1]}
    if how in {"semi", "anti"}:
        assert sorted(row["a"] for row in got) == [i for i in range(len(left)) if (i in matched[0]) == (how == "semi")]
        return
    assert Counter((row["a"], row["a_right"]) for row in got) == Counter(wanted)
    if how != "cross":
        keys = {(i, j): left[i] if i is not None else right[j] for i, j in wanted}
        assert all(row["k"] == keys[row["a"], row["a_right"]] for row in got)


async def test_the_schema_of_a_join_is_known_before() -> None:
    one = pa.schema([pa.field("k", pa.int32(), nullable=False), pa.field("a", pa.string())])
    other = pa.schema({"k": pa.int64(), "a": pa.uint8(), "b": pa.bool_()})
    assert joined_schema(one, other, "k", "left") == pa.schema({
        "k": pa.int64(),
        "a": pa.string(),
        "a_right": pa.uint8(),
        "b": pa.bool_(),
    })
    with pytest.raises(MisuseError, match="cast one of them"):
        joined_schema(one, pa.schema({"k": pa.string()}), "k")
    with pytest.raises(MisuseError, match="two columns would be called 'a'"):
        joined_schema(one, other, "k", suffix="")
    with pytest.raises(MisuseError, match="takes inner, left"):
        joined_schema(one, other, "k", "full")  # type: ignore[arg-type]  # the mistake


async def test_columns_may_have_any_name() -> None:
    names = ["a", "A", 'a"b', "select", "x y;--", "c0", "r", "", "ä'"]
    table = pa.table([pa.array([2, 1, i]) for i in range(len(names))], names=names)
    for name in names:
        got = await table_of(sort(Relation.of_blocks(cut(table, 2)), [name]))
        assert got.column_names == names
        assert got.column(name).to_pylist() == sorted(table.column(name).to_pylist())


def scanned(path: Path, table: pa.Table) -> tuple[Relation | None, pa.Table]:
    half = len(table) // 2
    paths = [str(path / "it's one.parquet"), str(path / "two.parquet")]
    for name, part in zip(paths, (table.slice(0, half), table.slice(half)), strict=True):
        pq.write_table(part, name, row_group_size=2)
    return Relation.of_files(paths, table.schema), table


async def test_files_are_scanned_to_the_same_as_their_blocks(tmp_path: Path) -> None:
    names = [n for n in ("uint64", "zoned", "large string", "binary", "decimal128", "large list") if n in COLUMNS]
    table = pa.table({**{n: pa.concat_arrays([COLUMNS[n]] * 2) for n in names}, "k": [1, 0, 1, 0, 1, 0], "n": range(6)})
    files, table = scanned(tmp_path, table)
    assert files is not None
    for operation in (
        lambda rows: sort(rows, ["k"], descending=True),
        lambda rows: sort(rows, ["zoned", "n"]),
        lambda rows: distinct(rows, ["zoned"]),
        lambda rows: aggregate(rows, ["k"], {"l": ("list", "zoned"), "f": ("last", "n"), "m": ("max", "zoned")}),
        lambda rows: join(rows, Relation.of_blocks(cut(table.select(["zoned", "n"]))), "zoned", "left"),
    ):
        one = await table_of(operation(files))
        other = await table_of(operation(Relation.of_blocks(cut(table, 4))))
        assert one.schema == other.schema
        order = [
            (name, "ascending") for name in other.column_names if not pa.types.is_nested(other.schema.field(name).type)
        ]
        assert one.sort_by(order).to_pylist() == other.sort_by(order).to_pylist()


@pytest.mark.parametrize(
    ("paths", "schema"),
    [
        (["a*.parquet"], {"x": pa.int64()}),
        (["s3://bucket/a.parquet"], {"x": pa.int64()}),
        (["a.parquet"], {"x": pa.timestamp("ns", "UTC")}),
        (["a.parquet"], {"x": pa.int64(), "X": pa.int64()}),
        ([], {"x": pa.int64()}),
    ],
)
async def test_files_that_duckdb_would_read_otherwise_are_not_scanned(paths: list[str], schema: Any) -> None:
    assert Relation.of_files(paths, pa.schema(schema)) is None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    """Where operations put what they spill, which they have to remove."""
    yield str(tmp_path)
    assert not list(tmp_path.iterdir())


def files(folder: str) -> list[Path]:
    return [path for path in Path(folder).rglob("*") if path.is_file()]


async def test_files_of_several_schemas_are_sorted_as_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([3, 2], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([2**40, 1], pa.int64()), "y": ["b", "c"]}), tmp_path / "b.parquet")
    rows = await read_parquet(tmp_path).sort("x").collect()
    assert rows.to_pydict() == {"x": [1, 2, 3, 2**40], "y": ["c", None, None, "b"]}


async def test_what_does_not_fit_is_spilled_and_removed(folder: str) -> None:
    numbers = pa.array(range(800_000))
    table = pa.table({
        "x": pc.subtract(799_999, numbers),
        "s": pc.binary_join_element_wise(numbers.cast("string"), "x" * 30, "-"),
    })
    limits = Limits(memory=32 * 2**20, threads=1, folder=folder)
    last, spilled = -1, False
    async for block in sort(Relation.of_blocks(cut(table, 20_000)), ["x"], limits=limits):
        spilled = spilled or bool(files(folder))
        assert block.column(0)[0].as_py() == last + 1
        last = block.column(0)[-1].as_py()
    assert last == 799_999
    assert spilled


async def test_what_does_not_fit_even_so_is_an_error_with_the_limit(folder: str) -> None:
    table = pa.table({"x": pa.array(range(400_000))})
    limits = Limits(memory=2**20, threads=1, folder=folder)
    with pytest.raises(ArunError, match="memory limit of 1,048,576 bytes"):
        await rows_of(aggregate(Relation.of_blocks(cut(table, 20_000)), [], {"l": ("list", "x")}, limits=limits))


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("when", ["feeding", "reading"])
async def test_a_cancelled_query_leaves_nothing(when: str, settled: bool, folder: str) -> None:
    table, limits = pa.table({"x": pa.array(range(100_000))}), Limits(folder=folder)
    with anyio.CancelScope() as scope:

        async def source() -> AsyncIterator[pa.RecordBatch]:
            for block in table.to_batches(1000):
                yield block
                if when == "feeding":
                    scope.cancel()
                    await anyio.sleep_forever()

        ordered = sort(Relation.of_blocks(source(), settled=settled), ["x"], limits=limits)
        async for _ in ordered:
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    await ordered.aclose()


async def test_a_running_query_is_interrupted(folder: str) -> None:
    many = pa.table({"x": pa.array(range(20_000))})
    rows = Relation.of_blocks(cut(many)), Relation.of_blocks(cut(many))
    # Two hundred million pairs, of which nobody has asked for the last.
    pairs = aggregate(Relation.of_blocks(join(*rows, how="cross")), ["x"], {"n": "count"}, limits=Limits(folder=folder))
    with anyio.move_on_after(0.3) as scope:
        await rows_of(pairs)
    assert scope.cancelled_caught


async def test_an_error_of_the_source_is_raised_as_it_is(folder: str) -> None:
    async def source() -> AsyncIterator[pa.RecordBatch]:
        yield pa.record_batch({"x": [1]})
        raise ValueError("no more rows")

    with pytest.raises(ValueError, match=r"^no more rows$"):
        await rows_of(sort(Relation.of_blocks(source()), ["x"], limits=Limits(folder=folder)))


async def widening() -> AsyncIterator[pa.RecordBatch]:
    """As Python's rows are: what comes later tells more about the types."""
    yield pa.record_batch({"x": [3], "error": pa.nulls(1)})
    yield pa.record_batch({"x": [1.5], "error": ["no"]})
    yield pa.record_batch({"x": [2], "later": [True]})


WIDENED = [
    {"x": 1.5, "error": "no", "later": None},
    {"x": 2.0, "error": None, "later": True},
    {"x": 3.0, "error": None, "later": None},
]


async def test_blocks_may_get_wider_as_they_come() -> None:
    assert await rows_of(sort(Relation.of_blocks(widening()), ["x"])) == WIDENED
    shuffled = await rows_of(random_shuffle(widening(), seed=1))
    assert sorted(shuffled, key=lambda row: row["x"]) == WIDENED
    (block,) = [block async for block in repartition(widening(), count=1)]
    assert sorted(block.to_pylist(), key=lambda row: row["x"]) == WIDENED


async def test_blocks_that_do_not_go_together_are_told_apart() -> None:
    async def source() -> AsyncIterator[pa.RecordBatch]:
        yield pa.record_batch({"x": [1]})
        yield pa.record_batch({"x": ["one"]})

    with pytest.raises(DataError, match="int64 in block 0, but string in block 1"):
        await rows_of(sort(Relation.of_blocks(source()), ["x"]))
    with pytest.raises(DataError, match="x: string where those before it had x: int64"):
        await rows_of(sort(Relation.of_blocks(source(), settled=True), ["x"]))
    with pytest.raises(DataError, match="int64 in block 0, but string in block 1"):
        await rows_of(random_shuffle(source()))


async def test_a_query_that_is_left_half_way_leaves_nothing(folder: str) -> None:
    table = pa.table({"x": pa.array(range(100_000))})
    ordered = sort(Relation.of_blocks(cut(table, 1000)), ["x"], limits=Limits(folder=folder))
    assert len(await anext(ordered)) > 0
    await ordered.aclose()


@given(st.integers(0, 500), st.integers(1, 100), st.integers(1, 100), st.integers(0, 3))
@settings(max_examples=25)
def test_a_shuffle_depends_on_the_seed_and_the_rows_alone(rows: int, size: int, other: int, seed: int) -> None:
    table = pa.table({"x": pa.array(range(rows), pa.int64())})
    one = anyio.run(rows_of, random_shuffle(cut(table, size), seed=seed))
    assert one == anyio.run(rows_of, random_shuffle(cut(table, other, size), seed=seed))
    assert sorted(row["x"] for row in one) == list(range(rows))


async def test_a_shuffle_that_spills_gives_the_same_order() -> None:
    table = pa.table({"x": pa.array(range(400_000)), "s": pa.array(["some text"] * 400_000)})
    one = await table_of(random_shuffle(cut(table, 30_000), seed=7))
    spilled = await table_of(random_shuffle(cut(table, 70_000), seed=7, limits=SMALL))
    assert spilled.combine_chunks().equals(one.combine_chunks())
    assert len(set(pc.subtract(one.column("x"), pa.array(range(400_000))).to_pylist())) > 250_000


async def test_without_a_seed_every_shuffle_is_another() -> None:
    table = pa.table({"x": pa.array(range(1000))})
    assert await rows_of(random_shuffle(cut(table))) != await rows_of(random_shuffle(cut(table)))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=25)
def test_repartition_cuts_the_same_rows_anew(rows: int, size: int, count: int) -> None:
    table = pa.table({"x": pa.array(range(rows), pa.int64())})

    async def blocks(**how: Any) -> list[list[int]]:
        return [block.column(0).to_pylist() async for block in repartition(cut(table, size), **how, limits=SMALL)]

    counted, rowed = anyio.run(lambda: blocks(count=count)), anyio.run(lambda: blocks(rows=count))
    for got in (counted, rowed):
        assert [x for block in got for x in block] == list(range(rows))
    assert len(counted) == min(count, rows)
    assert not counted or max(map(len, counted)) - min(map(len, counted)) <= 1
    assert all(len(block) == count for block in rowed[:-1])


async def test_repartition_takes_one_of_its_options() -> None:
    with pytest.raises(MisuseError, match="give one of them"):
        await rows_of(repartition(cut(pa.table({"x": [1]}))))
    with pytest.raises(MisuseError, match="at least 1"):
        await rows_of(repartition(cut(pa.table({"x": [1]})), rows=0))
