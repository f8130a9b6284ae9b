"""Rate and Capacity: budgets that subtasks share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from arun import (
    ApplicationBuilder,
    Capacity,
    Input,
    MapStates,
    MisuseError,
    Policy,
    Rate,
    Retry,
    State,
    SubGraphTask,
)
from tests.core.policy_programs import hang, over, run

pytestmark = pytest.mark.anyio


# -- rate ------------------------------------------------------------------------------------------


@given(
    per_minute=st.integers(1, 600),
    burst=st.floats(0.01, 1),
    arrivals=st.lists(st.floats(0, 5), min_size=1, max_size=80),
)
def test_no_window_has_more_starts_than_burst_and_refill_allow(
    per_minute: int, burst: float, arrivals: list[float]
) -> None:
    rate = Rate(per_minute=per_minute, burst=burst)
    now, starts = 0.0, []
    for pause in arrivals:
        now += pause
        starts.append(now + rate.reserve(None, now))
    assert starts == sorted(starts)
    capacity = max(per_minute * burst, 1.0)
    for first, begin in enumerate(starts):
        for last in range(first, len(starts)):
            allowed = capacity + (starts[last] - begin) * per_minute / 60
            assert last - first + 1 <= allowed + 1e-6


def test_keys_have_budgets_of_their_own_and_tokens_count() -> None:
    rate = Rate(tokens_per_minute=600, tokens=lambda task: task[1], key=lambda task: task[0])
    assert rate.reserve(("a", 600), 0.0) == 0
    assert rate.reserve(("a", 10), 0.0) == pytest.approx(1.0)
    assert rate.reserve(("b", 600), 0.0) == 0
    with pytest.raises(MisuseError, match="601 tokens can never start"):
        rate.reserve(("c", 601), 0.0)


async def test_subtasks_wait_for_their_rate() -> None:
    class Recording(Rate):
        asked = 0

        def reserve(self, spec: Any, now: float) -> float:
            self.asked += 1
            return 0.0

    rate = Recording(per_minute=60)
    await run(over(Policy(rate=rate), hang), count=1)
    assert rate.asked == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: Rate(), "limits nothing"),
        (lambda: Rate(tokens_per_minute=5), "go together"),
        (lambda: Rate(per_minute=5, burst=2), "share of a minute"),
        (lambda: Rate(per_minute=0), "never lets anything through"),
        (lambda: Retry(attempts=0), "at least 1"),
        (lambda: Retry(factor=0.5), "factor at least 1"),
        (lambda: Policy(limit=0), "at least 1"),
        (lambda: Policy(limit=0.5), "at least 1"),  # type: ignore[arg-type]
        (lambda: Policy(timeout=0), "seconds above 0"),
        (lambda: Policy(idle_timeout=float("nan")), "seconds above 0"),
        (lambda: Capacity(0), "nothing could ever run"),
    ],
)
def test_options_that_cannot_work_are_refused(wrong: Callable[[], Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        wrong()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"limit": None}, "limit=None.*at least 1"),
        ({"limit": "8"}, "limit='8'.*at least 1"),
        ({"deadline": timedelta(seconds=3)}, "deadline=.*a number of seconds above 0"),
        ({"retry": 3}, r"retry=3\): it takes a Retry, for example Retry\(attempts=3\)"),
        ({"rate": 60}, r"it takes a Rate, for example Rate\(per_minute=60\)"),
        ({"capacity": 8}, r"it takes a Capacity, for example Capacity\(8\)"),
    ],
)
def test_options_of_the_wrong_kind_are_refused_where_the_policy_is_made(options: dict[str, Any], why: str) -> None:
    with pytest.raises((TypeError, ValueError), match=why):
        Policy(**options)


def test_a_retry_takes_types_of_errors_or_a_function() -> None:
    for wrong in ([ConnectionError], "ConnectionError"):
        with pytest.raises(TypeError, match="it takes a type of errors, a tuple of such types, or a function"):
            Retry(on=wrong)  # type: ignore[arg-type]  # what is refused


async def test_what_is_no_policy_is_refused_where_it_is_given() -> None:
    given: Any = {"limit": 8}
    with pytest.raises(MisuseError, match=r"SubGraphTask\(policy=...\) is {'limit': 8}; it takes a Policy"):
        SubGraphTask(Input("n"), State(), policy=given)

    class Double(MapStates):
        reads, writes = [], []
        policy = given

        def action(self, state: State, inputs: dict[str, Any]) -> Any:
            return Input("n")

        def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            return [state]

        async def reduce(self, state: State, states: Any) -> State:
            return state

    with pytest.raises(MisuseError, match=r"Double\.policy is {'limit': 8}; it takes a Policy"):
        await ApplicationBuilder().with_actions(Double()).build().arun()


# -- capacity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("named_again", [False, True])
async def test_a_capacity_is_shared_by_everything_below_and_held_by_leaves_only(named_again: bool) -> None:
    capacity, running, peak = Capacity(2), 0, 0
    below = Policy(capacity=capacity) if named_again else Policy()

    async def leaf(x: int) -> int:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await checkpoint()
        await checkpoint()
        running -= 1
        return x

    class Outer(MapStates):
        reads, writes, policy = ["count"], ["ys"], Policy(capacity=capacity)

        def action(self, state: State, inputs: Any) -> Any:
            return over(below, leaf)

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return [state] * 5

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            return state.update(ys=[done["ys"] async for done in states])

    state = await run(Outer(), count=4)
    assert [sorted(ys) for ys in state["ys"]] == [[0, 1, 2, 3]] * 5
    assert peak == 2
    assert "0 in use, 0 waiting" in repr(capacity)


async def test_a_share_that_would_wait_for_its_own_caller_is_refused() -> None:
    capacity = Capacity(1)
    inner = ApplicationBuilder().with_actions(it=over(Policy(capacity=capacity), hang)).with_state(count=1).build()

    async def calls_inner(x: int) -> Any:
        return (await inner.session().arun()).state["ys"]

    with pytest.raises(MisuseError, match=r"deadlock: action 'one' waits for a share of Capacity\(1\), 1 in use"):
        await run(over(Policy(capacity=capacity), calls_inner))


async def test_a_share_that_was_waited_for_in_vain_is_not_lost() -> None:
    capacity = Capacity(1)

    async def some(x: int) -> int:
        await anyio.sleep(0.02)
        return x

    for _ in range(3):
        await run(over(Policy(capacity=capacity, deadline=0.01), some), count=5)
    assert "0 in use, 0 waiting" in repr(capacity)


# -- on several event loops ----------------------------------------------------------------------------------


def test_a_rate_is_one_budget_for_all_event_loops_of_the_process(anyio_backend: str) -> None:
    rate = Rate(per_minute=1)

    async def starts_at_once() -> bool:
        with anyio.move_on_after(0.01) as scope:
            await rate.acquire(None)
        return not scope.cancelled_caught

    backends = (anyio_backend, "asyncio", "trio", "asyncio")  # whose clocks begin where they like
    assert [anyio.run(starts_at_once, backend=backend) for backend in backends] == [True, False, False, False]


def test_a_capacity_serves_one_event_loop_after_the_other(anyio_backend: str) -> None:
    capacity = Capacity(1)
    app = ApplicationBuilder().with_actions(it=over(Policy(capacity=capacity), same)).with_state(count=3).build()
    for backend in (anyio_backend, "asyncio", "trio"):
        assert anyio.run(app.session().arun, backend=backend).state["ys"] == [0, 1, 2]


async def test_a_capacity_that_another_event_loop_uses_is_refused_with_the_fix(anyio_backend: str) -> None:
    capacity = Capacity(2)
    policy = Policy(capacity=capacity)

    async def meanwhile(x: int) -> str:
        def elsewhere() -> None:
            anyio.run(partial(run, over(policy, same), count=1), backend=anyio_backend)

        with pytest.raises(MisuseError) as caught:
            await anyio.to_thread.run_sync(Context().run, elsewhere)  # which holds no share
        return str(caught.value)

    (told,) = (await run(over(policy, meanwhile), count=1))["ys"]
    assert "asks for a share of Capacity(2), 1 in use, 0 waiting, which is in use on another event loop" in told
    assert "give each event loop a Capacity of its own" in told


async def same(x: int) -> int:
    return x
