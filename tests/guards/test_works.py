"""Rows 5, 10, 14, 16, 18, 23 and 25: what breaks elsewhere and works here; and row 17, which ends."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

import arun.hosting
from arun import Item, MapStates, Policy, Runtime, State, action, fan_out
from arun.errors import AbandonedWork
from tests.guards.programs import app_of

pytestmark = pytest.mark.anyio

var: ContextVar[str] = ContextVar("var", default="unset")


class Each(MapStates):
    """Runs ``work`` on every state of ``source``; ``y`` becomes what ``total`` makes of the results."""

    writes = ("y",)
    work: Any = None
    source: Any = staticmethod(lambda state: (state.update(i=i) for i in range(10)))
    total: Any = None

    def action(self, state: State, inputs: Any) -> Any:
        return self.work

    def states(self, state: State, context: Any, inputs: Any) -> Any:
        return self.source(state)

    async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
        if self.total is not None:
            return state.update(y=await self.total(states))
        return state.update(y=sorted([done["y"] async for done in states]))


def each(work: Any, policy: Policy | None = None, **attributes: Any) -> Each:
    made = Each()
    made.work, made.policy = work, policy or Policy()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@action(reads=["i"], writes=["y"])
async def same(state: State) -> State:
    return state.update(y=state["i"])


async def test_a_timeout_around_the_next_item_leaves_a_stream_usable() -> None:
    go = anyio.Event()

    @action(reads=[], writes=["n"])
    async def step(state: State) -> AsyncIterator[Any]:
        yield 0
        await go.wait()
        for i in range(1, 5):
            yield i
        yield state.update(n=1)

    got: list[int] = []
    async with Runtime():
        stream = app_of(step).astream()
        while True:
            with anyio.move_on_after(0.05) as scope:
                event = await anext(stream, None)
                if event is None:
                    break
                if isinstance(event, Item):
                    got += event.values
            if scope.cancelled_caught:
                got.append(-1)
                go.set()
    assert [one for one, _ in itertools.groupby(got)] == [0, -1, 1, 2, 3, 4]


async def test_a_generator_that_never_awaits_can_be_cancelled() -> None:
    @action(reads=[], writes=[])
    async def endless(state: State) -> AsyncIterator[Any]:
        for i in itertools.count():
            yield i

    with anyio.move_on_after(0.05) as scope:
        await app_of(endless).arun()
    assert scope.cancelled_caught


async def test_a_reducer_that_returns_early_waits_for_the_clean_up_of_its_subtasks() -> None:
    running: set[int] = set()

    @action(reads=["i"], writes=["y"])
    async def slow(state: State) -> State:
        running.add(state["i"])
        try:
            if state["i"]:
                await anyio.sleep_forever()
            await anyio.sleep(0.01)
            return state.update(y=state["i"])
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.001)
            running.discard(state["i"])

    async def first(states: AsyncIterator[Any]) -> Any:
        async for done in states:
            assert len(running) == 9
            return done["y"]

    assert (await app_of(each(slow, total=first)).arun()).state["y"] == 0
    assert not running


async def test_one_error_is_raised_bare_with_a_note_and_several_as_a_group() -> None:
    async def bad(state: State) -> State:
        await anyio.sleep(0.001 * state["i"] * state["apart"])
        raise LookupError(state["i"])

    failing = action(reads=["i", "apart"], writes=["y"])(bad)
    with pytest.raises(LookupError) as caught:
        await app_of(each(failing), apart=20).arun()
    assert any("in bad(i=0)" in note for note in caught.value.__notes__)

    async def bad_clean_up(state: State) -> State:
        try:
            await anyio.sleep(0.001 if state["i"] == 0 else 10)
        finally:
            raise LookupError(state["i"])

    with pytest.raises(ExceptionGroup) as group:
        await app_of(each(action(reads=["i"], writes=["y"])(bad_clean_up))).arun()
    assert len(group.value.exceptions) == 10


async def test_context_variables_leak_neither_out_nor_from_one_subtask_into_another() -> None:
    seen: list[str] = []

    @action(reads=["i"], writes=["y"])
    async def setting(state: State) -> AsyncIterator[Any]:
        seen.append(var.get())
        token = var.set(f"subtask {state['i']}")
        yield "item"
        assert var.get() == f"subtask {state['i']}"
        var.reset(token)
        var.set("left behind")
        yield state.update(y=state["i"])

    async def reading(states: AsyncIterator[Any]) -> Any:
        async for _ in states:
            seen.append(var.get())
            var.set("caller")

    var.set("caller")
    await app_of(each(setting, total=reading)).arun()
    assert set(seen) == {"caller"}
    assert var.get() == "caller"


async def test_an_endless_source_starts_at_once_and_keeps_to_the_limit() -> None:
    made = 0
    in_flight: list[int] = []

    def endless(state: State) -> Any:
        nonlocal made
        for i in itertools.count():
            made += 1
            yield state.update(i=i)

    async def hundred(states: AsyncIterator[Any]) -> int:
        taken = 0
        async for _ in states:
            taken += 1
            in_flight.append(made - taken)
            if taken == 100:
                break
        return taken

    assert (await app_of(each(same, Policy(limit=7), source=endless, total=hundred)).arun()).state["y"] == 100
    assert max(in_flight) <= 7


async def test_items_of_a_branch_arrive_with_its_path() -> None:
    @action(reads=["i"], writes=["y"])
    async def streaming(state: State) -> AsyncIterator[Any]:
        yield f"item {state['i']}"
        yield state.update(y=state["i"])

    async with Runtime():
        events = [event async for event in app_of(each(streaming)).astream() if isinstance(event, Item)]
    assert sorted((event.path, event.values) for event in events) == [
        (("Each", f"streaming[{i}]"), [f"item {i}"]) for i in range(10)
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what was left behind
async def test_swallowed_cancellation_is_reported_and_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arun.hosting, "GRACE", 0.2)

    @action(reads=[], writes=[])
    async def deaf(state: State) -> State:
        while True:
            try:
                await anyio.sleep(0.001)
            except BaseException:
                continue

    with capture_logs() as logs, pytest.warns(AbandonedWork, match=r"deaf at .*test_works.py:\d+ swallowed"):
        with anyio.fail_after(10), anyio.move_on_after(0.01):
            await app_of(deaf).arun()
    assert [entry["event"] for entry in logs] == ["cancellation.swallowed", "work.abandoned"]
    assert "deaf at" in logs[0]["where"]


async def test_fan_out_ends_at_a_break_followed_by_aclose() -> None:
    cleaned: list[int] = []
    running, all_run = 0, anyio.Event()

    async def slow(i: int) -> int:
        nonlocal running
        try:
            running += 1
            if running == 10:
                all_run.set()
            if i:
                await anyio.sleep_forever()
            await all_run.wait()
            return i
        finally:
            cleaned.append(i)

    async with Runtime():
        outcomes = fan_out(slow(i) for i in range(10))
        async for _ in outcomes:
            break
        await outcomes.aclose()
    assert sorted(cleaned) == list(range(10))
