"""Random plans give the same rows optimised, unoptimised and as lists, whatever the blocks and queues are."""

from __future__ import annotations

import operator
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import anyio
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given, settings
from hypothesis import strategies as st

from arun.data import Dataset, RunOptions, from_arrow, from_iterable, from_rows, run
from arun.data.barriers import Limits, Relation
from arun.data.logical import AllToAll, Traits
from arun.data.rules import RULES

Row = dict[str, Any]
Rows = list[Row]


class Reverse:
    """A barrier: the last row first."""

    label = "reverse"
    traits = Traits(columns=(), keeps_rows=True, row_by_row=True, scans=False)

    async def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
        assert inputs[0].blocks is not None
        batches = [batch async for batch in inputs[0].blocks]
        for batch in reversed(batches):
            yield batch.take(pa.array(range(batch.num_rows - 1, -1, -1), type=pa.int64()))


def reverse(dataset: Dataset) -> Dataset:
    return Dataset(AllToAll(Reverse(), (dataset.node,)))


def add(row: Row) -> Row:
    return {"n": row["n"] + row["m"], "m": row["m"]}


async def add_later(row: Row) -> Row:
    for _ in range(row["n"] % 3):
        await anyio.lowlevel.checkpoint()
    return add(row)


def odd(row: Row) -> bool:
    return row["n"] % 2 == 1


async def odd_later(row: Row) -> bool:
    await anyio.lowlevel.checkpoint()
    return odd(row)


def some(row: Row) -> Iterator[Row]:
    for i in range(row["n"] % 3):
        yield {"n": row["n"], "m": i}


async def some_later(row: Row) -> AsyncIterator[Row]:
    for one in some(row):
        await anyio.lowlevel.checkpoint()
        yield one


