"""What a subtask costs, and how soon things happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from time import perf_counter, process_time
from typing import Any

import anyio

from arun import Application, ApplicationBuilder, MapStates, Partial, Policy, State, action, fan_out

from . import peer
from .harness import Check, Options, Row, medians

__all__ = ("ROWS", "map_states")


@action(reads=["seconds"], writes=["done"])
async def leaf(state: State) -> State:
    if state["seconds"]:
        await anyio.sleep(state["seconds"])
    return state.update(done=1)


class Leaves(MapStates):
    """One subtask for each number of seconds in ``todo()``."""

    reads = ()
    writes = ("total",)

    def __init__(self, todo: Callable[[], Iterator[float]], limit: int) -> None:
        self.todo = todo
        self.policy = Policy(limit=limit)

    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        return leaf

    async def states(self, state: State, context: Any, inputs: dict[str, Any]) -> AsyncIterator[State]:
        for seconds in self.todo():
            yield state.update(seconds=seconds)

    async def reduce(self, state: State, states: AsyncIterator[State]) -> AsyncIterator[State]:
        total = 0
        async for done in states:
            total += done["done"]
            yield state.update(total=total)


def map_states(todo: Callable[[], Iterator[float]], limit: int = 100) -> Application:
    return ApplicationBuilder().with_actions(leaves=Leaves(todo, limit)).with_state(total=0).build()


async def _mapped(app: Any, n: int, clock: Callable[[], float] = process_time) -> float:
    start = clock()
    _, _, state = await app.arun(halt_after=["leaves"])
    seconds = clock() - start
    assert state["total"] == n
    return seconds


def map_states_row(options: Options) -> Row:
    """MapStates over trivial coroutine actions, with a partial State for each; Burr has none."""
    n = options.n(10_000)
    app = map_states(lambda: iter([0.0] * n))

    async def arun() -> float:
        return await _mapped(app.session(), n) / n

    async def burr() -> float:
        return await _mapped(peer.map_states([0.0] * n)[0], n) / n

    async def floor() -> float:
        state = State({"total": 0})
        start = process_time()
        for _ in range(n):
            done = await leaf.function(state.update(seconds=0.0))
            state = state.update(total=state["total"] + done["done"])
        return (process_time() - start) / n

    took = medians({"arun": arun, "floor": floor, "peer": burr}, options)
    return Row(
        "MapStates, a subtask (floor: await loop)",
        "us",
        took["arun"],
        took["floor"],
        took["peer"],
        [Check("Burr / arun >= 8", took.ratio("peer", "arun"), 8, at_least=True)],
    )


async def _trivial(i: int) -> int:
    return i


def fan_out_row(options: Options) -> list[Row]:
    """``fan_out`` of trivial awaitables against the task groups of anyio and asyncio, which bound nothing."""
    n = options.n(10_000)

    async def arun() -> float:
        start = process_time()
        got = 0
        async for _ in fan_out((_trivial(i) for i in range(n)), Policy(limit=100)):
            got += 1
        assert got == n
        return (process_time() - start) / n

    async def on_anyio() -> float:
        start = process_time()
        async with anyio.create_task_group() as group:
            for i in range(n):
                group.start_soon(_trivial, i)
        return (process_time() - start) / n

    async def on_asyncio() -> float:
        start = process_time()
        async with asyncio.TaskGroup() as group:
            for i in range(n):
                group.create_task(_trivial(i))
        return (process_time() - start) / n

    took = medians({"arun": arun, "anyio": on_anyio, "asyncio": on_asyncio}, options)
    return [
        Row(
            f"fan_out (floor: {name})",
            "us",
            took["arun"],
            took[key],
            None,
            [Check(f"arun / {name} <= {bound}", took.ratio("arun", key), bound)],
        )
        for key, name, bound in (("anyio", "anyio's task group", 0.6), ("asyncio", "asyncio.TaskGroup", 2.5))
    ]


def sleeping(options: Options) -> Row:
    """100 subtasks of 50 ms."""
    app = map_states(lambda: iter([0.05] * 100))

    async def floor() -> float:
        start = perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(asyncio.sleep(0.05))
        return perf_counter() - start

    took = medians(
        {
            "arun": lambda: _mapped(app.session(), 100, perf_counter),
            "floor": floor,
            "peer": lambda: _mapped(peer.map_states([0.05] * 100)[0], 100, perf_counter),
        },
        options,
    )
    check = Check("< 60 ms", took["arun"] * 1e3, 60, "ms")
    return Row("100 subtasks of 50 ms", "ms", took["arun"], took["floor"], took["peer"], [check])


def straggler(options: Options) -> Row:
    """When the first partial result arrives: the first of 200 subtasks takes 300 ms, the others 5 ms; limit 20."""
    seconds = [0.3] + [0.005] * 199
    app = map_states(lambda: iter(seconds), limit=20)

    async def arun() -> float:
        start = perf_counter()
        async with app.session().astream() as stream:
            async for event in stream:
                if isinstance(event, Partial):
                    return perf_counter() - start
        raise AssertionError("no partial came")

    async def burr() -> float:
        burr_app, seen = peer.map_states(seconds)
        start = perf_counter()
        await burr_app.arun(halt_after=["leaves"])
        return seen[0] - start

    took = medians({"arun": arun, "peer": burr}, options)
    check = Check("< 15 ms", took["arun"] * 1e3, 15, "ms")
    return Row("first partial, one straggler", "ms", took["arun"], 0.005, took["peer"], [check])


def early_exit(options: Options) -> Row:
    """From the reducer's return with 100 subtasks in flight until all are cancelled and cleaned up."""
    running = left = 0

    async def arun() -> float:
        nonlocal running, left
        running = 0
        returned = 0.0

        @action(reads=["i"], writes=["done"])
        async def wait(state: State) -> State:
            nonlocal running
            running += 1
            try:
                if state["i"] < 100:
                    await anyio.sleep_forever()
                return state.update(done=1)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()
                running -= 1

        class Race(MapStates):
            reads = ()
            writes = ("done",)
            policy = Policy(limit=101)

            def action(self, state: State, inputs: dict[str, Any]) -> Any:
                return wait

            def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
                return (state.update(i=i) for i in range(101))

            async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
                nonlocal returned
                async for done in states:
                    assert running == 100
                    returned = perf_counter()
                    return state.update(done=done["done"])
                raise AssertionError

        await ApplicationBuilder().with_actions(race=Race()).build().arun()
        seconds = perf_counter() - returned
        left = max(left, running + len(asyncio.all_tasks()) - 1)
        return seconds

    async def floor() -> float:
        async def wait() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(wait)
            await anyio.sleep(0.01)
            start = perf_counter()
            group.cancel_scope.cancel()
        return perf_counter() - start

    took = medians({"arun": arun, "floor": floor}, options)
    checks = [Check("< 30 ms", took["arun"] * 1e3, 30, "ms"), Check("0 left", left, 0, "left")]
    return Row("early exit, 100 in flight (floor: anyio's group)", "ms", took["arun"], took["floor"], None, checks)


ROWS: dict[str, Callable[[Options], Row | list[Row]]] = {
    "map_states": map_states_row,
    "fan_out": fan_out_row,
    "sleeping": sleeping,
    "straggler": straggler,
    "early_exit": early_exit,
}
