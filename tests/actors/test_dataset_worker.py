"""What Ray's workers do to blocks and groups of a dataset, done here: together they give what a local run gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from actors.on_ray.dataset_worker import (
    BUCKET,
    AddSortKeys,
    Combine,
    HeldTo,
    Mark,
    Piece,
    Steps,
    WriteParts,
    nothing,
    schema_of,
    sort_keys,
    zipped,
)
from arun.data import Dataset, RunOptions, from_rows, read_parquet
from arun.data.all_to_all import Aggregate, Distinct, Join
from arun.data.barriers import Aggregation
from arun.data.files import parquet_sink
from arun.data.logical import AllToAll, OneToOne
from tests.actors.test_dataset import ROWS, key, later, odd, shout

OPTIONS = RunOptions()
TABLE = pa.Table.from_pylist(ROWS)


def in_groups(marked: pa.Table, combine: Combine) -> list[dict[str, Any]]:
    buckets = set(marked.column(BUCKET).to_pylist())
    groups = (marked.filter(pc.field(BUCKET) == one) for one in buckets)
    return [row for group in groups for row in rows_of(combine(group))]


def rows_of(tables: Iterable[pa.Table]) -> list[dict[str, Any]]:
    return [row for table in tables for row in table.to_pylist()]


def barrier_of(dataset: Dataset) -> Any:
    assert isinstance(dataset.node, AllToAll)
    return dataset.node.barrier


async def same(dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    assert sorted(map(key, rows)) == sorted(map(key, (await dataset.collect()).to_pylist()))


@pytest.mark.asyncio
async def test_steps_of_every_kind_run_over_a_block() -> None:
    dataset = from_rows(ROWS).map(shout).map(later, concurrency=4).filter(odd).filter(pc.field("id") > 1010)
    steps = []
    node = dataset.node
    while isinstance(node, OneToOne):
        steps += reversed(node.steps)
        node = node.input
    await same(dataset, rows_of(Steps(steps[::-1], OPTIONS)(TABLE)))


@pytest.mark.parametrize("keys", [("k",), ("k", "x"), ()])
@pytest.mark.asyncio
async def test_groups_that_meet_in_a_bucket_are_aggregated_apart(keys: tuple[str, ...]) -> None:
    dataset = from_rows(ROWS).group_by(*keys).aggregate(rows="count", total=("sum", "id"), least=("min", "s"))
    await same(dataset, in_groups(Mark(keys)(TABLE), Combine(barrier_of(dataset), OPTIONS)))


@pytest.mark.asyncio
async def test_rows_of_a_group_have_their_order_again_in_whichever_order_they_come() -> None:
    marked = [Mark(("k",))(TABLE.slice(start, 10)) for start in range(0, len(TABLE), 10)]
    by = from_rows(ROWS).distinct("k")
    await same(by, in_groups(pa.concat_tables(marked[::-1]), Combine(barrier_of(by), OPTIONS)))
    lists = from_rows(ROWS).group_by("k").aggregate(first=("first", "id"), all=("list", "s"))
    await same(lists, in_groups(pa.concat_tables(marked[::-1]), Combine(barrier_of(lists), OPTIONS)))


def test_rows_are_joined_with_all_of_the_other_side() -> None:
    cross = Combine(Join((), "cross"), OPTIONS)
    (joined,) = cross.of([TABLE.slice(0, 3), pa.table({"j": [1, 2]})])
    assert joined.select(["id", "j"]).sort_by([("id", "ascending"), ("j", "ascending")]).to_pylist() == [
        {"id": n, "j": j} for n in range(3) for j in (1, 2)
    ]


def test_pieces_of_blocks_are_put_side_by_side() -> None:
    pieces = [[Piece(0, 0, 3)], [Piece(0, 1, 1), Piece(1, 0, 2)]]
    blocks = [pa.table({"a": [1, 2, 3]}), pa.table({"a": [7, 8]}), pa.table({"a": [9, 10]})]
    assert zipped(pieces, OPTIONS, *blocks).to_pydict() == {"a": [1, 2, 3], "a_1": [8, 9, 10]}


def test_no_rows_are_one_group_without_keys() -> None:
    count = Aggregate((), {"rows": Aggregation("count"), "total": Aggregation("sum", "id")})
    assert rows_of(Combine(count, OPTIONS)(nothing(["id"]))) == [{"rows": 0, "total": None}]


@pytest.mark.parametrize("how", ["inner", "left", "right", "outer", "semi", "anti"])
@pytest.mark.asyncio
async def test_sides_that_meet_in_a_bucket_are_joined(how: Any) -> None:
    other = [{"j": None if n == 3 else n, "s": f"other {n}"} for n in range(6)]
    dataset = from_rows(ROWS).join(from_rows(other), {"k": "j"}, how)
    both = pa.concat_tables([Mark(("k",), 0)(TABLE), Mark(("j",), 1)(pa.Table.from_pylist(other))])
    assert isinstance(barrier_of(dataset), Join)
    await same(dataset, in_groups(both, Combine(barrier_of(dataset), OPTIONS)))


@pytest.mark.asyncio
async def test_equal_rows_meet_in_a_bucket_whatever_their_values() -> None:
    table = pa.table({"x": [1.0, 1, float("nan"), float("nan"), None, None], "y": [["a"]] * 6})
    assert len(in_groups(Mark(None)(table), Combine(Distinct(None), OPTIONS))) == 3


@pytest.mark.parametrize("nulls", ["first", "last"])
@pytest.mark.parametrize("down", [True, False])
@pytest.mark.asyncio
async def test_added_columns_put_rows_in_our_order(down: bool, nulls: Any) -> None:
    blocks = [TABLE.slice(start, 7) for start in range(0, len(TABLE), 7)]
    marked = pa.concat_tables(table for block in blocks for table in AddSortKeys(("x", "s"), nulls)(block))
    order = []
    for number in range(2):
        null, nan, value = sort_keys(number)
        way = "descending" if down else "ascending"
        order += [(null, "ascending"), (nan, way), (value, way)]
    local = await from_rows(ROWS).sort("x", "s", descending=down, nulls=nulls).collect()
    assert marked.sort_by(order).column("id").to_pylist() == local.column("id").to_pylist()


def test_blocks_are_held_to_what_all_of_them_fit_into() -> None:
    narrow, wide = pa.table({"x": pa.nulls(1)}), pa.table({"x": [1.5], "y": ["a"]})
    (held,) = HeldTo(wide.schema)(narrow)
    assert held.schema == wide.schema
    assert schema_of(held) == wide.schema


@pytest.mark.asyncio
async def test_a_block_is_a_part_of_a_sink(tmp_path: Any) -> None:
    sink = parquet_sink(tmp_path / "out")
    sink.begin()
    told = [WriteParts(sink)(block).to_pylist() for block in (TABLE.slice(0, 10), TABLE.slice(10), TABLE.slice(0, 0))]
    sink.end()
    assert [row["rows"] for rows in told for row in rows] == [10, 30]
    await same(read_parquet(tmp_path / "out"), ROWS)
