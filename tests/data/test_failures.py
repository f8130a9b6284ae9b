"""Errors: where they are told to have been, and what becomes of the rows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any

import anyio
import pyarrow as pa
import pytest

from arun import MisuseError, Retry, ThreadExecutor
from arun.data import Dataset, RunOptions, from_iterable, from_rows, run
from arun.data.barriers import Limits, Relation
from arun.data.logical import AllToAll, Traits

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]
Row = dict[str, Any]


def numbers(n: int) -> Dataset:
    return from_rows([{"n": i} for i in range(n)])


def fifth(row: Row) -> Row:
    if row["n"] == 5:
        raise ValueError("five")
    return {"n": row["n"], "ok": True}


async def fifth_async(row: Row) -> Row:
    await anyio.lowlevel.checkpoint()
    return fifth(row)


def fifth_generator(row: Row) -> Iterator[Row]:
    yield row
    yield fifth(row)


@pytest.mark.parametrize(
    ("function", "options"),
    [(fifth, {}), (fifth, {"concurrency": 3}), (fifth_async, {}), (fifth_generator, {}), (fifth, {"fuse": False})],
)
async def test_an_error_is_raised_as_itself_and_names_step_and_row(function: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="five") as caught:
        await numbers(20).map(lambda row: row).map(function, **options).collect()
    notes = "\n".join(caught.value.__notes__)
    assert f"in map({function.__name__}), row 5 of what it was given: {{'n': 5}}" in notes


async def test_of_rows_that_fail_together_the_first_is_raised() -> None:
    async def each(row: Row) -> Row:
        raise ValueError(row["n"])

    with pytest.raises(ValueError, match="0") as caught:
        await numbers(4).map(each).collect()
    assert caught.value.args == (0,)
    assert "3 more failed before they could be cancelled, such as ValueError(1)" in caught.value.__notes__


async def test_an_error_in_a_batch_names_step_and_rows() -> None:
    def broken(batch: pa.RecordBatch) -> pa.RecordBatch:
        raise ValueError("five")

    for options in ({}, {"batch_size": 4}):
        with pytest.raises(ValueError, match="five") as caught:
            await numbers(20).map_batches(broken, **options).collect()
        assert any(note.startswith("in map_batches(broken), rows 0 to ") for note in caught.value.__notes__)


@pytest.mark.parametrize("function", [fifth, fifth_async])
async def test_a_bad_row_is_skipped(function: Any) -> None:
    dataset = numbers(8).map(function, on_error="skip")
    assert (await dataset.collect())["n"].to_pylist() == [0, 1, 2, 3, 4, 6, 7]
    assert dataset.stats().stages[-1].steps[-1].failed == 1


@pytest.mark.parametrize("function", [fifth, fifth_async])
async def test_a_bad_row_is_kept_with_its_error(function: Any) -> None:
    rows = (await numbers(7).map(function, on_error="collect").collect()).to_pylist()
    assert rows[5] == {"n": 5, "ok": None, "error": "ValueError: five"}
    assert rows[6] == {"n": 6, "ok": True, "error": None}


async def test_a_row_that_has_failed_is_passed_by() -> None:
    seen: list[int] = []

    def later(row: Row) -> Row:
        seen.append(row["n"])
        return row

    dataset = numbers(7).map(fifth, on_error="collect").map(later, on_error="collect")
    assert (await dataset.collect())["error"].to_pylist()[5] == "ValueError: five"
    assert seen == [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("on_error", ["skip", "collect"])
async def test_filters_flat_maps_and_columns_may_fail_for_a_row_too(on_error: Any) -> None:
    left = 5 if on_error == "skip" else 6

    def ok(row: Row) -> bool:
        return bool(fifth(row))

    assert await numbers(6).filter(ok, on_error=on_error).count() == left
    assert await numbers(6).with_column("m", ok, on_error=on_error).limit(9).map_batches(lambda b: b).count() == left
    assert await numbers(6).flat_map(lambda row: [fifth(row)], on_error=on_error).count() == left


async def test_misuse_is_never_skipped() -> None:
    with pytest.raises(MisuseError, match=r"map\(.*\) gave None"):
        await numbers(2).map(lambda row: None, on_error="skip").collect()


async def test_a_coroutine_that_nobody_awaits_is_told() -> None:
    with pytest.raises(MisuseError, match="which nobody awaits"):
        await numbers(2).map(lambda row: fifth_async(row)).collect()
    with pytest.raises(MisuseError, match="which nobody awaits"):
        await numbers(2).filter(lambda row: fifth_async(row)).collect()


async def test_stop_iteration_does_not_end_a_dataset_early() -> None:
    def stops(row: Row) -> Row:
        if row["n"] == 2:
            raise StopIteration
        return row

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        await numbers(5).map(stops).collect()
    assert await numbers(5).map(stops, on_error="skip").map_batches(lambda b: b).count() == 4


async def test_rows_before_an_error_come_first() -> None:
    seen: list[int] = []

    async def note(dataset: Dataset) -> None:
        async with dataset.astream(RunOptions(block_rows=1)) as blocks:
            async for block in blocks:
                seen.extend(block["n"].to_pylist())

    with pytest.raises(ValueError, match="five"):
        await note(numbers(20).map(fifth, fuse=False))
    assert seen == [0, 1, 2, 3, 4]


async def test_an_error_of_a_source_is_raised() -> None:
    async def source() -> AsyncIterator[Row]:
        yield {"n": 0}
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        await from_iterable(source).map(lambda row: row).sort("n").collect()


async def test_an_item_that_is_no_row_is_refused() -> None:
    with pytest.raises(MisuseError, match="a row is a dict"):
        await from_iterable([1, 2]).collect()
    with pytest.raises(MisuseError, match="row 1 is"):
        from_rows([{}, 3])  # type: ignore[list-item]  # what is tested


async def test_an_error_in_one_of_several_ends_the_others() -> None:
    never = anyio.Event()

    async def waits(row: Row) -> Row:
        await never.wait()
        return row

    with pytest.raises(ValueError, match="five"):
        await run(numbers(9).map(waits), numbers(9).map(fifth))


async def test_a_promise_to_keep_rows_is_checked() -> None:
    async def twice(batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        return [batch, batch]

    how: Any
    for how in ({}, {"batch_size": 3}, {"concurrency": 2}, {"executor": ThreadExecutor(1)}):
        with pytest.raises(MisuseError, match="keeps_rows=True, and gave 1 rows for 3; let it give one for each"):
            await numbers(3).map_batches(lambda batch: batch.slice(0, 1), keeps_rows=True, **how).collect()
    with pytest.raises(MisuseError, match="keeps_rows=True, and gave 6 rows for 3"):
        await numbers(3).map_batches(twice, keeps_rows=True).collect()


async def test_a_sink_is_left_as_it_was_when_a_row_fails(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="five"):
        await numbers(9).map(fifth).write_jsonl(tmp_path / "out.jsonl").arun()
    assert list(tmp_path.iterdir()) == []


async def test_an_all_to_all_that_loses_rows_though_it_says_that_it_keeps_them_is_told() -> None:
    class Loses:
        label = "loses"
        traits = Traits(columns=(), keeps_rows=True, row_by_row=True, scans=False)

        async def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
            assert inputs[0].blocks is not None
            async for batch in inputs[0].blocks:
                yield batch.slice(1)

    with pytest.raises(MisuseError, match="loses says that it keeps rows, and gave 2 for 3"):
        await Dataset(AllToAll(Loses(), (numbers(3).node,))).collect()


@pytest.mark.parametrize("function", [fifth, fifth_async])
async def test_the_column_of_errors_holds_text_also_where_there_are_none(function: Any) -> None:
    async for block in numbers(9).map(function, on_error="collect"):
        assert block.schema.field("error").type == pa.string()


@pytest.mark.parametrize("plain", [True, False])
async def test_a_row_is_given_again_to_a_function_that_failed(plain: bool) -> None:
    calls: list[Row] = []

    def flaky(row: Row) -> Row:
        calls.append(dict(row))
        row["n"] = -row["n"]
        if row["n"] == -2 and len(calls) < 5:
            raise ConnectionError(f"line {len(calls)}")
        return row

    async def flaky_later(row: Row) -> Row:
        return flaky(row)

    retry = Retry(attempts=3, on=ConnectionError, initial=0)
    dataset = numbers(4).map(flaky if plain else flaky_later, retry=retry, **({} if plain else {"concurrency": 1}))
    assert (await dataset.collect())["n"].to_pylist() == [0, -1, -2, -3]
    assert calls == [{"n": n} for n in (0, 1, 2, 2, 2, 3)]
    assert dataset.stats().stages[0].steps[0].retried == 2
    assert ": 4 -> 4 rows" in str(dataset.stats())
    assert ", 2 times again" in str(dataset.stats())
    calls.clear()
    twice = Retry(attempts=2, on=ConnectionError, initial=0)
    collected = numbers(4).map(flaky if plain else flaky_later, retry=twice, concurrency=1, on_error="collect")
    assert [row["error"] for row in await collected.take()] == [None, None, "ConnectionError: line 4", None]


async def test_what_is_no_use_to_be_tried_again_is_not() -> None:
    calls: list[int] = []

    async def fail(row: Row) -> Row:
        calls.append(row["n"])
        return fifth(row)

    with pytest.raises(MisuseError, match=r"map\(retry=3\): takes a Retry, such as Retry\(attempts=3\)"):
        numbers(6).map(fail, retry=3)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(MisuseError, match="a function that runs elsewhere is not called again"):
        numbers(6).map(fifth, retry=Retry(), executor=ThreadExecutor(1))
    with pytest.raises(ValueError, match="five"):
        await numbers(6).map(fail, retry=Retry(on=ConnectionError)).collect()
    assert calls.count(5) == 1
