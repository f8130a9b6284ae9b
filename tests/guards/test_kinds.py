"""Rows 6 and 7: values of the wrong kind are refused by name, with what to write instead."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest

from arun import ApplicationBuilder, MapActions, MapStates, MisuseError, Runtime, State, action, fan_out
from tests.guards.programs import app_of, place, raised_at

pytestmark = pytest.mark.anyio


async def fetch(n: int = 1) -> int:
    return n


async def pages() -> AsyncIterator[int]:
    yield 1


def rows() -> Iterator[int]:
    yield 1


#: what was given, what that is called, and what to write
WRONG: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: fetch(1), "a coroutine", r"await it: `await fetch\(...\)`"),
    (lambda: pages(), "an async generator", r"`async for item in pages\(...\):`"),
    (lambda: rows(), "a generator", r"`for item in rows\(...\):`"),
    (lambda: pages, "an async generator function that was not called", r"`pages\(...\)`"),
    (lambda: fetch, "a function that was not called", r"`fetch\(...\)`"),
    (lambda: [1], r"a list, \[1\]", "State"),
    (lambda: 3, "an int, 3", "State"),
    (lambda: State, "a class", r"`State\(...\)`"),
    (lambda: None, "None", "State"),
]


@pytest.mark.parametrize(("wrong", "kind", "fix"), WRONG)
async def test_an_action_that_returns_the_wrong_kind(wrong: Callable[[], Any], kind: str, fix: str) -> None:
    @action(reads=[], writes=[])
    async def step(state: State) -> Any:
        return wrong()

    @action(reads=[], writes=[])
    def threaded(state: State) -> Any:
        return wrong()

    for one in (step, threaded):
        with pytest.raises(MisuseError, match=f"action '{one.name}' returned {kind}.*{fix}"):
            await app_of(one).arun()


@pytest.mark.parametrize("operation", ["update", "append", "extend"])
async def test_a_forgotten_await_in_the_state(operation: str) -> None:
    @action(reads=[], writes=["answer"])
    async def step(state: State) -> Any:
        return getattr(state, operation)(answer=fetch(1))

    with pytest.raises(MisuseError, match=rf"a coroutine.*{operation}\(answer=await fetch\(...\)\)") as caught:
        await app_of(step).arun()
    assert any(entry.path.samefile(__file__) for entry in caught.traceback[-3:])  # at the user's own line


async def test_deleting_the_last_yield_of_a_generator() -> None:
    @action(reads=[], writes=[])
    async def step(state: State) -> Any:
        state.update(n=1)

    with pytest.raises(MisuseError, match="returned None; an action returns or yields a State") as caught:
        await app_of(step).arun()
    assert __file__ in str(caught.value)


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_an_item_that_was_not_awaited_or_iterated_over(number: int) -> None:
    wrong, kind, fix = WRONG[number]

    @action(reads=[], writes=[])
    async def step(state: State) -> AsyncIterator[Any]:
        yield wrong()  # here
        yield state

    @action(reads=[], writes=[], hosted=True)
    async def hosted(state: State) -> AsyncIterator[Any]:
        yield wrong()  # hosted
        yield state

    for one, marker in ((step, "here"), (hosted, "hosted")):
        with pytest.raises(MisuseError, match=f"yielded {kind}.*{fix}") as caught:
            await app_of(one).arun()
        assert raised_at(caught.value) == place(test_an_item_that_was_not_awaited_or_iterated_over, f"()  # {marker}")


@action(reads=[], writes=["y"])
async def one(state: State) -> State:
    return state.update(y=1)


def mapping(give: Callable[[State], Any]) -> MapStates:
    class Mapping(MapStates):
        writes = ("y",)

        def action(self, state: State, inputs: Any) -> Any:
            return one

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return give(state)

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(y=len([done async for done in states]))

    return Mapping()


@pytest.mark.parametrize(("wrong", "kind", "fix"), [one for one in WRONG if one[2] != r"`State\(...\)`"])
async def test_a_state_of_the_wrong_kind_is_refused_at_its_yield(wrong: Callable[[], Any], kind: str, fix: str) -> None:
    async def give(state: State) -> AsyncIterator[Any]:
        yield state
        yield wrong()  # here

    with pytest.raises(MisuseError, match=f"Mapping.states gave {kind}.*{fix}") as caught:
        await app_of(mapping(give)).arun()
    assert raised_at(caught.value) == place(test_a_state_of_the_wrong_kind_is_refused_at_its_yield)


async def test_states_that_are_no_iterable() -> None:
    async def deep(state: State) -> Any:
        return pages

    for give, message in (
        (lambda state: None, "states gave None, which is no iterable of states; make it a generator: async def states"),
        (lambda state: state, "states gave a State, "),
        (lambda state: pages, r"states gave an async generator function that was not called.*call it.*`pages\(...\)`"),
        (lambda state: "text", "states gave a str, 'text'"),
    ):
        with pytest.raises(MisuseError, match=message):
            await app_of(mapping(give)).arun()


async def test_any_iterable_will_do() -> None:
    async def agen(state: State) -> AsyncIterator[State]:
        yield state

    async def coroutine(state: State) -> list[State]:
        return [state]

    async def coroutine_of_generator(state: State) -> AsyncIterator[State]:
        return agen(state)

    for give in (agen, coroutine, coroutine_of_generator, lambda s: [s], lambda s: (s,), lambda s: iter([s])):
        assert (await app_of(mapping(give)).arun()).state["y"] == 1


async def test_an_action_of_the_wrong_kind_is_refused_at_its_yield() -> None:
    class Many(MapActions):
        writes = ("y",)

        async def actions(self, state: State, context: Any, inputs: Any) -> AsyncIterator[Any]:
            yield one
            yield fetch  # here

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(y=len([done async for done in states]))

    with pytest.raises(MisuseError, match=r"Many.actions: .*fetch.* is not an action; decorate") as caught:
        await app_of(Many()).arun()
    assert raised_at(caught.value) == place(Many)


@pytest.mark.parametrize(("wrong", "kind", "fix"), WRONG)
async def test_a_reduce_that_returns_the_wrong_kind(wrong: Callable[[], Any], kind: str, fix: str) -> None:
    class Wrong(type(mapping(lambda state: [state]))):  # type: ignore[misc]  # a class made in a function
        async def reduce(self, state: State, states: AsyncIterator[State]) -> Any:
            async for _ in states:
                pass
            return wrong()

    with pytest.raises(MisuseError, match=f"Wrong.reduce returned {kind}.*{fix}"):
        await app_of(Wrong()).arun()


async def test_fan_out_over_the_wrong_kind() -> None:
    async with Runtime():
        for source, message in (
            ([3], "was given an int, 3; yield the awaitable itself"),
            ([pages()], "was given an async generator.*async for item in pages"),
            ([pages], "returned an async generator.*`async def` without yield"),
            (pages, "the source of .* is an async generator function that was not called.*`pages"),
            (7, "the source of .* is an int, 7, which can't be iterated over"),
        ):
            with pytest.raises(MisuseError, match=message):
                async for _ in fan_out(source):
                    pass


def test_resources_that_no_action_could_use() -> None:
    for wrong, kind, _ in WRONG[:2]:
        with pytest.raises(MisuseError, match=rf"with_resources\(engine=...\) was given {kind}"):
            ApplicationBuilder().with_resources(engine=wrong())
    ApplicationBuilder().with_resources(factory=fetch, kind=State, items=[1], event=anyio.Event)


def test_actions_of_the_wrong_kind() -> None:
    for wrong in (fetch, 3, None, MapStates):
        with pytest.raises(MisuseError, match="with_actions"):
            ApplicationBuilder().with_actions(wrong)
