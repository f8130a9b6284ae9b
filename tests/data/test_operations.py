"""What each operation of a dataset does to rows."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from arun import MisuseError, ProcessExecutor
from arun.data import (
    Dataset,
    RunOptions,
    from_arrow,
    from_iterable,
    from_pandas,
    from_ray,
    from_rows,
    read,
    read_csv,
    read_ipc,
    read_jsonl,
    read_parquet,
)
from arun.data.source import Fragment
from arun.errors import DataError

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]
Row = dict[str, Any]


def numbers(n: int) -> Dataset:
    return from_rows([{"n": i} for i in range(n)])


async def rows_of(dataset: Dataset) -> list[Row]:
    return [row async for row in dataset.rows()]


def double(row: Row) -> Row:
    return {"n": row["n"] * 2}


async def double_async(row: Row) -> Row:
    return double(row)


async def same_async(row: Row) -> Row:
    return row


def twice(row: Row) -> Iterator[Row]:
    yield row
    yield row


async def twice_async(row: Row) -> AsyncIterator[Row]:
    yield row
    yield row


@pytest.mark.parametrize("function", [double, double_async])
async def test_map_gives_a_row_for_each_row(function: Any) -> None:
    assert await rows_of(numbers(3).map(function)) == [{"n": 0}, {"n": 2}, {"n": 4}]


@pytest.mark.parametrize("function", [twice, twice_async])
async def test_map_of_a_generator_gives_all_that_it_yields(function: Any) -> None:
    assert await rows_of(numbers(2).map(function)) == [{"n": 0}, {"n": 0}, {"n": 1}, {"n": 1}]


async def test_flat_map_takes_a_function_that_returns_rows() -> None:
    assert await rows_of(numbers(3).flat_map(lambda row: [row] * row["n"])) == [{"n": 1}, {"n": 2}, {"n": 2}]


async def test_filter_takes_a_function_a_coroutine_function_or_an_expression() -> None:
    async def large(row: Row) -> bool:
        return row["n"] > 1

    expected = [{"n": 2}, {"n": 3}]
    assert await rows_of(numbers(4).filter(lambda row: row["n"] > 1)) == expected
    assert await rows_of(numbers(4).filter(large)) == expected
    assert await rows_of(numbers(4).filter(pc.field("n") > 1)) == expected


async def test_with_column_adds_or_replaces_a_column() -> None:
    table = await numbers(2).with_column("m", lambda row: row["n"] + 1).with_column("n", pc.field("n") * 10).collect()
    assert table.to_pylist() == [{"n": 0, "m": 1}, {"n": 10, "m": 2}]


async def test_columns_are_selected_dropped_and_renamed() -> None:
    dataset = from_rows([{"a": 1, "b": 2, "c": 3}])
    assert await rows_of(dataset.select("c", "a")) == [{"c": 3, "a": 1}]
    assert await rows_of(dataset.drop("b")) == [{"a": 1, "c": 3}]
    assert await rows_of(dataset.rename({"a": "x"})) == [{"x": 1, "b": 2, "c": 3}]


@pytest.mark.parametrize("step", ["select", "drop", "rename"])
@pytest.mark.parametrize("after_a_function", [False, True])
async def test_a_column_that_is_not_there_is_named_with_those_that_are(step: str, after_a_function: bool) -> None:
    dataset = numbers(2).map(double) if after_a_function else numbers(2)
    dataset = dataset.rename({"x": "y"}) if step == "rename" else getattr(dataset, step)("x")
    with pytest.raises(DataError, match=r"x.*; the columns are n"):
        await dataset.collect()


async def test_map_batches_takes_and_gives_arrow_numpy_or_pandas() -> None:
    def arrow(batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.set_column(0, "n", pc.add(batch["n"], 1))

    def numpy(batch: dict[str, Any]) -> dict[str, Any]:
        return {"n": batch["n"] + 1}

    def pandas(frame: Any) -> Any:
        return frame + 1

    expected = [{"n": 1}, {"n": 2}]
    assert await rows_of(numbers(2).map_batches(arrow)) == expected
    assert await rows_of(numbers(2).map_batches(numpy, format="numpy")) == expected
    assert await rows_of(numbers(2).map_batches(pandas, format="pandas")) == expected


async def test_nulls_of_pandas_are_nulls() -> None:
    import pandas as pd

    def parse(row: Row) -> Row:
        text = "2026-01-01" if row["n"] else "never"
        return {"at": pd.to_datetime(text, errors="coerce"), "size": 1 if row["n"] else pd.NA}

    assert await rows_of(numbers(2).map(parse)) == [
        {"at": None, "size": None},
        {"at": datetime.datetime(2026, 1, 1), "size": 1},
    ]


async def test_map_batches_takes_and_gives_tensors() -> None:
    torch = pytest.importorskip("torch")

    def embed(batch: dict[str, Any]) -> dict[str, Any]:
        vectors = torch.ones(2, 3, requires_grad=True) * batch["n"][:, None]
        return {"n": batch["n"] + 1, "v": vectors, "half": vectors.to(torch.bfloat16)}

    table = await numbers(2).map_batches(embed, format="torch").collect()
    assert table.schema.types == [pa.int64(), pa.list_(pa.float32(), 3), pa.list_(pa.float32(), 3)]
    assert table.to_pylist() == [
        {"n": 1, "v": [0, 0, 0], "half": [0, 0, 0]},
        {"n": 2, "v": [1, 1, 1], "half": [1, 1, 1]},
    ]


async def test_map_batches_takes_generators_and_async_functions() -> None:
    def halves(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        yield batch.slice(1)
        yield batch.slice(0, 1)

    async def same(batch: pa.RecordBatch) -> pa.Table:
        return pa.Table.from_batches([batch])

    async def halves_async(batch: pa.RecordBatch) -> AsyncIterator[pa.RecordBatch]:
        for half in halves(batch):
            yield half

    swapped = [{"n": 1}, {"n": 0}]
    assert await rows_of(numbers(2).map_batches(halves)) == swapped
    assert await rows_of(numbers(2).map_batches(same)) == [{"n": 0}, {"n": 1}]
    assert await rows_of(numbers(2).map_batches(halves_async)) == swapped


async def test_a_batch_size_is_kept_to_whatever_the_blocks_are() -> None:
    sizes: list[int] = []

    def note(batch: pa.RecordBatch) -> pa.RecordBatch:
        sizes.append(batch.num_rows)
        return batch

    blocks = from_iterable(lambda: (pa.table({"n": list(range(size))}) for size in (1, 5, 2, 3)))
    assert await blocks.map_batches(note, batch_size=4).count() == 11
    assert sizes == [4, 4, 3]


async def test_a_tensor_becomes_a_column_of_lists_of_fixed_length() -> None:
    import numpy as np

    dataset = numbers(2).map_batches(lambda batch: {"v": np.ones((2, 3, 2))}, format="numpy")
    table = await dataset.collect()
    assert table.schema.field("v").type == pa.list_(pa.list_(pa.float64(), 2), 3)
    assert table.num_rows == 2


async def test_limit_keeps_the_first_rows() -> None:
    assert await rows_of(numbers(5).limit(2)) == [{"n": 0}, {"n": 1}]
    assert await rows_of(numbers(5).limit(0)) == []
    assert await rows_of(numbers(2).limit(9)) == [{"n": 0}, {"n": 1}]


async def test_what_comes_after_a_limit_is_given_many_rows_at_a_time() -> None:
    rows = numbers(5000).limit(4000).flat_map(lambda row: [row, row])
    assert (await rows.collect()).num_rows == 8000
    assert rows.stats().stages[0].blocks < 100


async def test_inputs_of_a_union_overlap_but_for_what_a_limit_may_leave_out() -> None:
    begun = anyio.Event()

    async def second() -> AsyncIterator[Row]:
        begun.set()
        yield {"n": 1}

    async def first() -> AsyncIterator[Row]:
        yield {"n": 0}
        await begun.wait()

    both = from_iterable(first).union(from_iterable(second), numbers(1))
    assert await rows_of(both) == [{"n": 0}, {"n": 1}, {"n": 0}]
    begun = anyio.Event()
    assert await both.take(1) == [{"n": 0}]
    assert not begun.is_set()


async def test_union_gives_one_dataset_after_the_other() -> None:
    assert await rows_of(numbers(2).union(numbers(1), numbers(1))) == [{"n": 0}, {"n": 1}, {"n": 0}, {"n": 0}]


async def test_zip_puts_columns_side_by_side_whatever_the_blocks_are() -> None:
    left = from_iterable(lambda: [pa.table({"a": [0, 1, 2]}), pa.table({"a": [3]})])
    right = from_iterable(lambda: [pa.table({"b": [0]}), pa.table({"b": [1, 2, 3]})])
    assert await rows_of(left.zip(right)) == [{"a": i, "b": i} for i in range(4)]


async def test_zip_numbers_a_name_that_is_taken() -> None:
    assert await rows_of(numbers(1).zip(numbers(1))) == [{"n": 0, "n_1": 0}]


async def test_zip_refuses_sides_of_different_length() -> None:
    with pytest.raises(MisuseError, match=r"zip\(\): .* more rows"):
        await numbers(2).zip(numbers(3)).collect()


async def test_datasets_begin_with_rows_tables_and_iterables() -> None:
    async def trickle() -> AsyncIterator[Row]:
        yield {"n": 0}
        yield {"n": 1}

    expected = [{"n": 0}, {"n": 1}]
    assert await rows_of(from_rows(expected)) == expected
    assert await rows_of(from_arrow(pa.table({"n": [0, 1]}))) == expected
    assert await rows_of(from_iterable(expected)) == expected
    assert await rows_of(from_iterable(trickle)) == expected
    assert await rows_of(from_iterable(iter(expected))) == expected
    assert await rows_of(from_iterable([pa.record_batch({"n": [0]}), {"n": 1}])) == expected


async def test_an_iterator_is_read_once_and_a_function_for_every_run() -> None:
    once = from_iterable({"n": i} for i in range(2))
    assert await once.count() == 2
    with pytest.raises(MisuseError, match="is an iterator and was read by an earlier run"):
        await once.count()
    again = from_iterable(lambda: ({"n": i} for i in range(2)))
    assert [await again.count(), await again.count()] == [2, 2]


async def test_an_endless_iterable_is_read_as_far_as_is_needed() -> None:
    async def endless() -> AsyncIterator[Row]:
        n = 0
        while True:
            yield {"n": n}
            n += 1

    assert await from_iterable(endless).map(double).take(2) == [{"n": 0}, {"n": 2}]


async def test_a_dataset_is_read_as_blocks_rows_and_a_table() -> None:
    assert [block.num_rows async for block in numbers(3)] == [3]
    assert await rows_of(numbers(1)) == [{"n": 0}]
    assert (await numbers(2).collect()).to_pylist() == [{"n": 0}, {"n": 1}]
    assert await numbers(5).take(2) == [{"n": 0}, {"n": 1}]


async def test_nothing_in_gives_nothing_out() -> None:
    assert await rows_of(from_rows([]).map(double).filter(lambda row: True)) == []
    assert (await from_rows([]).collect()).num_rows == 0


async def test_a_table_without_rows_has_its_columns_still() -> None:
    table = await numbers(3).filter(lambda row: False).collect()
    assert (table.num_rows, table.column_names) == (0, ["n"])


@pytest.mark.parametrize("rows", ["an empty file", "a condition that holds for none", "a function that keeps none"])
async def test_no_rows_have_columns_still_whatever_comes_after(tmp_path: Path, rows: str) -> None:
    table = pa.table({"a": [1], "s": ["x"]})
    await (
        from_arrow(table.slice(0, 0) if rows == "an empty file" else table).write_parquet(tmp_path / "x.parquet").arun()
    )
    none = read_parquet(tmp_path / "x.parquet")
    if rows == "a condition that holds for none":
        none = none.filter(pc.field("a") > 5)
    elif rows == "a function that keeps none":
        none = none.filter(lambda row: False)
    for same in (
        none,
        none.sort("a"),
        none.distinct(),
        none.random_shuffle(),
        none.repartition(2),
        none.repartition(rows=2),
        none.map_batches(lambda frame: frame, format="pandas"),
        none.union(none),
    ):
        assert (await same.collect()).column_names == ["a", "s"]
        assert await same.count() == 0
    assert (await none.group_by("a").aggregate(rows="count").collect()).column_names == ["a", "rows"]
    assert (await none.join(from_arrow(table), "a").collect()).column_names == ["a", "s", "s_right"]
    assert (await none.zip(none).collect()).column_names == ["a", "s", "a_1", "s_1"]
    # Here nobody can know the columns; that is no reason to fail.
    assert await none.map(double).sort("a").take() == []


async def test_two_columns_of_one_name_are_no_row() -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    for lossy in (
        from_arrow(table).map(lambda row: row).arun(),
        from_arrow(table).map(double_async).arun(),
        from_arrow(table).take(1),
        anext(from_arrow(table).rows()),
    ):
        with pytest.raises(DataError, match="has two columns 'a'; rename one"):
            await lossy


async def test_names_of_columns_are_text() -> None:
    with pytest.raises(DataError, match=r"map\(.*\) gave a row with the key 1; names of columns are text"):
        await numbers(1).map(lambda row: {1: row["n"]}).collect()
    with pytest.raises(MisuseError, match=r"with_column\(\) was given an int, 3 for a name"):
        numbers(1).with_column(3, double)  # type: ignore[arg-type]  # a mistake


async def test_nanoseconds_survive_a_function_of_rows() -> None:
    times = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", "UTC"))
    table = pa.table({"at": times, "took": pa.array([1, None], pa.duration("ns"))})
    assert await from_arrow(table).map(lambda row: row).collect() == table
    assert await from_arrow(table).map(lambda row: row, schema=table.schema).collect() == table


async def test_a_data_frame_may_hold_a_column_in_pieces() -> None:
    def twice_over(frame: Any) -> Any:
        import pandas as pd

        return pd.concat([frame, frame])

    words = from_rows([{"s": "x"}, {"s": "y"}]).map_batches(twice_over, format="pandas")
    assert (await words.collect())["s"].to_pylist() == ["x", "y", "x", "y"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda rows: rows.limit("3"), r"limit\(rows='3'\): it must be a whole number"),
        (lambda rows: rows.map(double, concurrency=2.5), r"map\(concurrency=2.5\): it must be a whole number"),
        (lambda rows: rows.split(2.5), r"split\(2.5\): into at least 1, a whole number"),
        (lambda rows: rows.union([{"n": 1}]), r"union\(\) was given a list, .*; it takes datasets: from_rows\("),
        (lambda rows: rows.join(None, "n"), r"join\(\) was given None; it takes datasets"),
        (lambda rows: rows.join(rows, "n", "full"), r"join\(how='full'\): takes 'inner', 'left', "),
        (lambda rows: rows.sort("n", nulls="middle"), r"sort\(nulls='middle'\): takes 'first' or 'last'"),
        (lambda rows: rows.rename("n"), r"rename\(\) was given a str, 'n'; it takes a mapping, {'old': 'new'}"),
        (lambda rows: rows.explain(format="dot"), r"explain\(format='dot'\): takes 'text' or 'mermaid'"),
        (lambda rows: rows.write_jsonl("out/").group_by("n"), r"write jsonl out/ is a sink: run it"),
        (lambda rows: rows.group_by(["n"]), r"group_by\(\) was given a list, .*: group_by\('a', 'b'\)"),
        (lambda rows: rows.group_by("n").aggregate(x=3), r"3 is no aggregation; give 'count', or \('sum', column\)"),
        (
            lambda rows: rows.map(double, executor=ProcessExecutor),
            r"map\(executor=...\) was given a class, .*takes an Exec",
        ),
        (lambda rows: from_pandas(3), "int is no DataFrame of pandas"),
        (lambda rows: from_ray(3), "int is no Dataset of Ray"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_is_said(mistake: Any, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        mistake(numbers(3))


async def test_a_sum_that_is_too_large_is_told_without_its_sql() -> None:
    with pytest.raises(DataError, match=r"^aggregate: .*out of range") as caught:
        await from_rows([{"n": 2**62}] * 4).group_by().aggregate(n=("sum", "n")).collect()
    assert "SELECT" not in str(caught.value)


async def test_count_asks_nobody_who_need_not_be_asked() -> None:
    def never(row: Row) -> Row:
        raise AssertionError

    assert await numbers(5).map(never).select("n").limit(3).union(numbers(2)).count() == 5
    assert await numbers(5).filter(pc.field("n") > 2).count() == 2


async def test_schema_is_known_or_found_in_the_first_block() -> None:
    assert await from_arrow(pa.table({"a": [1], "b": ["x"]})).rename({"a": "c"}).drop("b").schema() == pa.schema([
        ("c", pa.int64())
    ])
    assert await numbers(3).map(lambda row: {"f": row["n"] / 2}).schema() == pa.schema([("f", pa.float64())])
    assert await from_rows([]).schema() is None


async def test_columns_that_come_later_are_null_before() -> None:
    dataset = numbers(3).map(lambda row: row if row["n"] < 2 else {**row, "late": "x"})
    assert [row.get("late") for row in await rows_of(dataset)] == [None, None, "x"]


async def test_types_become_as_wide_as_the_values_need() -> None:
    blocks = from_iterable(lambda: ({"v": value} for value in [None, 1, 2.5]))
    table = await blocks.map(lambda row: row).collect()
    assert table["v"].to_pylist() == [None, 1.0, 2.5]


async def test_values_that_do_not_fit_together_are_refused_by_column_and_step() -> None:
    with pytest.raises(DataError, match=r"column 'v' that map\(.*\) gave.*schema="):
        await numbers(2).map(lambda row: {"v": row["n"] or "x"}).collect()


async def test_a_schema_says_what_rows_become() -> None:
    schema = pa.schema([("n", pa.int8()), ("m", pa.string())])
    table = await numbers(2).map(lambda row: row, schema=schema).collect()
    assert table.schema == schema
    assert table.to_pylist() == [{"n": 0, "m": None}, {"n": 1, "m": None}]
    with pytest.raises(DataError, match="the column 'x', which schema= does not have"):
        await numbers(2).map(lambda row: {"x": 1}, schema=schema).collect()


@pytest.mark.parametrize("function", [double, double_async])
async def test_a_schema_holds_for_its_step_also_where_others_follow(function: Any) -> None:
    given = pa.schema([("n", pa.int32()), ("m", pa.string())])
    made = numbers(2).map(function, schema=given)
    assert (await made.select("n").collect()).to_pylist() == [{"n": 0}, {"n": 2}]
    assert (await made.drop("n").collect()).schema == pa.schema([("m", pa.string())])
    assert (await made.rename({"n": "k"}).collect()).column_names == ["k", "m"]
    assert (await made.filter(lambda row: True).collect()).schema == given


@pytest.mark.parametrize("concurrency", [None, 2])
async def test_a_filter_keeps_the_types_however_it_is_called(concurrency: int | None) -> None:
    async def kept(row: Row) -> bool:
        return row["n"] != 2

    columns = {"n": pa.int16(), "text": pa.dictionary(pa.int8(), pa.string()), "x": pa.float32(), "none": pa.date32()}
    rows = [{"n": 1, "text": "a", "x": float("nan"), "none": None}, {"n": 2, "text": "b", "x": 0.5, "none": None}]
    filtered = from_arrow(pa.Table.from_pylist(rows, pa.schema(list(columns.items())))).filter(
        kept, concurrency=concurrency
    )
    table = await filtered.collect()
    assert table.schema == await filtered.schema() == pa.schema(list(columns.items()))
    assert table.select(["n", "text", "none"]).to_pylist() == [{"n": 1, "text": "a", "none": None}]


@pytest.mark.parametrize("function", [lambda row: row, same_async])
async def test_types_that_values_do_not_tell_survive_a_function_of_rows(function: Any) -> None:
    kinds = {"pairs": pa.map_(pa.string(), pa.int64()), "texts": pa.map_(pa.string(), pa.string()), "id": pa.uint64()}
    rows = [{"pairs": [("a", n)], "texts": [("a", "b")], "id": n << 63} for n in (0, 1)]
    table = pa.Table.from_pylist(rows, pa.schema(list(kinds.items())))
    assert await from_arrow(table).repartition(rows=1).map(function).collect() == table


@pytest.mark.parametrize("library", ["numpy", "torch"])
async def test_arrays_of_any_shape_and_tensors_are_lists_in_lists(library: str) -> None:
    of = pytest.importorskip(library)
    images = [[[1, 2, 3], [4, 5, 6]], [[7]], [], None]

    def image(row: Row) -> Row:
        rows = images[row["n"]]
        many = np.array(rows or [], dtype=np.int16).reshape(len(rows or ()), -1 if rows else 0)
        return {"x": None if rows is None else of.as_tensor(many) if library == "torch" else many}

    made = await numbers(4).map(image).collect()
    assert made == pa.table({"x": pa.array(images, pa.list_(pa.list_(pa.int16())))})
    batches = numbers(4).map_batches(lambda batch: {"x": [image(row)["x"] for row in batch.to_pylist()]})
    assert await batches.collect() == made
    with pytest.raises(DataError, match="column 'x' that map"):
        await numbers(2).map(lambda row: {"x": np.array([["x"]]) if row["n"] else np.array([[1]])}).collect()


async def test_dates_of_numpy_are_dates() -> None:
    day = np.datetime64("2024-02-29")
    table = await numbers(2).map(lambda row: {"day": day if row["n"] else None}).collect()
    assert table == pa.table({"day": pa.array([None, datetime.date(2024, 2, 29)])})


@pytest.mark.parametrize("size", [None, 2])
async def test_a_stop_iteration_of_a_function_of_batches_is_told_as_such(size: int | None) -> None:
    def ends(batch: Any) -> Any:
        return next(iter(()))

    with pytest.raises(
        RuntimeError, match=r"map_batches\(.*ends\) raised StopIteration, which would end its rows early"
    ):
        await numbers(3).map_batches(ends, batch_size=size).collect()


async def test_whole_numbers_above_the_largest_int64_are_uint64() -> None:
    table = await from_rows([{"n": 1}, {"n": 2**64 - 1}, {"n": None}]).collect()
    assert table.equals(pa.table({"n": pa.array([1, 2**64 - 1, None], pa.uint64())}))
    with pytest.raises(DataError, match="'n' that from_rows"):
        await from_rows([{"n": 1.5}, {"n": 2**64 - 1}]).collect()


async def test_a_count_reads_no_columns_but_those_of_a_condition(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"n":1}\n\n' * 3 + '{"m":{}}\n')
    assert await read_jsonl(path).count() == await read_jsonl(path).count(RunOptions(rules=())) == 4
    shuffled = read_jsonl(path, ["n"]).map_batches(lambda batch: batch).random_shuffle()
    assert await shuffled.filter(pc.field("n") == 1).count() == 3
    path.write_text('{"n":1}\n{"n":\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: "):
        await read_jsonl(path, schema=pa.schema([("n", pa.int64())])).count()


class Columns:
    """A source of one's own, that makes its blocks of the columns that are asked for."""

    name = "columns"

    def __init__(self, columns: dict[str, list[int]]) -> None:
        self._columns = columns

    def schema(self) -> None:
        """Only reading tells."""

    def count(self) -> None:
        """Only reading tells."""

    def fragments(self) -> list[Fragment]:
        return [Fragment(key="all")]

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict(self._columns).slice(skip)

    def select(self, columns: Sequence[str]) -> Columns:
        return Columns({name: self._columns[name] for name in columns})

    def where(self, predicate: pc.Expression) -> None:
        """It can't."""


