"""What the rules do to a plan, and what they leave alone; and that what is shared runs once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from structlog.testing import capture_logs

from arun.data import Dataset, RunOptions, Statistics, from_iterable, from_rows, read_parquet, run
from arun.data.logical import Plan
from arun.data.rules import RULES, push_limit, without

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]
Row = dict[str, Any]


def numbers(n: int) -> Dataset:
    return from_rows([{"n": i, "m": i} for i in range(n)])


def f(row: Row) -> Row:
    return row


def g(row: Row) -> Row:
    return row


def stages(dataset: Dataset, options: RunOptions | None = None) -> list[str]:
    physical = dataset.explain(options).partition("physical:\n")[2]
    return [line.partition("] ")[2] for line in physical.splitlines() if line.startswith("  [")]


async def test_one_to_one_steps_and_their_source_are_one_stage() -> None:
    assert stages(numbers(1).map(f).select("n").map(g)) == ["read rows + map(f) + select(n) + map(g)"]


async def test_a_step_that_is_not_to_be_fused_is_a_stage_of_its_own() -> None:
    assert stages(numbers(1).map(f).map(g, fuse=False).map(f)) == [
        "read rows + map(f)",
        "map(g) <- [0]",
        "map(f) <- [1]",
    ]


async def test_a_chain_is_fused_into_the_map_side_of_an_all_to_all() -> None:
    assert stages(numbers(1).map(f).sort("n").map(g)) == ["read rows + map(f) + sort(n)", "map(g) <- [0]"]


async def test_without_rules_every_node_is_a_stage() -> None:
    bare = RunOptions(rules=())
    assert stages(numbers(1).map(f).sort("n"), bare) == ["read rows", "map(f) <- [0]", "sort(n) <- [1]"]


async def test_a_limit_goes_before_what_keeps_rows_and_into_unions() -> None:
    limited = numbers(9).map(f).filter(lambda row: True).map(g).limit(2)
    assert stages(limited) == ["read rows + map(f) + filter(<lambda>) + limit(2) + map(g)"]
    both = stages(numbers(9).union(numbers(9)).limit(2))
    assert both == ["read rows + limit(2)", "read rows + limit(2)", "union + limit(2) <- [0], [1]"]


async def test_a_sort_keeps_no_more_rows_than_a_limit_behind_it_lets_through() -> None:
    highest = numbers(9).sort("n", descending=True)
    assert stages(highest.map(g).limit(2)) == [
        "read rows + sort(n descending, limit=2)",
        "limit(2) + map(g) <- [0]",
    ]
    both = highest.limit(2).union(highest)
    assert stages(both)[0].startswith("read rows + sort(n descending);")
    assert [row["n"] for row in await both.take()] == [8, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [row["n"] for row in await highest.limit(3).sort("n").take()] == [6, 7, 8]


async def test_a_limit_stays_behind_what_may_leave_rows_out_or_has_no_order() -> None:
    assert "skip" not in stages(numbers(1).map(f, on_error="skip").limit(1))[0]
    assert stages(numbers(1).map(f, on_error="skip").limit(1)) == ["read rows + map(f) + limit(1)"]
    assert stages(numbers(1).map_batches(f).limit(1)) == ["read rows + map_batches(f) + limit(1)"]
    assert stages(numbers(1).map_batches(f, keeps_rows=True).limit(1)) == ["read rows + limit(1) + map_batches(f)"]


async def test_filters_and_columns_go_into_files_and_past_sorts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    await numbers(10).write_parquet(path).arun()
    dataset = read_parquet(path).sort("n").filter(pc.field("n") > 7).select("n")
    (stage,) = stages(dataset)
    assert stage.startswith("read parquet")
    assert stage.endswith("+ sort(n)")
    assert await dataset.take() == [{"n": 8}, {"n": 9}]


async def test_a_second_filter_is_not_computed_for_rows_that_the_first_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    await numbers(3).write_parquet(path).arun()
    dataset = read_parquet(path).filter(pc.field("n") > 0).filter(pc.scalar(2) / pc.field("n") > 1)
    assert await dataset.select("n").take() == [{"n": 1}]


async def test_a_group_reads_the_columns_that_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    await numbers(3).with_column("wide", lambda row: "x").write_parquet(path).arun()
    grouped = read_parquet(path).group_by("n").aggregate(s=("sum", "m"))
    assert sorted(await grouped.take(), key=str) == [{"n": i, "s": i} for i in range(3)]


async def test_a_rule_can_be_added_and_left_out() -> None:
    seen: list[Plan] = []

    def spy(plan: Plan) -> Plan:
        seen.append(plan)
        return plan

    assert await numbers(3).map(f).count() == 3
    assert (await numbers(3).map(f).arun(RunOptions(rules=(*RULES, spy)))).rows == 3
    assert len(seen) == 1
    kept = stages(numbers(1).map(f).limit(1), RunOptions(rules=without(push_limit)))
    assert kept == ["read rows + map(f) + limit(1)"]


async def test_branches_share_their_prefix_which_runs_once() -> None:
    calls: list[int] = []

    def count(row: Row) -> Row:
        calls.append(row["n"])
        return row

    shared = numbers(20).map(count)
    left, right = await run(shared.filter(lambda row: row["n"] < 5), shared.map(g))
    assert (left.rows, right.rows) == (5, 20)
    assert sorted(calls) == list(range(20))
    calls.clear()
    assert await shared.union(shared).zip(shared.union(shared)).map_batches(lambda b: b).count() == 40
    assert sorted(calls) == list(range(20))


async def test_what_reads_the_same_in_the_same_way_is_read_once() -> None:
    reads: list[int] = []

    def items() -> list[Row]:
        reads.append(1)
        return [{"n": 1}]

    source = from_iterable(items)
    assert await source.select("n").union(source.select("n")).count() == 2
    assert len(reads) == 1


async def test_a_barrier_beside_its_own_input_spills_and_goes_on() -> None:
    table = pa.table({"n": list(range(1000))})
    dataset = from_iterable(lambda: table.to_batches(max_chunksize=10))
    both = dataset.zip(dataset.sort("n", descending=True))
    assert "may be apart: spills to disk" in both.explain()
    rows = await both.collect(RunOptions(queue_blocks=1, queue_bytes=1))
    assert rows["n_1"].to_pylist() == list(range(999, -1, -1))
    assert both.stats().stages[0].spilled > 0


async def test_the_stages_are_a_flowchart() -> None:
    dataset = numbers(1).map(f).sort("n")
    assert dataset.explain(format="mermaid").splitlines() == [
        "flowchart LR",
        '    s0["read rows + map(f) + sort(n)"]',
    ]


async def test_statistics_tell_what_each_stage_and_step_did() -> None:
    dataset = numbers(10).map(f).filter(lambda row: row["n"] > 3).sort("n").map(g)
    report = await dataset.arun()
    first, last = dataset.stats().stages
    assert report.statistics == dataset.stats()
    assert [(step.name, step.rows_in, step.rows_out) for step in first.steps] == [
        ("map(f)", 10, 10),
        ("filter(<lambda>)", 10, 6),
    ]
    assert (first.rows, last.rows, last.size) == (6, 6, 96)
    assert "map(g): 6 -> 6 rows" in str(dataset.stats())


async def test_progress_is_told_while_a_dataset_runs_and_at_the_end() -> None:
    told: list[int] = []

    def note(statistics: Statistics) -> None:
        told.append(sum(stage.rows for stage in statistics.stages))
        raise OSError("the run goes on all the same")

    async def slow(row: Row) -> Row:
        await seen.wait()
        return row

    seen = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(numbers(3).map(slow).arun, RunOptions(progress=note))
        while not told:
            await anyio.lowlevel.checkpoint()
        seen.set()
    assert (told[0], told[-1]) == (0, 3)


async def test_without_a_terminal_progress_is_logged() -> None:
    with capture_logs() as logs:
        await numbers(3).map(f).arun(RunOptions(progress=True))
    (event,) = [entry for entry in logs if entry["event"] == "data.progress"]
    assert (event["stage"], event["rows"], event["failed"]) == ("read rows + map(f)", 3, 0)
