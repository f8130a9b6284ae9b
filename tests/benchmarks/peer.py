"""The peer: Burr, doing what arun does in the other modules. Written as its documentation does."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import anyio
from burr.core import (
    Application,
    ApplicationBuilder,
    ApplicationContext,
    State,
    action,
    default,
    expr,
)
from burr.core.parallelism import MapStates

__all__ = ("counter", "map_states")


@action(reads=["n"], writes=["n"])
async def add(state: State) -> State:
    return state.update(n=state["n"] + 1)


@action(reads=["n"], writes=["n"])
async def stop(state: State) -> State:
    return state.update(n=state["n"])


def counter(steps: int, **more: Any) -> Application[Any]:
    """An application that counts to ``steps``."""
    return (
        ApplicationBuilder()
        .with_actions(add, stop)
        .with_transitions(("add", "add", expr(f"n < {steps}")), ("add", "stop", default))
        .with_entrypoint("add")
        .with_state(n=0, **more)
        .build()
    )


def map_states(seconds: list[float]) -> tuple[Application[Any], list[float]]:
    """An application of one subtask for each of ``seconds``, and the times at which its reducer saw their States."""
    seen: list[float] = []

    @action(reads=["seconds"], writes=["done"])
    async def leaf(state: State) -> State:
        if state["seconds"]:
            await anyio.sleep(state["seconds"])
        return state.update(done=1)

    class Leaves(MapStates):
        def is_async(self) -> bool:
            return True

        def action(self, state: State, inputs: dict[str, Any]) -> Any:
            return leaf

        async def states(
            self, state: State, context: ApplicationContext, inputs: dict[str, Any]
        ) -> AsyncGenerator[State, None]:
            for one in seconds:
                yield state.update(seconds=one)

        async def reduce(self, state: State, states: AsyncGenerator[State, None]) -> State:
            total = 0
            async for done in states:
                seen.append(time.perf_counter())
                total += done["done"]
            return state.update(total=total)

        @property
        def reads(self) -> list[str]:
            return []

        @property
        def writes(self) -> list[str]:
            return ["total"]

    app = ApplicationBuilder().with_actions(leaves=Leaves()).with_entrypoint("leaves").with_state(total=0).build()
    return app, seen
