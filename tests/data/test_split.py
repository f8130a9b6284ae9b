"""Splits: who gets which block, whatever the others do, and that one run serves all."""

from __future__ import annotations

import gc
import pickle
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from arun import Runtime
from arun.data import from_iterable, from_rows
from arun.data.split import Handout, Part, Splits
from arun.data.stream import BlockStream
from arun.errors import MisuseError

pytestmark = pytest.mark.anyio

CONSUMERS = 3


class HandoutMachine(RuleBasedStateMachine):
    """Every block is done at least once as long as somebody is there, and by one consumer at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.handout: Handout[int] = Handout(CONSUMERS)
        self.working: dict[int, int] = {}
        self.waiting: set[int] = set()
        self.left: set[int] = set()
        self.ended: set[int] = set()
        self.done: set[int] = set()
        self.offered = 0
        self.over = False

    @rule(consumer=st.integers(0, CONSUMERS - 1))
    def pull(self, consumer: int) -> None:
        if consumer not in self.left | self.ended | self.waiting:
            if consumer in self.working:
                self.done.add(self.working.pop(consumer))
            self.waiting.add(consumer)
            self.handout.pull(consumer)
            self.answers()

    @precondition(lambda self: self.handout.hungry)
    @rule()
    def offer(self) -> None:
        self.handout.offer(self.offered)
        self.offered += 1
        self.answers()

    @precondition(lambda self: not self.over)
    @rule()
    def end(self) -> None:
        self.over = True
        self.handout.end()
        self.answers()

    @rule(consumer=st.integers(0, CONSUMERS - 1))
    def leave(self, consumer: int) -> None:
        self.handout.leave(consumer)
        self.working.pop(consumer, None)
        self.waiting.discard(consumer)
        self.left.add(consumer)
        self.answers()

    def answers(self) -> None:
        for consumer, block in self.handout.answers():
            assert consumer in self.waiting
            self.waiting.discard(consumer)
            if block is None:
                assert self.over
                assert not self.working
                assert self.done == set(range(self.offered))
                self.ended.add(consumer)
            else:
                assert block not in self.working.values()
                self.working[consumer] = block

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        assert self.handout.held == self.working
        assert self.handout.deserted == (len(self.left | self.ended) == CONSUMERS)
        if self.waiting and not self.working:
            assert self.handout.hungry


def test_handout() -> None:
    run_state_machine_as_test(HandoutMachine, settings=settings(max_examples=60, stateful_step_count=30))


running = pytest.mark.usefixtures("runtime", "nothing_left")


class Runs:
    """Begins runs of some blocks, and counts them."""

    def __init__(self, blocks: int, rows: int = 2) -> None:
        self.begun = 0
        self.given = 0
        self._blocks, self._rows = blocks, rows

    def __call__(self) -> BlockStream:
        self.begun += 1

        async def source() -> AsyncIterator[pa.RecordBatch]:
            for number in range(self._blocks):
                self.given += 1
                first = number * self._rows
                yield pa.record_batch({"n": range(first, first + self._rows), "k": [number % 4] * self._rows})

        return from_iterable(source).astream()


def split(runs: Callable[[], BlockStream], consumers: int, **how: Any) -> tuple[Part, ...]:
    return Splits(runs, consumers, memory=2**20, **how).parts()


def numbers(block: pa.RecordBatch) -> list[int]:
    return block.column("n").to_pylist()


async def read(part: Part, into: list[int]) -> None:
    async for block in part():
        into.extend(numbers(block))
        await anyio.lowlevel.checkpoint()


@given(st.integers(0, 12), st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
@settings(max_examples=30)
def test_every_block_is_done_whoever_pulls_and_whoever_leaves(
    blocks: int, consumers: int, steps: list[tuple[int, bool]]
) -> None:
    async def run() -> None:
        runs = Runs(blocks)
        async with Runtime():
            parts = [part() for part in split(runs, consumers)]
            done: list[int] = []
            holds: dict[int, list[int]] = {}
            left: set[int] = set()
            for number, leaves in steps:
                consumer = number % consumers
                if consumer in left:
                    continue
                if leaves and len(left) < consumers - 1:
                    await parts[consumer].aclose()
                    holds.pop(consumer, None)
                    left.add(consumer)
                elif len(done) // 2 + len(holds) < blocks:  # else it might wait for the others
                    done += holds.pop(consumer, [])
                    holds[consumer] = numbers(await anext(parts[consumer]))

            async def rest(consumer: int) -> None:
                done.extend(holds.pop(consumer, []))
                async for block in parts[consumer]:
                    done.extend(numbers(block))

            async with anyio.create_task_group() as group:
                for consumer in set(range(consumers)) - left:
                    group.start_soon(rest, consumer)
        assert Counter(done) == Counter(range(blocks * 2))
        assert runs.begun <= 1

    anyio.run(run)


@running
async def test_a_slow_consumer_holds_up_nobody() -> None:
    slow, quick = split(Runs(10), 2)
    async with anyio.create_task_group() as group:
        got: list[int] = []
        stuck = slow()
        first = numbers(await anext(stuck))
        group.start_soon(read, quick, got)
        await anyio.wait_all_tasks_blocked()
        assert sorted(first + got) == list(range(20))
        await stuck.aclose()  # what it held goes to the other one
        await anyio.wait_all_tasks_blocked()
        assert sorted(got) == list(range(20))


@running
async def test_each_iteration_is_a_run_that_all_consumers_share() -> None:
    runs = Runs(6)
    one, other = split(runs, 2)
    for epoch in (1, 2, 3):
        got: list[int] = []
        async with anyio.create_task_group() as group:
            group.start_soon(read, one, got)
            group.start_soon(read, other, got)
        assert sorted(got) == list(range(12))
        assert runs.begun == epoch


@running
async def test_one_after_the_other_the_first_gets_all() -> None:
    one, other = split(Runs(3), 2)
    first: list[int] = []
    second: list[int] = []
    await read(one, first)
    await read(other, second)
    assert (first, second) == (list(range(6)), [])


@running
async def test_a_run_computes_no_more_than_is_pulled() -> None:
    runs = Runs(10_000)
    one, other = split(runs, 2)
    iterations = one(), other()
    for _ in range(5):
        for iteration in iterations:
            await anext(iteration)
    await anyio.wait_all_tasks_blocked()
    assert runs.given < 30
    for iteration in iterations:
        await iteration.aclose()


@running
async def test_a_cancelled_pull_loses_nothing() -> None:
    (part,) = split(Runs(3), 1)
    iteration = part._splits
    number = iteration.begin(0)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await iteration.pull(number, 0)
    got = [numbers(block) for block in [await iteration.pull(number, 0) for _ in range(3)]]
    assert got == [[0, 1], [2, 3], [4, 5]]
    assert await iteration.pull(number, 0) is None


@running
async def test_an_error_reaches_every_consumer() -> None:
    async def source() -> AsyncIterator[pa.RecordBatch]:
        yield pa.record_batch({"n": [1]})
        raise ValueError("no more")

    parts = split(from_iterable(source).astream, 2)
    failed = []

    async def fail(part: Part) -> None:
        try:
            await read(part, [])
        except ValueError as exc:
            failed.append(str(exc))

    async with anyio.create_task_group() as group:
        for part in parts:
            group.start_soon(fail, part)
    assert failed == ["no more"] * 2


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 4))
@settings(max_examples=25)
def test_equal_parts_have_equally_many_rows(sizes: list[int], consumers: int) -> None:
    async def source() -> AsyncIterator[pa.RecordBatch]:
        number = 0
        for size in sizes:
            yield pa.record_batch({"n": pa.array(range(number, number + size), pa.int64())})
            number += size

    async def run() -> None:
        got: list[list[int]] = [[] for _ in range(consumers)]
        async with Runtime():
            for part, into in zip(split(from_iterable(source).astream, consumers, equal=True), got, strict=True):
                await read(part, into)
        assert {len(rows) for rows in got} == {sum(sizes) // consumers}
        together = [n for rows in got for n in rows]
        assert len(set(together)) == len(together)

    anyio.run(run)


@running
async def test_rows_with_the_same_key_go_to_the_same_consumer() -> None:
    parts = split(Runs(20), 3, by="k")
    got: list[set[int]] = []
    rows = 0
    for part in parts:
        keys: set[int] = set()
        async for block in part():
            keys |= set(block.column("k").to_pylist())
            rows += len(block)
        got.append(keys)
    assert rows == 40
    assert sorted(key for keys in got for key in keys) == [0, 1, 2, 3]


@running
async def test_keys_may_be_anything_that_compares() -> None:
    values = [float("nan"), float("nan"), None, 1, 1.0, "a", [1, None], [1, None], {"x": [2]}, {"x": [2]}]

    async def source() -> AsyncIterator[pa.RecordBatch]:
        for value in values:
            yield pa.record_batch({"k": pa.array([value])})

    parts = split(from_iterable(source).astream, 5, by=["k"])
    got = [[row for block in [b async for b in part()] for row in block.column(0).to_pylist()] for part in parts]
    assert sum(map(len, got)) == len(values)
    assert [1, 1.0] in [[x for x in rows if x == 1] for rows in got]
    assert any(rows.count([1, None]) == 2 for rows in got)


@running
async def test_a_consumer_that_leaves_frees_the_others_also_when_parts_are_settled() -> None:
    one, other = split(Runs(10), 2, equal=True)
    iteration = one()
    await anext(iteration)
    await iteration.aclose()
    got: list[int] = []
    await read(other, got)
    assert len(got) == 10


@running
@pytest.mark.parametrize("mapped", [False, True])
async def test_what_a_reader_has_not_seen_done_goes_to_the_others(mapped: bool) -> None:
    def counted(row: dict[str, Any]) -> dict[str, Any]:
        return row

    async def source() -> AsyncIterator[pa.RecordBatch]:
        for number in range(20):
            yield pa.record_batch({"n": [number]})

    one, other = from_iterable(source).split(2)
    if mapped:
        one = one.map(counted)
    seen: list[int] = []
    async with one.astream() as blocks:
        async for block in blocks:
            seen += numbers(block)
            if len(seen) == 3:
                break
            await anyio.wait_all_tasks_blocked()
    got = [n async for block in other for n in numbers(block)]
    # The third was not done yet.
    assert sorted(got) == [2, *range(3, 20)]
    assert seen == [0, 1, 2]


@running
async def test_a_dataset_is_split_and_cached_in_a_line() -> None:
    calls = Counter[int]()

    def count(row: dict[str, Any]) -> dict[str, Any]:
        calls[row["n"]] += 1
        return row

    cached = from_rows([{"n": n} for n in range(10)]).map(count).cache(memory=0)
    for _ in range(2):
        got: list[int] = []
        for part in cached.split(3, equal=True):
            got += [row["n"] async for row in part.rows()]
        assert sorted(got) == list(range(9))
    assert calls == dict.fromkeys(range(10), 1)
    assert "split 1 of 2" in cached.split(2)[0].explain()


@running
async def test_a_local_split_can_not_be_sent_away() -> None:
    part, _ = split(Runs(1), 2)
    with pytest.raises(MisuseError, match="split 1 of 2 shares a run of this process"):
        pickle.dumps(part)


@running
async def test_a_split_that_is_dropped_half_way_ends_its_run() -> None:
    parts = split(Runs(10_000), 2)
    iteration = parts[0]()
    await anext(iteration)
    await iteration.aclose()
    del parts, iteration
    gc.collect()
    await anyio.wait_all_tasks_blocked()  # and `nothing_left` looks


@running
@pytest.mark.parametrize(
    ("how", "message"),
    [({"consumers": 0}, "into at least 1"), ({"consumers": 2, "equal": True, "by": "k"}, "give one of them")],
)
async def test_options_that_mean_nothing_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        split(Runs(1), **how)
