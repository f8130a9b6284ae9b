"""Errors of subtasks, sources and reducers, and the handles that tell of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from arun import Action, Failed, MisuseError, Ok, Policy, State, SubGraphTask, SubtaskFailed, SubtaskSkipped, action
from tests.core.parallel_programs import Each, Squares, run, same

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


# -- errors ----------------------------------------------------------------------------------------


async def test_one_failure_cancels_the_rest_and_is_raised_bare_with_the_subtasks_name() -> None:
    cleaned = []

    async def work(i: int) -> int:
        if i == 1:
            raise ValueError("one")
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.append(i)
        return i

    with pytest.raises(ValueError, match="one") as caught:
        await run(Each(work))
    assert caught.value.__notes__[0] == "in work(i=1)"
    assert {*cleaned} <= {0, 2}


async def test_several_failures_are_a_group_of_those_only() -> None:
    failing = anyio.Event()

    async def work(i: int) -> int:
        try:
            if i == 0:
                await anyio.wait_all_tasks_blocked()
                raise ValueError("zero")
            await anyio.sleep_forever()
        finally:
            if i == 1:
                raise KeyError("one")
        return i

    with pytest.raises(ExceptionGroup) as caught:
        await run(Each(work))
    assert sorted(map(repr, caught.value.exceptions)) == ["KeyError('one')", "ValueError('zero')"]
    assert not failing.is_set()


async def test_failed_subtasks_are_left_out_or_collected() -> None:
    async def work(i: int) -> int:
        if i % 2:
            raise ValueError(i)
        return i

    assert (await run(Each(work, count=5, on_error="skip")))["ys"] == [0, 2, 4]

    async def outcomes(states: AsyncIterator[Any]) -> list[Any]:
        return [outcome async for outcome in states]

    for order in ("completed", "submitted"):
        got = (await run(Each(work, count=4, on_error="collect", order=order, reducer=outcomes)))["ys"]
        assert [type(outcome) for outcome in got] == [Ok, Failed, Ok, Failed]
        assert got[2].value["y"] == 2
        assert repr(got[3].error) == "ValueError(3)"


async def test_misuse_is_never_skipped() -> None:
    @action(reads=[], writes=[])
    async def wrong(state: State) -> Any:
        return None

    class Wrong(Squares):
        policy = Policy(on_error="skip")

        def action(self, state: State, inputs: Any) -> Any:
            return wrong

    with pytest.raises(MisuseError, match="'wrong' returned None"):
        await run(Wrong(), xs=[1])


@pytest.mark.parametrize("error", [StopAsyncIteration("x"), StopIteration("x")])
async def test_a_subtask_that_raises_stop_iteration_does_not_end_the_results(error: Exception) -> None:
    class Bare(Action):
        writes = ("y",)

        def execute(self, state: State, inputs: Any, context: Any) -> Any:
            class Awaitable:
                def __await__(self) -> Iterator[Any]:
                    yield from checkpoint().__await__()
                    raise error

            return Awaitable()

    class Stops(Squares):
        def action(self, state: State, inputs: Any) -> Any:
            return Bare()

    with pytest.raises(RuntimeError):
        await run(Stops(), xs=[1, 2])


async def test_a_source_that_raises_cancels_the_subtasks() -> None:
    cleaned = []

    async def work(i: int) -> int:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.append(i)
        return i

    async def source(task: Callable[[int], SubGraphTask]) -> AsyncIterator[SubGraphTask]:
        yield task(1)
        await anyio.wait_all_tasks_blocked()
        raise OSError("source")

    with pytest.raises(OSError, match="source"):
        await run(Each(work, source=source))
    assert cleaned == [1]


async def test_a_users_group_passes_through_a_subtask_unchanged() -> None:
    error = ExceptionGroup("mine", [ValueError(1)])

    async def work(i: int) -> int:
        raise error

    with pytest.raises(ExceptionGroup) as caught:
        await run(Each(work, count=1))
    assert caught.value is error


async def test_two_subtasks_of_one_key_are_refused() -> None:
    with pytest.raises(MisuseError, match="the key 'k'; keys are unique"):
        await run(Each(same, source=lambda task: [task(1, key="k"), task(2, application_id="k")]))


async def test_a_cancelled_error_that_nobody_asked_for_is_a_failure() -> None:
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        pytest.skip("trio's can't be made by hand")

    async def work(i: int) -> int:
        if i == 1:
            raise asyncio.CancelledError
        return i

    with pytest.raises(RuntimeError, match=r"work\(i=1\) raised CancelledError though nobody had cancelled it"):
        await run(Each(work))


# -- handles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_a_handle_can_be_awaited_before_the_next_subtask(limit: int) -> None:
    async def source(task: Callable[..., SubGraphTask]) -> Any:
        first = yield task(1)
        second = yield task((await first)["y"] + 1)
        assert (await first)["y"] == 1
        outcome = await second.outcome()
        assert isinstance(outcome, Ok)
        yield task(outcome.value["y"] + 1)

    async def work(i: int) -> int:
        await checkpoint()
        return i

    assert (await run(Each(work, source=source, limit=limit)))["ys"] == [1, 2, 3]


@pytest.mark.parametrize("handled", [True, False])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
async def test_awaiting_the_handle_of_a_failed_subtask_raises_but_one_failure_stays_one(
    on_error: str, handled: bool
) -> None:
    async def work(i: int) -> int:
        await checkpoint()
        raise ValueError(i)

    async def source(task: Callable[..., SubGraphTask]) -> Any:
        handle = yield task(1)
        if handled:
            with pytest.raises(SubtaskFailed, match=r"work\(i=1\) failed: ValueError\(1\)") as caught:
                await handle
            assert isinstance(caught.value.__cause__, ValueError)
            assert isinstance(await handle.outcome(), Failed)
        else:
            await handle

    if handled and on_error == "skip":
        assert (await run(Each(work, source=source, on_error=on_error)))["ys"] == []
    else:
        expected = ValueError if on_error == "fail" else SubtaskFailed
        with pytest.raises(expected):
            await run(Each(work, source=source, on_error=on_error))


async def test_the_handle_of_a_cancelled_subtask_says_so() -> None:
    handles: list[Any] = []

    async def source(task: Callable[..., SubGraphTask]) -> Any:
        handles.append((yield task(0)))
        handles.append((yield task(1)))
        await anyio.sleep_forever()

    async def work(i: int) -> int:
        if i:
            await anyio.sleep_forever()
        return i

    async def first(states: AsyncIterator[Any]) -> Any:
        async for done in states:
            await anyio.wait_all_tasks_blocked()
            return done["y"]

    assert (await run(Each(work, source=source, reducer=first)))["ys"] == 0
    with pytest.raises(SubtaskSkipped, match="did not finish: cancelled"):
        await handles[1]
    assert (await handles[0])["y"] == 0


async def test_a_plain_generator_gets_no_handle() -> None:
    def source(task: Callable[..., SubGraphTask]) -> Any:
        assert (yield task(1)) is None

    assert (await run(Each(same, source=source)))["ys"] == [1]
