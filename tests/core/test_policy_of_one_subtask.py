"""What one subtask may have of its own, beside the policy of all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from arun import Capacity, Failed, MisuseError, Ok, Policy, Retry, State, SubGraphTask, TaskBasedParallelAction, action
from tests.core.policy_programs import run

pytestmark = pytest.mark.anyio

AT_ONCE = Retry(attempts=3, initial=0)


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
