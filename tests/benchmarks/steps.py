"""What a step of an application costs."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import anyio.to_thread

from arun import Application, ApplicationBuilder, State, action, default, expr

from . import peer
from .harness import Check, Options, Row, medians

__all__ = ("ROWS",)


@action(reads=["n"], writes=["n"])
async def add(state: State) -> State:
    return state.update(n=state["n"] + 1)


@action(reads=["n"], writes=["n"])
def add_in_thread(state: State) -> State:
    return state.update(n=state["n"] + 1)


@action(reads=["n"], writes=["n"])
async def stop(state: State) -> State:
    return state.update(n=state["n"])


def counter(step: Any, steps: int, **more: Any) -> Application:
    return (
        ApplicationBuilder()
        .with_actions(step, stop)
        .with_transitions((step.name, step.name, expr(f"n < {steps}")), (step.name, "stop", default))
        .with_entrypoint(step.name)
        .with_state(n=0, **more)
        .build()
    )


async def _counted(app: Any, steps: int, clock: Callable[[], float] = process_time) -> float:
    start = clock()
    _, _, state = await app.arun(halt_after=["stop"])
    seconds = clock() - start
    assert state["n"] == steps
    return seconds / steps


def step(options: Options) -> Row:
    """A counter loop of a coroutine action, against Burr and a plain await loop of the same function and State."""
    steps = 2000  # also where the rest is quick: with fewer, it is caches that are measured
    app = counter(add, steps)

    async def plain() -> float:
        state = State({"n": 0})
        start = process_time()
        while state["n"] < steps:
            state = await add.function(state)
        return (process_time() - start) / steps

    took = medians(
        {
            "arun": lambda: _counted(app.session(), steps),
            "floor": plain,
            "peer": lambda: _counted(peer.counter(steps), steps),
        },
        options,
    )
    return Row(
        "step, coroutine action",
        "us",
        took["arun"],
        took["floor"],
        took["peer"],
        [
            Check("Burr / arun >= 10", took.ratio("peer", "arun"), 10, at_least=True),
            Check("arun / plain await loop <= 10", took.ratio("arun", "floor"), 10),
        ],
    )


def function_step(options: Options) -> Row:
    """The same with a plain function, against anyio's to_thread alone."""
    steps = options.n(250)
    app = counter(add_in_thread, steps)

    async def to_thread() -> float:
        state = State({"n": 0})
        start = perf_counter()
        while state["n"] < steps:
            state = await anyio.to_thread.run_sync(add_in_thread.function, state)
        return (perf_counter() - start) / steps

    took = medians({"arun": lambda: _counted(app.session(), steps, perf_counter), "floor": to_thread}, options, times=4)
    return Row(
        "step, plain function in a thread",
        "us",
        took["arun"],
        took["floor"],
        None,
        [Check("arun / anyio.to_thread <= 1.3", took.ratio("arun", "floor"), 1.3)],
    )


def wide_state(options: Options) -> Row:
    """A step with 10,000 keys in the State, against one with 10."""
    steps = options.n(1000)
    few, many = ({f"key{i}": i for i in range(keys)} for keys in (10, 10_000))
    narrow, wide = counter(add, steps, **few), counter(add, steps, **many)
    took = medians(
        {
            "narrow": lambda: _counted(narrow.session(), steps),
            "wide": lambda: _counted(wide.session(), steps),
            "peer": lambda: _counted(peer.counter(20, **many), 20),
        },
        options,
    )
    return Row(
        "step, 10,000 keys (floor: 10 keys)",
        "us",
        took["wide"],
        took["narrow"],
        took["peer"],
        [Check("10,000 keys / 10 keys <= 3", took.ratio("wide", "narrow"), 3)],
    )


def bind(options: Options) -> Row:
    """``action.bind(...).with_name(...)``."""

    @action(reads=["n"], writes=["n"])
    async def ask(state: State, model: str) -> State:
        return state

    async def bound() -> float:
        n = options.n(20_000)
        start = process_time()
        for _ in range(n):
            ask.bind(model="m").with_name("ask m")
        return (process_time() - start) / n

    took = medians({"arun": bound}, options)["arun"]
    return Row("bind() and with_name()", "us", took, None, None, [Check("< 5 us", took * 1e6, 5, "us")])


ROWS = {"step": step, "function_step": function_step, "wide_state": wide_state, "bind": bind}
