"""with_timeout(): a time limit on each item of a stream, which goes on afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from arun import (
    ActionFinished,
    ApplicationBuilder,
    Item,
    MapStates,
    MisuseError,
    RunFailed,
    State,
    action,
    fan_out,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]
#: Seconds after which what waits for an event that nobody sets is given up.
SOON = 0.01


async def read(stream: AsyncIterator[Any], into: list[Any]) -> None:
    async for event in stream:
        into.append(event)  # noqa: PERF401 - what came before an error is kept


async def test_a_stream_of_events_goes_on_after_a_timeout() -> None:
    go = anyio.Event()

    @action(reads=[], writes=["n"])
    async def talk(state: State) -> AsyncIterator[Any]:
        yield "one"
        await go.wait()
        yield "two"
        yield state.update(n=1)

    stream = ApplicationBuilder().with_actions(talk).build().astream()
    events: list[Any] = []
    while not any(isinstance(event, Item) for event in events):
        events.append(await anext(stream))
    patient = stream.with_timeout(SOON)
    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"nothing came for 0\.01 s; the stream goes on"):
            await read(patient, events)
    go.set()
    await read(stream.with_timeout(60), events)
    assert [event.values for event in events if isinstance(event, Item)] == [["one"], ["two"]]
    assert any(isinstance(event, ActionFinished) for event in events)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert stream.result.state["n"] == 1


async def test_a_failing_run_is_told_of_also_after_a_timeout() -> None:
    go = anyio.Event()

    @action(reads=[], writes=[])
    async def fails(state: State) -> State:
        await go.wait()
        raise LookupError("gone")

    stream = ApplicationBuilder().with_actions(fails).build().astream()
    events: list[Any] = []
    with pytest.raises(TimeoutError):
        await read(stream.with_timeout(SOON), events)
    go.set()
    with pytest.raises(LookupError, match="gone"):
        await read(stream.with_timeout(60), events)
    assert isinstance(events[-1], RunFailed)


async def test_outcomes_of_a_fan_out_go_on_after_a_timeout() -> None:
    go = anyio.Event()

    async def value(n: int) -> int:
        await go.wait()
        return n

    outcomes = fan_out(value(n) for n in range(3))
    with pytest.raises(TimeoutError):
        await anext(outcomes.with_timeout(SOON))
    go.set()
    assert sorted([outcome.value async for outcome in outcomes.with_timeout(60)]) == [0, 1, 2]


async def test_a_reducer_may_do_something_while_nothing_comes() -> None:
    go = anyio.Event()

    @action(reads=["n"], writes=["n"])
    async def wait(state: State) -> State:
        await go.wait()
        return state.increment(n=1)

    class Waits(MapStates):
        reads, writes = ["n"], ["n"]

        def action(self, state: State, inputs: Any) -> Any:
            return wait

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return (state.update(n=n) for n in range(3))

        async def reduce(self, state: State, states: Any) -> AsyncIterator[State]:
            total = timeouts = 0
            while True:
                try:
                    async for done in states.with_timeout(60 if go.is_set() else SOON):
                        total += done["n"]
                    break
                except TimeoutError:
                    timeouts += 1
                    yield state.update(n=-timeouts)
                    go.set()
            assert timeouts == 1
            yield state.update(n=total)

    _, _, state = await ApplicationBuilder().with_actions(Waits()).with_state(n=0).build().arun()
    assert state["n"] == 6


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
async def test_it_takes_a_number_of_seconds_above_zero(seconds: float) -> None:
    with pytest.raises(MisuseError, match=r"with_timeout\(.*\): it takes a number of seconds above 0"):
        fan_out([]).with_timeout(seconds)
