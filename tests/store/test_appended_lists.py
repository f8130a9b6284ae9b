"""A list that is appended to: no more is written down than was appended, and it comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun import Application, ApplicationBuilder, GraphBuilder, MapStates, MemoryStore, MisuseError, State, action
from arun.subgraphs import RunnableGraph

Open = Callable[[], Any]
Change = Callable[[State], State]


def app_of(store: Any, change: Change, chat: list[Any] | None = None) -> Application:
    """An application whose every step makes the change; ``chat`` is what the program starts with."""

    @action(reads=[], writes=["chat"])
    async def step(state: State) -> State:
        return change(state)

    builder = ApplicationBuilder().with_actions(step=step).with_transitions(("step", "step")).with_entrypoint("step")
    # Strict checks refuse what some of these tests are about.
    builder.with_check("error").with_identifiers(app_id="a").with_store(store)
    return builder.with_state(State({} if chat is None else {"chat": chat})).build()


async def loaded(store: Any) -> dict[str, Any]:
    app = app_of(store, lambda state: state)
    await app.load()
    return app.state.get_all()


async def written(store: Any) -> list[int]:
    """How many bytes each step has written."""
    lease = (await store.open_run("a", None)).lease
    steps = (await store.load(lease)).steps
    await store.close_run(lease)
    return [len(step.delta) for step in steps]


@pytest.mark.anyio
@pytest.mark.parametrize("ever_new", [False, True])
async def test_a_step_writes_what_it_appended_and_not_the_list_again(open_store: Open, ever_new: bool) -> None:
    async with open_store() as store:

        def say(state: State) -> State:
            return state.append(chat="x" * 1000).extend(chat=["y" * 1000])

        app = app_of(store, say)
        for _ in range(10):
            if ever_new:  # as in a service, where each request makes one
                app = app_of(store, say)
            await app.arun(halt_after="step")
        assert max(await written(store)) < 2100
        assert (await loaded(store))["chat"] == ["x" * 1000, "y" * 1000] * 10


@pytest.mark.anyio
async def test_what_a_reducer_or_a_sub_graph_appends_is_written_alone_too(open_store: Open) -> None:
    @action(reads=[], writes=["word"])
    async def work(state: State) -> State:
        return state.update(word="x" * 1000)

    @action(reads=["chat"], writes=["chat"])
    async def say(state: State) -> State:
        return state.append(chat="y" * 1000)

    class Ask(MapStates):
        reads, writes = ["chat"], ["chat"]

        def action(self, state: State, inputs: Any) -> Any:
            return work

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return [state.update(n=n) for n in range(2)]

        async def reduce(self, state: State, states: Any) -> Any:
            async for done in states:
                state = state.append(chat=done["word"])
                yield state

    turns = GraphBuilder().with_actions(ask=Ask(), say=say).with_transitions(("ask", "say")).build()

    def build() -> Application:
        builder = ApplicationBuilder().with_actions(step=RunnableGraph(turns, "ask")).with_transitions(("step", "step"))
        return builder.with_identifiers(app_id="a").with_store(store).with_state(chat=[]).build()

    async with open_store() as store:
        for _ in range(5):
            state = (await build().arun(halt_after="step")).state
        assert max(await written(store)) < 3100
        app = build()
        await app.load()
        assert app.state["chat"] == state["chat"] == ["x" * 1000, "x" * 1000, "y" * 1000] * 5


def _list_in_place_before(state: State) -> State:
    state["chat"].append("in place")
    return state.append(chat="b")


def _new_list_in_place(state: State) -> State:
    state = state.append(chat="a")
    state["chat"].sort()
    return state


def _new_list_shortened(state: State) -> State:
    state = state.append(chat="b")
    del state["chat"][:2]
    return state


def _old_list_in_place_after(state: State) -> State:
    old, state = state["chat"], state.append(chat="b")
    old.append("in place")
    return state


@pytest.mark.anyio
@pytest.mark.parametrize(
    "change", [_list_in_place_before, _new_list_in_place, _new_list_shortened, _old_list_in_place_after]
)
async def test_a_list_that_was_changed_in_place_besides_is_written_as_it_is(open_store: Open, change: Change) -> None:
    async with open_store() as store:
        app = app_of(store, change, ["z", "y"])
        for _ in range(2):
            state = (await app.arun(halt_after="step")).state
            assert (await loaded(store))["chat"] == state["chat"]


@pytest.mark.anyio
async def test_what_is_appended_to_an_earlier_state_is_written_as_a_whole(open_store: Open) -> None:
    earlier: list[State] = []

    def change(state: State) -> State:
        earlier.append(state)
        return earlier[0].append(chat="b") if len(earlier) > 1 else state.update(chat=["as many"])

    async with open_store() as store:
        app = app_of(store, change, ["a"])
        for _ in range(2):
            await app.arun(halt_after="step")
        assert (await loaded(store))["chat"] == app.state["chat"] == ["a", "b"]


@pytest.mark.anyio
async def test_a_list_that_only_the_program_knew_is_written_as_a_whole(open_store: Open) -> None:
    async with open_store() as store:

        @action(reads=[], writes=[])
        async def begin(state: State) -> State:
            return state

        @action(reads=["chat"], writes=["chat"])
        async def say(state: State) -> State:
            return state.append(chat="new")

        def build(**given: Any) -> Application:
            builder = ApplicationBuilder().with_actions(begin, say).with_transitions(("begin", "say"), ("say", "begin"))
            builder.with_entrypoint("begin").with_identifiers(app_id="a").with_store(store)
            return builder.with_state(**given).build()

        await build().arun(halt_after="begin")
        await build(chat=["given"]).arun(halt_after="say")
        app = build()
        await app.load()
        assert app.state["chat"] == ["given", "new"]


@pytest.mark.anyio
async def test_what_can_not_be_stored_is_named_by_its_place_in_the_whole_list(open_store: Open) -> None:
    async with open_store() as store:
        app = app_of(store, lambda state: state.append(chat=object()), [1, 2])
        with pytest.raises(MisuseError, match=r"wrote state\['chat'\]\[2\] of type object, which can't be stored"):
            await app.arun(halt_after="step")


_CHANGES: dict[str, Change] = {
    "append": lambda state: state.append(chat=len(state.get("chat", ""))),
    "append twice": lambda state: state.append(chat=(1,)).append(chat={2}),
    "extend": lambda state: state.extend(chat=[[], "b"]),
    "update, append": lambda state: state.update(chat=["new"]).append(chat="c"),
    "append, update": lambda state: state.append(chat="d").update(chat=["newer", "e"]),
    "wipe": lambda state: state.wipe(delete=["chat"]),
    "wipe, append": lambda state: state.wipe(delete=["chat"]).append(chat="f"),
    "append, wipe": lambda state: state.append(chat="g").wipe(delete=["chat"]),
    "append to another": lambda state: State({"chat": ["h"]}).append(chat="i"),
    "append, merge": lambda state: state.append(chat="j").merge({"chat": [*state.get("chat", ""), "k"]}),
}


@given(
    lives=st.lists(st.lists(st.sampled_from([*_CHANGES, "update_state"]), min_size=1, max_size=4), max_size=4),
    chat=st.sampled_from([None, [], ["a", ["b"]]]),
)
def test_whatever_is_done_to_a_list_it_comes_back_as_it_was(lives: list[list[str]], chat: list[Any] | None) -> None:
    async def live() -> None:
        store = MemoryStore()
        changes: list[Change] = []
        for life in lives:
            app = app_of(store, lambda state: changes.pop()(state), chat)
            await app.load()
            for name in life:
                if name == "update_state":
                    app.update_state(app.state.append(chat="set"))
                changes.append(_CHANGES.get(name, _CHANGES["append"]))
                state = (await app.arun(halt_after="step")).state
                assert await loaded(store) == state.get_all()

    anyio.run(live)
