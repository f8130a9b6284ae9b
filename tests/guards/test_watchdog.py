"""Row 9: who holds the event loop is named, with the line, while it does."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from structlog.testing import capture_logs

from arun import MapStates, Policy, Runtime, State, action, fan_out
from tests.guards.programs import app_of

pytestmark = pytest.mark.anyio


def until(condition: Any) -> None:
    """Hold the thread until a condition holds, at most ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)


async def released(logs: list[Any]) -> None:
    while not any(entry["event"] == "event_loop.released" for entry in logs):
        await anyio.sleep(0.01)


def blocked(logs: list[Any]) -> list[Any]:
    return [entry for entry in logs if entry["event"] == "event_loop.blocked"]


async def test_a_blocking_call_is_named_while_it_blocks_and_after_it() -> None:
    with capture_logs() as logs:

        @action(reads=[], writes=[])
        async def crawl(state: State) -> State:
            until(lambda: blocked(logs))  # here
            await released(logs)
            return state

        with anyio.fail_after(15):
            await app_of(crawl).arun()
    (entry,) = blocked(logs)
    assert entry["action"] == "action 'crawl'"
    assert "until at" in entry["where"]
    assert entry["milliseconds"] >= 100
    assert entry["log_level"] == "warning"
    (after,) = [entry for entry in logs if entry["event"] == "event_loop.released"]
    assert after["action"] == "action 'crawl'"
    assert after["milliseconds"] >= entry["milliseconds"]


async def test_a_loop_in_a_generator_a_subtask_or_a_reducer_is_named_by_its_line() -> None:
    with capture_logs() as logs:

        def told(name: str) -> bool:
            return any(name in entry["action"] for entry in blocked(logs))

        @action(reads=["i"], writes=["y"])
        async def step(state: State) -> AsyncIterator[Any]:
            end = time.monotonic() + 10
            while not told("step") and time.monotonic() < end:
                sum(range(1000))  # here
            yield state.update(y=1)

        class Each(MapStates):
            writes = ("y",)
            policy = Policy(limit=1)

            def action(self, state: State, inputs: Any) -> Any:
                return step

            async def states(self, state: State, context: Any, inputs: Any) -> AsyncIterator[State]:
                until(lambda: told("the source of 'Each'"))
                yield state.update(i=0)

            async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
                async for _ in states:
                    until(lambda: told("action 'Each'"))
                return state.update(y=1)

        with anyio.fail_after(40):
            await app_of(Each()).arun()
    named = {entry["action"]: entry["where"] for entry in blocked(logs)}
    assert {"the source of 'Each'", "action 'Each'"} <= set(named)
    assert any("step" in name for name in named)


async def test_fan_out_by_itself_is_watched() -> None:
    with capture_logs() as logs:

        async def block() -> None:
            until(lambda: blocked(logs))

        async with Runtime():
            async for _ in fan_out([block()]):
                pass
    assert [entry["action"] for entry in blocked(logs)] == ["subtask 0"]


async def test_waiting_threads_and_short_steps_are_not_blocking() -> None:
    @action(reads=[], writes=[])
    def in_a_thread(state: State) -> State:
        time.sleep(0.15)
        return state

    @action(reads=[], writes=[])
    async def waiting(state: State) -> AsyncIterator[Any]:
        await anyio.sleep(0.15)
        yield state

    with capture_logs() as logs:
        await app_of(in_a_thread, waiting).arun()
    assert not blocked(logs)


async def test_the_threshold_can_be_set_and_off_watches_nothing() -> None:
    @action(reads=[], writes=[])
    async def step(state: State) -> State:
        time.sleep(0.15)  # noqa: ASYNC251 - the mistake
        await checkpoint()
        return state

    for app in (app_of(step, check="off"), _patient(step)):
        with capture_logs() as logs:
            await app.arun()
        assert not blocked(logs)


def _patient(step: Any) -> Any:
    from arun import ApplicationBuilder

    return ApplicationBuilder().with_actions(step).with_check("error", blocked_after=60).build()


async def test_the_watchdog_ends_when_nothing_runs() -> None:
    @action(reads=[], writes=[])
    async def step(state: State) -> State:
        return state

    await app_of(step).arun()
    with anyio.fail_after(10):
        while any(thread.name == "arun watchdog" for thread in threading.enumerate()):
            await anyio.sleep(0.05)
    await app_of(step).arun()
    assert any(thread.name == "arun watchdog" for thread in threading.enumerate())