async def test_rows_of_a_source_of_ones_own_are_counted_by_its_columns() -> None:
    assert await read(Columns({"a": [1, 2, 3], "b": [4, 5, 6]})).count() == 3


def test_what_is_no_function_is_refused_where_it_is_said() -> None:
    async def later(row: Row) -> Row:
        return row

    with pytest.raises(MisuseError, match=r"map\(\) was given"):
        numbers(1).map(3)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(MisuseError, match=r"map\(\) was given"):
        numbers(1).map(later({}))  # type: ignore[arg-type]  # what is tested
    with pytest.raises(MisuseError, match=r"filter\(\) was given a str, 'n < 3'; .* or an Arrow expression: pyarrow"):
        numbers(1).filter("n < 3")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(MisuseError, match="is a generator"):
        numbers(1).filter(twice)
    with pytest.raises(MisuseError, match="concurrency=0"):
        numbers(1).map(double, concurrency=0)
    with pytest.raises(MisuseError, match="on_error='ignore'"):
        numbers(1).map(double, on_error="ignore")  # type: ignore[arg-type]  # what is tested


def test_iterating_without_async_is_refused_with_the_right_spelling() -> None:
    with pytest.raises(MisuseError, match="async for"):
        list(numbers(1))


async def test_sort_orders_by_columns_and_directions() -> None:
    rows = [{"a": a, "b": b} for a, b in [(1, "x"), (2, "y"), (1, "z"), (None, "w")]]
    dataset = from_rows(rows)
    assert [row["b"] for row in await rows_of(dataset.sort("a", "b", descending=[False, True]))] == ["z", "x", "y", "w"]
    assert [row["b"] for row in await rows_of(dataset.sort("a", nulls="first"))] == ["w", "x", "z", "y"]


