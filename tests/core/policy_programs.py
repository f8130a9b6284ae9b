"""A parallel action under a policy, for the tests of policies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio

from arun import ApplicationBuilder, MapStates, Policy, State, action


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


async def hang(x: int) -> int:
    if x == 1:
        await anyio.sleep_forever()
    return x
