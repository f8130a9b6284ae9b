"""Retry, timeouts, deadline, rate, capacity, and handles that wait for each other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from arun import (
    ApplicationBuilder,
    Capacity,
    Failed,
    Handle,
    Item,
    MapStates,
    MisuseError,
    Ok,
    Partial,
    Policy,
    Rate,
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

pytestmark = pytest.mark.anyio

AT_ONCE = Retry(attempts=3, initial=0)


@pytest.fixture
async def runtime() -> AsyncIterator[None]:
    async with Runtime():
        yield


def over(policy: Policy, work: Callable[[int], Any], count: int = 3) -> MapStates:
    """A parallel action that runs ``work`` on 0, 1, ... and collects what it returned."""

    @action(reads=["x"], writes=["y"])
    async def one(state: State) -> State:
        return state.update(y=await work(state["x"]))

    class Over(MapStates):
        reads, writes = ["count"], ["ys"]

        def action(self, state: State, inputs: Any) -> Any:
            return one

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return (state.update(x=x) for x in range(state["count"]))

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            ys = []
            async for done in states:
                ys.append(done["y"] if isinstance(done, State) else done)  # noqa: PERF401 - outcomes or States
            return state.update(ys=ys)

    Over.policy = policy
    return Over()


async def run(parallel: Any, **state: Any) -> State:
    app = ApplicationBuilder().with_actions(it=parallel).with_state(**{"count": 3, **state}).build()
    return (await app.arun()).state


# -- retry -------------------------------------------------------------------------------------------------


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


# -- timeouts ---------------------------------------------------------------------------------------------


async def hang(x: int) -> int:
    if x == 1:
        await anyio.sleep_forever()
    return x


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
            await anyio.sleep(0.05)
            yield beat
        if state["x"]:
            await anyio.sleep_forever()
        yield state.update(y=state["x"])

    class Over(MapStates):
        reads, writes = ["count"], ["ys"]
        policy = Policy(idle_timeout=0.3, on_error="collect", order="submitted")

        def action(self, state: State, inputs: Any) -> Any:
            return steady

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return [state.update(x=0), state.update(x=1)]

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            return state.update(ys=[done async for done in states])

    fine, idle = (await run(Over()))["ys"]
    assert isinstance(fine, Ok)
    assert isinstance(idle, Failed)
    assert "steady(x=1) yielded nothing for its idle_timeout of 0.3 s" in str(idle.error)


async def test_a_deadline_ends_the_work_and_the_reducer_finishes_with_what_it_has() -> None:
    assert (await run(over(Policy(deadline=0.1), hang)))["ys"] == [0, 2]


async def test_a_reducer_that_collects_sees_what_the_deadline_cut_off() -> None:
    policy = Policy(deadline=0.1, on_error="collect", order="submitted", limit=2)
    ys = (await run(over(policy, hang)))["ys"]
    assert [type(outcome) for outcome in ys] == [Ok, Skipped, Ok]
    assert ys[1].reason == "the deadline of 0.1 s had passed"


# -- rate -------------------------------------------------------------------------------------------------


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
        (lambda: Policy(timeout=0), "seconds above 0"),
        (lambda: Capacity(0), "nothing could ever run"),
    ],
)
def test_options_that_cannot_work_are_refused(wrong: Callable[[], Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        wrong()


# -- capacity -----------------------------------------------------------------------------------------------


async def test_a_capacity_is_shared_by_everything_below_and_held_by_leaves_only() -> None:
    capacity, running, peak = Capacity(2), 0, 0

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
            return over(Policy(), leaf)

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


# -- handles that wait for each other -------------------------------------------------------------------------


class Waiting(TaskBasedParallelAction):
    """Subtasks that await each other's handles as ``edges`` says: {who: whom}."""

    reads, writes = ["count"], ["ys"]

    def __init__(self, edges: dict[int, int], limit: int = 10) -> None:
        self.handles: dict[int, Handle[State]] = {}
        self.all_there = anyio.Event()
        self.edges = edges
        self.policy = Policy(limit=limit)

        @action(reads=["x"], writes=["y"])
        async def one(state: State) -> State:
            x = state["x"]
            await self.all_there.wait()
            if x in edges:
                return state.update(y=(await self.handles[edges[x]])["y"] + 1)
            return state.update(y=0)

        self.one = one

    async def tasks(self, state: State, context: Any, inputs: Any) -> Any:
        for x in range(state["count"]):
            self.handles[x] = yield SubGraphTask(self.one, state.update(x=x))
        self.all_there.set()

    async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
        return state.update(ys=sorted([done["y"] async for done in states]))


async def test_subtasks_may_await_earlier_and_later_ones() -> None:
    assert (await run(Waiting({0: 1, 1: 2, 4: 2}), count=5))["ys"] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("edges", "told"),
    [
        ({1: 1}, r"deadlock: one\(x=1\) awaits one\(x=1\), which is itself"),
        ({0: 1, 1: 0}, r"deadlock: one\(x=1\) awaits one\(x=0\), which waits for one\(x=1\)"),
        ({0: 1, 1: 2, 2: 0}, r"deadlock: one\(x=2\) awaits one\(x=0\), which waits for one\(x=2\)"),
    ],
)
async def test_a_circle_of_awaits_is_refused_by_name(edges: dict[int, int], told: str) -> None:
    with pytest.raises(MisuseError, match=told):
        await run(Waiting(edges), count=3)