async def test_groups_are_aggregated() -> None:
    rows = [{"k": "a", "v": 1}, {"k": "b", "v": 5}, {"k": "a", "v": 3}]
    grouped = from_rows(rows).group_by("k").aggregate(rows="count", total=("sum", "v"), top=("max", "v"))
    assert await rows_of(grouped.sort("k")) == [
        {"k": "a", "rows": 2, "total": 4, "top": 3},
        {"k": "b", "rows": 1, "total": 5, "top": 5},
    ]


async def test_distinct_gives_each_row_once() -> None:
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 1}]
    assert await rows_of(from_rows(rows).distinct().sort("b")) == [{"a": 1, "b": 1}, {"a": 1, "b": 2}]
    assert await rows_of(from_rows(rows).distinct("a")) == [{"a": 1, "b": 1}]


async def test_join_puts_rows_with_equal_keys_together() -> None:
    left = from_rows([{"k": 1, "v": "l"}, {"k": 2, "v": "m"}])
    right = from_rows([{"k": 1, "v": "r"}, {"k": 3, "v": "s"}])
    assert await rows_of(left.join(right, "k")) == [{"k": 1, "v": "l", "v_right": "r"}]
    assert await left.join(right, on="k", how="outer").count() == 3
    assert await rows_of(left.join(right, on="k", how="anti")) == [{"k": 2, "v": "m"}]


