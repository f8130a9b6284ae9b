"""Handles that wait for each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from arun import Handle, MisuseError, Policy, State, SubGraphTask, TaskBasedParallelAction, action
from tests.core.policy_programs import over, run

pytestmark = pytest.mark.anyio


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
