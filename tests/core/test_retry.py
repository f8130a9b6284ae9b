"""Retry, and the timeouts after which it may apply."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun import (
    ApplicationBuilder,
    Failed,
    Item,
    MapStates,
    MisuseError,
    Ok,
    Partial,
    Policy,
    Retry,
    Runtime,
    Skipped,
    State,
    SubGraphTask,
    SubtaskRetried,
    TaskBasedParallelAction,
    action,
    fan_out,
)
from tests.core.policy_programs import hang, over, run

pytestmark = pytest.mark.anyio

AT_ONCE = Retry(attempts=3, initial=0)


@pytest.fixture
async def runtime() -> AsyncIterator[None]:
    async with Runtime():
        yield


# -- retry -----------------------------------------------------------------------------------------


async def test_a_failed_subtask_runs_again_until_it_succeeds() -> None:
    runs: list[int] = []

    async def flaky(x: int) -> int:
        runs.append(x)
        if runs.count(x) <= x:
            raise ConnectionError(x)
        return x

    state = await run(over(Policy(order="submitted", retry=AT_ONCE), flaky))
    assert state["ys"] == [0, 1, 2]
    assert sorted(runs) == [0, 1, 1, 2, 2, 2]


async def test_the_last_attempts_error_is_raised_with_their_number() -> None:
    async def broken(x: int) -> int:
        raise ConnectionError(f"row {x}")

    with pytest.raises(ConnectionError, match="row 0") as caught:
        await run(over(Policy(limit=1, retry=AT_ONCE), broken))
    assert "in attempt 3 of 3" in caught.value.__notes__


async def test_only_the_chosen_errors_are_retried() -> None:
    runs: list[int] = []

    async def wrong(x: int) -> int:
        runs.append(x)
        raise LookupError(x)

    for on in (ConnectionError, (OSError, ConnectionError), lambda error: "no" in str(error)):
        runs.clear()
        with pytest.raises(LookupError):
            await run(over(Policy(limit=1, retry=Retry(initial=0, on=on)), wrong))  # type: ignore[arg-type]
        assert runs == [0]


async def test_misuse_is_never_retried() -> None:
    runs: list[int] = []

    @action(reads=["x"], writes=["y"])
    async def wrong(state: State) -> None:
        runs.append(state["x"])

    class Once(TaskBasedParallelAction):
        reads, writes, policy = ["count"], [], Policy(retry=AT_ONCE, on_error="skip")

        def tasks(self, state: State, context: Any, inputs: Any) -> Any:
            return [SubGraphTask(wrong, state.update(x=1))]

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            async for _ in states:
                pass
            return state

    with pytest.raises(MisuseError, match="returned None"):
        await run(Once())
    assert runs == [1]


@pytest.mark.usefixtures("runtime")
async def test_a_retry_voids_earlier_items_and_says_so() -> None:
    runs: list[int] = []

    @action(reads=["x"], writes=["y"])
    async def flaky(state: State) -> AsyncIterator[Any]:
        runs.append(1)
        yield f"item {len(runs)}"
        if len(runs) == 1:
            raise ConnectionError("cut")
        yield state.update(y=1)

    class Once(TaskBasedParallelAction):
        reads, writes, policy = ["count"], ["y"], Policy(retry=AT_ONCE)

        def tasks(self, state: State, context: Any, inputs: Any) -> Any:
            return [SubGraphTask(flaky, state.update(x=1), key="only")]

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            async for done in states:
                state = state.update(y=done["y"])
            return state

    app = ApplicationBuilder().with_actions(once=Once()).with_state(count=1).build()
    seen = [e async for e in app.astream() if isinstance(e, Item | SubtaskRetried | Partial) and e.path]
    assert [(type(event).__name__, event.attempt) for event in seen] == [
        ("Item", 1),
        ("SubtaskRetried", 1),
        ("Item", 2),
        ("Partial", 2),
    ]
    retried = seen[1]
    assert isinstance(retried, SubtaskRetried)
    assert (retried.error, retried.path) == ("ConnectionError: cut", ("once", "only"))


@pytest.mark.usefixtures("runtime")
async def test_fan_out_retries_functions_and_refuses_coroutines() -> None:
    runs: list[int] = []

    async def flaky() -> int:
        runs.append(1)
        if len(runs) < 3:
            raise ConnectionError
        return 7

    assert [o async for o in fan_out([flaky], Policy(retry=AT_ONCE))] == [Ok(7)]
    with pytest.raises(MisuseError, match="can't await one coroutine twice"):
        async for _ in fan_out([flaky()], Policy(retry=AT_ONCE)):
            pass


@given(st.integers(1, 200), st.floats(0, 10), st.floats(1, 10), st.floats(0, 100))
def test_waits_grow_to_the_maximum_and_never_beyond(
    attempt: int, initial: float, factor: float, maximum: float
) -> None:
    steady = Retry(initial=initial, factor=factor, maximum=maximum, jitter=False)
    assert 0 <= steady.wait(attempt) <= steady.wait(attempt + 1) <= maximum
    drawn = Retry(initial=initial, factor=factor, maximum=maximum).wait(attempt)
    assert 0 <= drawn <= steady.wait(attempt)


# -- timeouts --------------------------------------------------------------------------------------


async def test_an_attempt_that_takes_too_long_fails_with_its_label_and_seconds() -> None:
    with pytest.raises(TimeoutError, match=r"one\(x=1\) took longer than its timeout of 0.01 s"):
        await run(over(Policy(timeout=0.01), hang))


async def test_a_timeout_can_be_retried() -> None:
    runs: list[int] = []

    async def slow_once(x: int) -> int:
        runs.append(x)
        if len(runs) == 1:
            await anyio.sleep_forever()
        return x

    state = await run(over(Policy(timeout=0.05, retry=AT_ONCE), slow_once), count=1)
    assert state["ys"] == [0]
    assert runs == [0, 0]


async def test_an_idle_timeout_counts_from_the_last_item() -> None:
    @action(reads=["x"], writes=["y"])
    async def steady(state: State) -> AsyncIterator[Any]:
        for beat in range(10):
            await anyio.sleep(0.1)
            yield beat
        if state["x"]:
            await anyio.sleep_forever()
        yield state.update(y=state["x"])

    class Over(MapStates):
        reads, writes = ["count"], ["ys"]
        policy = Policy(idle_timeout=0.9, on_error="collect", order="submitted")

        def action(self, state: State, inputs: Any) -> Any:
            return steady

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return [state.update(x=0), state.update(x=1)]

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            return state.update(ys=[done async for done in states])

    fine, idle = (await run(Over()))["ys"]
    assert isinstance(fine, Ok)
    assert isinstance(idle, Failed)
    assert "steady(x=1) yielded nothing for its idle_timeout of 0.9 s" in str(idle.error)


async def test_a_deadline_ends_the_work_and_the_reducer_finishes_with_what_it_has() -> None:
    assert (await run(over(Policy(deadline=0.1), hang)))["ys"] == [0, 2]


async def test_a_reducer_that_collects_sees_what_the_deadline_cut_off() -> None:
    policy = Policy(deadline=0.1, on_error="collect", order="submitted", limit=2)
    ys = (await run(over(policy, hang)))["ys"]
    assert [type(outcome) for outcome in ys] == [Ok, Skipped, Ok]
    assert ys[1].reason == "the deadline of 0.1 s had passed"