async def test_a_shuffle_of_one_seed_is_one_order() -> None:
    first = [row["n"] for row in await rows_of(numbers(50).random_shuffle(seed=1))]
    assert sorted(first) == list(range(50)) != first
    assert [row["n"] for row in await rows_of(numbers(50).random_shuffle(seed=1))] == first
    kept = numbers(50).random_shuffle(seed=1).filter(pc.field("n") < 25)
    assert [row["n"] for row in await rows_of(kept)] == [n for n in first if n < 25]


async def test_repartition_cuts_the_same_rows_anew() -> None:
    assert [block.num_rows async for block in numbers(10).repartition(4)] == [2, 3, 2, 3]
    assert [block.num_rows async for block in numbers(10).repartition(rows=4)] == [4, 4, 2]


async def test_batches_for_trainers_are_of_one_size() -> None:
    batches = [batch async for batch in numbers(7).iter_batches(format="numpy", batch_size=3)]
    assert [batch["n"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    kept = [len(batch) async for batch in numbers(7).iter_batches(format="pandas", batch_size=3, drop_last=True)]
    assert kept == [3, 3]


async def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rows = [{"n": 0, "s": "x"}, {"n": 1, "s": None}]
    dataset = from_rows(rows)
    for write, again in (
        (dataset.write_parquet, read_parquet),
        (dataset.write_jsonl, read_jsonl),
        (dataset.write_csv, read_csv),
        (dataset.write_ipc, read_ipc),
    ):
        folder = tmp_path / write.__name__
        report = await write(folder).arun()
        assert (report.rows, [part.rows for part in report.parts]) == (2, [2])
        assert str(report).startswith(f"2 rows in 1 part of {report.parts[0].size:,} bytes, ")
        assert await rows_of(again(folder)) == rows


async def test_a_filter_and_a_choice_of_columns_reach_the_file(tmp_path: Path) -> None:
    await from_rows([{"n": i, "m": -i} for i in range(10)]).write_parquet(tmp_path / "a.parquet").arun()
    dataset = read_parquet(tmp_path / "a.parquet").filter(pc.field("n") > 7).select("m")
    assert await rows_of(dataset) == [{"m": -8}, {"m": -9}]
    assert "select" not in dataset.explain().partition("physical:")[2]
    assert await read_parquet(tmp_path / "a.parquet").sort("n", descending=True).limit(1).select("n").take() == [
        {"n": 9}
    ]


def test_nothing_comes_after_a_sink(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"is a sink: run it with `await dataset.arun\(\)`"):
        numbers(1).write_jsonl(tmp_path / "a.jsonl").map(double)


async def test_batches_for_trainers_are_made_of_blocks_that_get_wider() -> None:
    blocks = from_iterable(lambda: [pa.table({"v": values}) for values in ([None], [1], [2.5])])
    (batch,) = [batch async for batch in blocks.iter_batches(batch_size=3)]
    assert batch["v"].to_pylist() == [None, 1.0, 2.5]


async def test_rows_that_are_taken_have_the_same_columns_whichever_block_they_came_in() -> None:
    both = from_rows([{"a": 1}]).union(from_rows([{"b": 2}]))
    assert await both.take() == (await both.collect()).to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": 2}]