async def test_awaiting_an_ancestor_is_refused() -> None:
    handles: list[Handle[State]] = []

    async def child(x: int) -> Any:
        return await handles[0]

    class Parent(TaskBasedParallelAction):
        reads, writes = ["count"], ["ys"]

        async def tasks(self, state: State, context: Any, inputs: Any) -> Any:
            handles.append((yield SubGraphTask(over(Policy(), child), state)))

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            return state.update(ys=[done async for done in states])

    with pytest.raises(MisuseError, match=r"deadlock: .* awaits Over.*, which can't end before it"):
        await run(Parent(), count=1)


async def test_a_source_may_await_its_own_handle_with_a_limit_of_one() -> None:
    class Chain(TaskBasedParallelAction):
        reads, writes, policy = ["count"], ["ys"], Policy(limit=1)

        async def tasks(self, state: State, context: Any, inputs: Any) -> Any:
            @action(reads=["x"], writes=["y"])
            async def double(state: State) -> State:
                await checkpoint()
                return state.update(y=state["x"] * 2)

            x = 1
            for _ in range(state["count"]):
                handle = yield SubGraphTask(double, state.update(x=x))
                x = (await handle)["y"]

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            return state.update(ys=[done["y"] async for done in states])

    assert (await run(Chain(), count=4))["ys"] == [2, 4, 8, 16]


async def test_yielding_what_awaiting_a_task_gave_is_refused_at_the_yield() -> None:
    class Awaits(TaskBasedParallelAction):
        reads, writes = ["count"], ["ys"]

        async def tasks(self, state: State, context: Any, inputs: Any) -> Any:
            @action(reads=[], writes=[])
            async def nothing(state: State) -> State:
                return state

            handle = yield SubGraphTask(nothing, state)
            yield await handle

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            return state.update(ys=[done async for done in states])

    with pytest.raises(MisuseError, match="yield the task itself") as caught:
        await run(Awaits())
    traceback = caught.traceback
    assert any("yield await handle" in str(entry.statement) for entry in traceback)


# -- of one subtask ----------------------------------------------------------------------------------------


class Single(TaskBasedParallelAction):
    """Two subtasks, the first of them under a policy of its own."""

    reads, writes = [], ["ys"]

    def __init__(self, work: Callable[[int], Any], policy: Policy, own: Policy) -> None:
        @action(reads=["x"], writes=["y"])
        async def one(state: State) -> State:
            return state.update(y=await work(state["x"]))

        self.one, self.policy, self.own = one, policy, own

    async def tasks(self, state: State, context: Any, inputs: Any) -> AsyncIterator[SubGraphTask]:
        yield SubGraphTask(self.one, state.update(x=0), policy=self.own)
        yield SubGraphTask(self.one, state.update(x=1))

    async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
        return state.update(ys=[done["y"] if isinstance(done, State) else done async for done in states])


async def test_one_subtask_may_have_a_retry_of_its_own() -> None:
    calls: list[int] = []

    async def fails(x: int) -> int:
        calls.append(x)
        if calls.count(x) < 3:
            raise OSError(x)
        return x

    outcomes = (await run(Single(fails, Policy(on_error="collect"), Policy(retry=AT_ONCE))))["ys"]
    assert sorted(calls) == [0, 0, 0, 1]
    kinds = {type(outcome): outcome for outcome in outcomes}  # what it left alone is the action's: outcomes
    assert kinds[Ok].value["y"] == 0
    assert str(kinds[Failed].error) == "1"


@pytest.mark.parametrize("option", ["timeout", "idle_timeout"])
async def test_one_subtask_may_have_a_timeout_of_its_own(option: str) -> None:
    others = anyio.Event()

    async def first_hangs(x: int) -> int:
        if x == 0:
            try:
                await anyio.sleep_forever()
            finally:
                others.set()
        await others.wait()
        return x

    own = Policy(on_error="skip", **{option: 0.01})
    assert (await run(Single(first_hangs, Policy(order="submitted"), own)))["ys"] == [1]


async def test_a_subtask_that_may_fail_is_left_out_also_where_others_are_collected() -> None:
    async def fails(x: int) -> int:
        raise OSError(x)

    outcomes = (await run(Single(fails, Policy(on_error="collect"), Policy(on_error="skip"))))["ys"]
    assert [str(outcome.error) for outcome in outcomes] == ["1"]


async def test_a_failing_subtask_beside_one_that_may_fail_is_raised() -> None:
    async def fails(x: int) -> int:
        raise OSError(x)

    with pytest.raises(OSError, match="1"):
        await run(Single(fails, Policy(), Policy(on_error="skip")))


async def test_one_subtask_may_draw_on_a_capacity_of_its_own() -> None:
    own = Capacity(1)
    seen: list[tuple[int, str]] = []

    async def look(x: int) -> int:
        seen.append((x, repr(own)))
        return x

    await run(Single(look, Policy(), Policy(capacity=own)))
    assert sorted(seen) == [(0, "Capacity(1), 1 in use, 0 waiting"), (1, "Capacity(1), 0 in use, 0 waiting")]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(limit=3), r"Policy\(limit=3\)\): limit is about all subtasks"),
        (Policy(order="submitted"), r"Policy\(order='submitted'\)\): order is about all subtasks"),
        (Policy(deadline=1), r"Policy\(deadline=1\)\): deadline is about all subtasks"),
        (Policy(on_error="collect"), r"on_error='collect'\)\): what the reducer is given"),
    ],
)
async def test_what_makes_no_sense_for_one_subtask_is_refused_by_name(policy: Policy, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        SubGraphTask(runs, State(), policy=policy)


@action(reads=[], writes=[])
async def runs(state: State) -> State:
    return state
