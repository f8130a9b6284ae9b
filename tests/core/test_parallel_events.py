"""Events of subtasks, and the paths that they came through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from arun import (
    GraphBuilder,
    Item,
    MapStates,
    Policy,
    RunnableGraph,
    Runtime,
    State,
    SubtaskFinished,
    SubtaskStarted,
    action,
)
from tests.core.parallel_programs import Each, Squares, app_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


@action(reads=["x"], writes=["y"])
async def chatty(state: State) -> AsyncIterator[Any]:
    yield f"item {state['x']}"
    yield state.update(y=state["x"])


class Chatty(Squares):
    policy = Policy(limit=1)

    def action(self, state: State, inputs: Any) -> Any:
        return chatty


class Outer(MapStates):
    """Chatty in a sub-graph in a map: a parallel action in a parallel action."""

    reads, writes = ["sets"], ["ys"]
    policy = Policy(limit=1)

    def action(self, state: State, inputs: Any) -> Any:
        graph = GraphBuilder().with_actions(Chatty().with_name("chat")).build()
        return RunnableGraph(graph, "chat").with_name("inner")

    def states(self, state: State, context: Any, inputs: Any) -> Any:
        return [state.update(xs=xs) for xs in state["sets"]]

    async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
        return state.update(ys=[done["ys"] async for done in states])


async def test_items_of_subtasks_are_events_with_the_path_that_they_came_through(runtime: Runtime) -> None:
    events = [event async for event in app_of(Chatty().with_name("chat"), xs=[7, 8]).astream()]
    items = [(event.path, event.action, event.values) for event in events if isinstance(event, Item)]
    assert items == [
        (("chat", "chatty[0]"), "chatty", ["item 7"]),
        (("chat", "chatty[1]"), "chatty", ["item 8"]),
    ]
    labels = [(e.label, e.ordinal) for e in events if isinstance(e, SubtaskStarted)]
    assert labels == [("chatty(x=7)", 0), ("chatty(x=8)", 1)]
    assert all(e.error is None and e.seconds >= 0 for e in events if isinstance(e, SubtaskFinished))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


async def test_paths_are_nested_as_the_actions_are(runtime: Runtime) -> None:
    app = app_of(Outer().with_name("outer"), sets=[[1], [2]])
    items = [(e.path, e.values) async for e in app.astream() if isinstance(e, Item)]
    assert items == [
        (("outer", "inner[0]", "inner", "chat", "chatty[0]"), ["item 1"]),
        (("outer", "inner[1]", "inner", "chat", "chatty[0]"), ["item 2"]),
    ]
    assert app.state["ys"] == [[1], [2]]


async def test_a_key_is_the_branch_and_a_failure_is_told(runtime: Runtime) -> None:
    async def work(i: int) -> int:
        raise ValueError("no")

    each = Each(work, source=lambda task: [task(1, key="the key", label="the label")], on_error="skip")
    events = [event async for event in app_of(each.with_name("each")).astream()]
    finished = [event for event in events if isinstance(event, SubtaskFinished)]
    assert [(e.path, e.label, e.error) for e in finished] == [(("each", "the key"), "the label", "ValueError: no")]
