"""Parallel actions for the tests of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from anyio.lowlevel import checkpoint

from arun import (
    Action,
    Application,
    ApplicationBuilder,
    MapStates,
    Policy,
    State,
    SubGraphTask,
    TaskBasedParallelAction,
    action,
)


def app_of(what: Action, **fields: Any) -> Application:
    return ApplicationBuilder().with_actions(what).with_state(**fields).build()


async def run(what: Action, inputs: dict[str, Any] | None = None, **fields: Any) -> State:
    return (await app_of(what, **fields).arun(inputs=inputs)).state


@action(reads=["x"], writes=["y"])
async def square(state: State, plus: int = 0) -> State:
    await checkpoint()
    return state.update(y=state["x"] ** 2 + plus)


@action(reads=["x"], writes=["y"])
async def double(state: State) -> State:
    return state.update(y=state["x"] * 2)


class Squares(MapStates):
    reads, writes = ["xs"], ["ys"]

    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        return square

    async def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        for x in state["xs"]:
            yield state.update(x=x)

    async def reduce(self, state: State, states: AsyncIterator[State]) -> Any:
        return state.update(ys=sorted([done["y"] async for done in states]))


class Each(TaskBasedParallelAction):
    """Runs a function of each number; what it gives is put into ``ys`` as it comes."""

    reads = ()
    writes = ("ys",)

    def __init__(
        self,
        work: Callable[[int], Awaitable[Any]],
        count: int = 3,
        *,
        reducer: Callable[[AsyncIterator[Any]], Awaitable[Any]] | None = None,
        source: Callable[[Callable[..., SubGraphTask]], Any] | None = None,
        **policy: Any,
    ) -> None:
        self.work, self.count, self.policy = work, count, Policy(**policy)
        self.reducer, self.source = reducer, source

    def task(self, state: State, i: int, **options: Any) -> SubGraphTask:
        @action(reads=["i"], writes=["y"])
        async def work(state: State) -> State:
            return state.update(y=await self.work(state["i"]))

        return SubGraphTask(work, state.update(i=i), **options)

    def tasks(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        if self.source is not None:
            return self.source(lambda i, **options: self.task(state, i, **options))
        return (self.task(state, i) for i in range(self.count))

    async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
        if self.reducer is not None:
            return state.update(ys=await self.reducer(states))
        return state.update(ys=[done["y"] async for done in states])


async def same(i: int) -> int:
    return i
