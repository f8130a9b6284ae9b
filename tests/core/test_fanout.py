"""fan_out(): awaitables in, outcomes out, from anybody's frame."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from arun import Failed, MisuseError, Ok, Policy, fan_out

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]
setting: ContextVar[str] = ContextVar("setting", default="unset")


async def value(i: int, turns: int = 1) -> int:
    for _ in range(turns):
        await checkpoint()
    return i


async def values_of(source: Any, policy: Policy | None = None) -> list[Any]:
    return [outcome.value async for outcome in fan_out(source, policy)]


@pytest.mark.parametrize("shape", ["list", "generator", "async generator", "coroutine"])
async def test_a_source_may_be_any_iterable_of_awaitables(shape: str) -> None:
    async def generator() -> AsyncIterator[Any]:
        for i in range(3):
            yield value(i)

    async def coroutine() -> Any:
        return [value(i) for i in range(3)]

    source = {
        "list": lambda: [value(i) for i in range(3)],
        "generator": lambda: (value(i) for i in range(3)),
        "async generator": generator,
        "coroutine": coroutine,
    }[shape]()
    assert await values_of(source, Policy(limit=2)) == [0, 1, 2]


async def test_nothing_runs_before_the_first_outcome_is_asked_for() -> None:
    asked: list[int] = []

    def source() -> Iterator[Any]:
        for i in range(2):
            asked.append(i)
            yield value(i)

    outcomes = fan_out(source())
    await anyio.wait_all_tasks_blocked()
    assert asked == []
    assert [outcome async for outcome in outcomes] == [Ok(0), Ok(1)]


async def test_a_generator_is_given_handles() -> None:
    async def source() -> Any:
        first = yield value(1)
        second = yield value(await first + 1)
        yield value(await second + 1)

    assert await values_of(source(), Policy(limit=1)) == [1, 2, 3]


async def test_an_endless_source_is_read_only_as_slots_come_free() -> None:
    read = 0

    def source() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield value(read)

    outcomes = fan_out(source(), Policy(limit=4))
    for taken in range(1, 20):
        await anext(outcomes)
        await anyio.wait_all_tasks_blocked()
        assert read - taken <= 4
    now = outcomes.statistics()
    assert (now.submitted, now.in_flight, now.ready, now.failed) == (read, read - 19, read - 19, 0)
    assert now.workers <= 4
    await outcomes.aclose()


async def test_the_first_failure_is_raised_and_the_rest_cancelled() -> None:
    cleaned = []

    async def hang() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.append(True)

    async def fail() -> None:
        raise ValueError("no")

    outcomes = fan_out([value(1, 0), hang(), fail()])
    assert await anext(outcomes) == Ok(1)
    with pytest.raises(ValueError, match="no") as caught:
        await anext(outcomes)
    assert caught.value.__notes__ == ["in subtask 2"]
    assert cleaned == [True]
    with pytest.raises(StopAsyncIteration):
        await anext(outcomes)


async def test_collect_gives_every_outcome_in_order() -> None:
    async def fail(i: int) -> int:
        raise ValueError(i)

    got = [o async for o in fan_out([value(0, 3), fail(1), value(2)], Policy(on_error="collect", order="submitted"))]
    assert [type(outcome) for outcome in got] == [Ok, Failed, Ok]


async def test_what_is_not_awaitable_is_refused() -> None:
    with pytest.raises(MisuseError, match=r"was given an int, 3; yield the awaitable itself"):
        await values_of([3])
    with pytest.raises(MisuseError, match="is an int, 3, which can't be iterated over"):
        await values_of(3)


async def test_closing_waits_for_clean_up_and_ends_the_iteration() -> None:
    cleaned: list[str] = []

    async def hang() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            cleaned.append("subtask")

    async def source() -> AsyncIterator[Any]:
        try:
            yield value(1)
            while True:
                yield hang()
        finally:
            await checkpoint()
            cleaned.append("source")

    async with fan_out(source(), Policy(limit=3)) as outcomes:
        async for _ in outcomes:
            break
    assert {*cleaned} == {"source", "subtask"}
    await outcomes.aclose()
    assert [outcome async for outcome in outcomes] == []


async def test_closing_in_a_cancelled_scope_waits_for_clean_up_all_the_same() -> None:
    cleaned = []

    async def hang() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            cleaned.append(True)

    outcomes = fan_out([value(1), hang()])
    await anext(outcomes)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await outcomes.aclose()
        assert cleaned == [True]


async def test_closed_before_it_began_it_never_begins() -> None:
    def source() -> Iterator[Any]:
        raise AssertionError("was started")
        yield

    outcomes = fan_out(source())
    await outcomes.aclose()
    assert [outcome async for outcome in outcomes] == []


async def test_dropping_it_cancels_what_runs() -> None:
    cleaned = anyio.Event()

    async def hang() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.set()

    outcomes = fan_out([value(1), hang()])
    await anext(outcomes)
    await anyio.wait_all_tasks_blocked()
    del outcomes
    gc.collect()
    await cleaned.wait()
    await anyio.wait_all_tasks_blocked()


async def test_it_can_be_used_in_anybodys_generator() -> None:
    async def mine() -> AsyncIterator[int]:
        outcomes = fan_out((value(i) for i in range(1000)), Policy(limit=2))
        try:
            async for outcome in outcomes:
                yield outcome.value
        finally:
            await outcomes.aclose()

    numbers = mine()
    assert [await anext(numbers) for _ in range(3)] == [0, 1, 2]
    await numbers.aclose()  # type: ignore[attr-defined]


async def test_a_cancelled_wait_loses_no_outcome() -> None:
    gate = anyio.Event()

    async def gated(i: int) -> int:
        await gate.wait()
        return i

    outcomes = fan_out([gated(1), gated(2)])
    for _ in range(3):
        with anyio.move_on_after(0):
            await anext(outcomes)
    gate.set()
    assert sorted([outcome.value async for outcome in outcomes]) == [1, 2]


async def test_awaitables_run_in_contexts_of_their_own() -> None:
    async def sets(i: int) -> str:
        before = setting.get()
        setting.set(str(i))
        await checkpoint()
        assert setting.get() == str(i)
        return before

    setting.set("caller")
    assert {*await values_of((sets(i) for i in range(20)), Policy(limit=3))} == {"caller"}
    assert setting.get() == "caller"


@pytest.mark.usefixtures("asyncio_only")
async def test_tasks_and_futures_are_awaitables() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    future.set_result(2)
    assert sorted(await values_of([asyncio.create_task(value(1)), future])) == [1, 2]


async def test_a_refused_argument_is_refused_once() -> None:
    with pytest.raises(MisuseError, match=r"fan_out\(policy=...\) is 5; it takes a Policy"):
        fan_out([], 5)  # type: ignore[arg-type]
    gc.collect()  # nothing is raised in __del__


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 6), st.integers(0, 30))
async def test_in_the_order_yielded_it_is_a_plain_loop_and_left_at_any_time_it_is_clean(
    turns: list[int], limit: int, leave: int
) -> None:
    outcomes = fan_out((value(i, n) for i, n in enumerate(turns)), Policy(limit=limit, order="submitted"))
    got = []
    async for outcome in outcomes:
        got.append(outcome.value)
        if len(got) > leave:
            break
    await outcomes.aclose()
    assert got == list(range(len(turns)))[: leave + 1]
    assert outcomes.statistics().pending == 0