def batchwise(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.set_column(0, "n", pc.add(batch["n"], 7))


async def batchwise_later(batch: pa.RecordBatch) -> pa.RecordBatch:
    await anyio.lowlevel.checkpoint()
    return batchwise(batch)


def sevens(rows: Rows) -> Rows:
    return [{**row, "n": row["n"] + 7} for row in rows]


#: name: (of datasets, of lists)
ONE: dict[str, tuple[Callable[[Dataset], Dataset], Callable[[Rows], Rows]]] = {
    "map": (lambda d: d.map(add), lambda rows: [add(row) for row in rows]),
    "map, unfused": (lambda d: d.map(add, fuse=False), lambda rows: [add(row) for row in rows]),
    "map, async": (lambda d: d.map(add_later), lambda rows: [add(row) for row in rows]),
    "map, in threads": (lambda d: d.map(add, concurrency=3), lambda rows: [add(row) for row in rows]),
    "filter": (lambda d: d.filter(odd), lambda rows: [row for row in rows if odd(row)]),
    "filter, async": (lambda d: d.filter(odd_later, concurrency=2), lambda rows: [row for row in rows if odd(row)]),
    "where": (lambda d: d.filter(pc.field("n") > 3), lambda rows: [row for row in rows if row["n"] > 3]),
    "flat_map": (lambda d: d.flat_map(some), lambda rows: [one for row in rows for one in some(row)]),
    "flat_map, async": (lambda d: d.flat_map(some_later), lambda rows: [one for row in rows for one in some(row)]),
    "with_column": (
        lambda d: d.with_column("m", pc.field("n") * 2),
        lambda rows: [{**row, "m": row["n"] * 2} for row in rows],
    ),
    "rename": (
        lambda d: d.rename({"n": "m", "m": "n"}).select("n", "m"),
        lambda rows: [{"n": row["m"], "m": row["n"]} for row in rows],
    ),
    "select": (lambda d: d.select("n", "m"), lambda rows: rows),
    "batches": (lambda d: d.map_batches(batchwise), sevens),
    "batches of 3": (lambda d: d.map_batches(batchwise_later, batch_size=3, concurrency=2), sevens),
    "reverse": (reverse, lambda rows: rows[::-1]),
    "limit 0": (lambda d: d.limit(0), lambda rows: rows[:0]),
    "limit 3": (lambda d: d.limit(3), lambda rows: rows[:3]),
    "limit 7": (lambda d: d.limit(7), lambda rows: rows[:7]),
}


def zipped(a: tuple[Dataset, Rows], b: tuple[Dataset, Rows]) -> tuple[Dataset, Rows]:
    rows = min(len(a[1]), len(b[1]))
    together = a[0].limit(rows).zip(b[0].limit(rows)).select("n", "m_1").rename({"m_1": "m"})
    return together, [{"n": x["n"], "m": y["m"]} for x, y in zip(a[1], b[1], strict=False)]


@st.composite
def sources(draw: st.DrawFn) -> tuple[Dataset, Rows]:
    values = draw(st.lists(st.integers(0, 9), max_size=12))
    rows = [{"n": n, "m": i} for i, n in enumerate(values)]
    schema = pa.schema([("n", pa.int64()), ("m", pa.int64())])
    kind = draw(st.sampled_from(["rows", "table", "iterable"]))
    if kind == "rows":
        return from_rows(rows, schema=schema), rows
    table = pa.Table.from_pylist(rows, schema=schema)
    size = draw(st.integers(1, 5))
    blocks = pa.Table.from_batches(table.to_batches(max_chunksize=size), schema=schema)
    return from_arrow(blocks) if kind == "table" else from_iterable(blocks.to_batches, schema=schema), rows


@st.composite
def plans(draw: st.DrawFn, steps: int = 6) -> list[tuple[Dataset, Rows]]:
    """Datasets, each with what it is to give; later ones are made of earlier ones, which so are shared."""
    made = [draw(sources())]
    for _ in range(draw(st.integers(1, steps))):
        kind = draw(st.sampled_from([*ONE, "union", "zip", "source"]))
        below = draw(st.sampled_from(made))
        if kind == "source":
            made.append(draw(sources()))
        elif kind in ONE:
            of_dataset, of_rows = ONE[kind]
            made.append((of_dataset(below[0]), of_rows(below[1])))
        else:
            other = draw(st.sampled_from(made))
            if kind == "zip":
                made.append(zipped(below, other))
            else:
                made.append((below[0].union(other[0]), below[1] + other[1]))
    return made


options = st.builds(
    RunOptions,
    rules=st.one_of(st.none(), st.lists(st.sampled_from(RULES), unique=True).map(tuple), st.just(())),
    block_rows=st.integers(1, 5),
    queue_blocks=st.integers(1, 2),
    queue_bytes=st.sampled_from([1, 1 << 20]),
)


async def rows_of(dataset: Dataset, how: RunOptions) -> Rows:
    with anyio.fail_after(20):
        return (await dataset.collect(how)).to_pylist()


@given(plans(), options)
def test_a_plan_gives_the_same_rows_whatever_the_rules_blocks_and_queues(
    plan: list[tuple[Dataset, Rows]], how: RunOptions
) -> None:
    dataset, expected = plan[-1]
    assert anyio.run(rows_of, dataset, how) == expected


@given(plans(), options)
def test_it_does_on_trio_too(plan: list[tuple[Dataset, Rows]], how: RunOptions) -> None:
    dataset, expected = plan[-1]
    assert anyio.run(rows_of, dataset, how, backend="trio") == expected


@given(plans(), options, st.integers(0, 5))
def test_the_first_rows_are_the_first_rows(plan: list[tuple[Dataset, Rows]], how: RunOptions, rows: int) -> None:
    dataset, expected = plan[-1]
    assert anyio.run(dataset.take, rows, how) == expected[:rows]


@given(plans(), options, st.data())
def test_several_run_as_one_whatever_they_share(
    plan: list[tuple[Dataset, Rows]], how: RunOptions, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(plan), min_size=2, max_size=3))

    async def main() -> list[int]:
        with anyio.fail_after(20):
            return [report.rows for report in await run(*[dataset for dataset, _ in chosen], options=how)]

    assert anyio.run(main) == [len(rows) for _, rows in chosen]


@given(plans())
def test_count_is_right_without_running(plan: list[tuple[Dataset, Rows]]) -> None:
    dataset, expected = plan[-1]
    assert anyio.run(dataset.count) == len(expected)


@settings(max_examples=20)
@given(plans())
def test_every_plan_can_be_explained(plan: list[tuple[Dataset, Rows]]) -> None:
    dataset, _ = plan[-1]
    assert "physical:" in dataset.explain()
    assert dataset.explain(format="mermaid").startswith("flowchart")


def test_a_plan_may_be_deeper_than_the_stack() -> None:
    dataset = from_rows([{"n": 0, "m": 1}])
    for _ in range(3000):
        dataset = dataset.map(add)
    assert anyio.run(rows_of, dataset, RunOptions())[0]["n"] == 3000
    assert operator.length_hint(dataset.explain()) > 0
