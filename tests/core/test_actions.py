"""Every kind of callable as an action, and what an action is held to."""

from __future__ import annotations

import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from arun import ApplicationBuilder, ApplicationContext, MisuseError, Partial, Runtime, State, action
from tests.core.action_programs import app_of, items_of, run, scaled

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


# -- kinds -----------------------------------------------------------------------------------------


async def test_an_async_generator_yields_items_and_at_last_a_state(runtime: Runtime) -> None:
    @action(reads=["n"], writes=["n"])
    async def step(state: State) -> AsyncIterator[Any]:
        yield "item"
        yield state.update(n=10)
        yield {"a": 1}
        yield state.update(n=11)

    assert await run(step, n=1) == {"n": 11}
    assert await items_of(step, n=1) == ["item", {"a": 1}]
    partials = [e.changed async for e in app_of(step, n=1).astream() if isinstance(e, Partial)]
    assert partials == [{"n": 10}, {"n": 11}]


async def test_a_coroutine_returns_a_state_or_a_result_with_it() -> None:
    @action(reads=[], writes=["n"])
    async def bare(state: State) -> State:
        await checkpoint()
        return state.update(n=1)

    @action(reads=[], writes=["n"])
    async def pair(state: State) -> tuple[dict[str, int], State]:
        return {"r": 1}, state.update(n=1)

    assert (await app_of(bare).arun()).result is None
    assert (await app_of(pair).arun()).result == {"r": 1}


async def test_a_plain_function_runs_in_a_thread_while_the_loop_goes_on() -> None:
    entered, leave = threading.Event(), threading.Event()

    @action(reads=[], writes=["where"])
    def blocking(state: State) -> State:
        entered.set()
        assert leave.wait(30)
        return state.update(where=threading.get_ident())

    async def let_go() -> None:
        while not entered.is_set():
            await checkpoint()  # the loop turns while the function blocks
        leave.set()

    async with anyio.create_task_group() as group:
        group.start_soon(let_go)
        assert (await run(blocking))["where"] != threading.get_ident()


async def test_a_function_that_does_not_block_runs_inline() -> None:
    @action(reads=[], writes=["where"], blocking=False)
    def inline(state: State) -> State:
        return state.update(where=threading.get_ident())

    assert (await run(inline))["where"] == threading.get_ident()


async def test_a_plain_generator_is_stepped_on_one_other_thread(runtime: Runtime) -> None:
    @action(reads=[], writes=["n"])
    def step(state: State) -> Iterator[Any]:
        try:
            yield threading.get_ident()
            yield threading.get_ident()
            yield state.update(n=1)
        finally:
            threads.append(threading.get_ident())

    threads: list[int] = []
    seen = await items_of(step)
    assert len({*seen, *threads}) == 1
    assert seen[0] != threading.get_ident()
    assert await run(step) == {"n": 1}


async def test_burrs_streaming_form_streams_all_but_the_last_pair(runtime: Runtime) -> None:
    @action(reads=[], writes=["text"])
    async def stream(state: State) -> AsyncIterator[tuple[dict[str, str], State | None]]:
        yield {"delta": "a"}, None
        yield {"delta": "b"}, None
        yield {"text": "ab"}, state.update(text="ab")

    @action(reads=[], writes=["text"])
    def plain(state: State) -> Iterator[tuple[dict[str, str], State | None]]:
        yield {"delta": "a"}, None
        yield {"text": "a"}, state.update(text="a")

    assert await items_of(stream) == [{"delta": "a"}, {"delta": "b"}]
    assert (await app_of(stream).arun())[1:] == ({"text": "ab"}, {"text": "ab"})
    assert await items_of(plain) == [{"delta": "a"}]


class Callables:
    async def __call__(self, state: State, by: int = 1) -> State:
        return state.update(n=by)

    async def method(self, state: State, by: int = 1) -> AsyncIterator[State]:
        yield state.update(n=by)


async def _three(scale: int, state: State, by: int = 1) -> State:
    return state.update(n=scale * by)


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@logged
async def _decorated(state: State, by: int = 1) -> State:
    return state.update(n=by)


@logged
@logged
async def _decorated_generator(state: State, by: int = 1) -> AsyncIterator[State]:
    yield state.update(n=by)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Callables(), 5),
        (Callables().method, 5),
        (functools.partial(_three, 2), 10),
        (functools.partial(Callables(), by=5), 5),
        (functools.partial(functools.partial(_three, 2), by=5), 10),
        (_decorated, 5),
        (staticmethod(_decorated), 5),
        (_decorated_generator, 5),
        (lambda state, by: state.update(n=by), 5),
        (functools.lru_cache(lambda _state, by: State({"n": by})), None),
    ],
)
async def test_objects_partials_and_decorated_functions_are_actions(function: Any, expected: int | None) -> None:
    step = action(reads=[], writes=["n"])(function)
    if expected is not None:
        assert await run(step.with_name("step"), inputs={"by": 5}) == {"n": expected}


@pytest.mark.parametrize("candidate", [Callables, 3, None, "name", _three(1, State()).close()])
def test_what_is_no_function_is_refused_at_the_decorator(candidate: Any) -> None:
    with pytest.raises(MisuseError, match="@action takes a function, not"):
        action(reads=[], writes=[])(candidate)


def test_an_action_is_not_made_an_action_again() -> None:
    once = action(reads=[], writes=["n"])(lambda state: state.update(n=1))
    with pytest.raises(MisuseError, match=r"@action on <Action <lambda> .*>, which is an action already"):
        action(reads=[], writes=[])(once)


def test_a_function_without_a_state_and_a_name_for_a_list_are_refused() -> None:
    with pytest.raises(MisuseError, match="first parameter is the State"):
        action(reads=[], writes=[])(lambda: None)
    with pytest.raises(MisuseError, match=r"reads=\['prompt'\]"):
        action(reads="prompt", writes=[])
    with pytest.raises(MisuseError, match=r"writes=None; a list of names is meant: writes=\[\]"):
        action(reads=[], writes=None)  # type: ignore[arg-type]  # what is refused


def test_a_method_is_refused_at_the_decorator() -> None:
    async def greet(self: Any, state: State) -> State:
        return state

    with pytest.raises(MisuseError, match=r"a method, whose first parameter .*\(self\.greet\)"):
        action(reads=[], writes=[])(greet)


@pytest.mark.parametrize(
    "returned",
    [None, 3, {"n": 1}, ({"n": 1}, None), (1, 2, 3), _three],
)
async def test_an_action_that_returns_no_state_says_what_to_write(returned: Any) -> None:
    @action(reads=[], writes=[])
    async def step(state: State) -> Any:
        return returned

    with pytest.raises(MisuseError, match=r"action 'step' returned .*return state\.update"):
        await run(step)


async def test_a_forgotten_await_is_named_and_leaves_no_coroutine() -> None:
    @action(reads=[], writes=["n"], blocking=False)
    def step(state: State) -> Any:
        return _three(1, state)

    with pytest.raises(MisuseError, match="returned a coroutine"):
        await run(step)


async def test_a_generator_that_yields_no_state_says_what_to_write() -> None:
    @action(reads=[], writes=[])
    async def step(state: State) -> AsyncIterator[int]:
        yield 1

    with pytest.raises(MisuseError, match="'step' ended without yielding a State"):
        await run(step)


# -- inputs ----------------------------------------------------------------------------------------


async def test_a_missing_input_names_action_input_and_what_there_is() -> None:
    with pytest.raises(MisuseError, match=r"action 'scaled' needs 'by', .*there are: scale\)"):
        await run(scaled, inputs={"scale": 2})


async def test_the_context_is_given_to_who_asks_for_it() -> None:
    @action(reads=[], writes=["seen"])
    async def step(state: State, __context: ApplicationContext) -> State:
        return state.update(seen=(__context.app_id, __context.action_name, __context.sequence_id, __context.path))

    app = ApplicationBuilder().with_actions(step).with_identifiers(app_id="me", partition_key="p").build()
    assert (await app.arun()).state["seen"] == ("me", "step", 0, ())
    assert app.partition_key == "p"


async def test_of_names_with_two_underscores_only_the_context_is_handed_over() -> None:
    @action(reads=[], writes=[])
    async def traced(state: State, __tracer: Any) -> State:
        return state

    with pytest.raises(
        MisuseError, match="action 'traced' asks for '__tracer'; __context is the only such name that there is"
    ):
        await run(traced)


# -- reads and writes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda state: state["secret"],
        lambda state: state.get("secret"),
        lambda state: state.append(secret=1),
        lambda state: state.increment(secret=1),
    ],
)
async def test_reading_an_undeclared_key_names_action_and_key(read: Callable[[State], Any]) -> None:
    @action(reads=["n"], writes=[])
    async def peek(state: State) -> State:
        read(state)
        return state

    with pytest.raises(MisuseError, match=r"action 'peek' reads state\['secret'\], .*it declares: n\)"):
        await run(peek, n=1, secret=2)


async def test_an_action_sees_only_what_it_declares_and_what_it_wrote() -> None:
    @action(reads=["n"], writes=["m"])
    async def look(state: State) -> State:
        assert "secret" not in state
        assert dict(state) == {"n": 1}
        return state.update(m=list(state.update(m=0)))

    assert (await run(look, n=1, secret=2))["m"] == ["n", "m"]


async def test_writing_an_undeclared_key_names_action_and_key() -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> State:
        return state.update(n=1, extra=2)

    with pytest.raises(MisuseError, match=r"action 'step' wrote 'extra', .*\(writes=\['n'\]\)"):
        await run(step)


@pytest.mark.parametrize("wiped", [{"delete": ["a"]}, {"keep": ["b"]}])
async def test_removing_an_undeclared_key_names_action_and_key(wiped: dict[str, list[str]]) -> None:
    @action(reads=["a"], writes=[])
    async def step(state: State) -> State:
        return state.wipe(**wiped)

    with pytest.raises(MisuseError, match=r"action 'step' removed 'a', .*\(writes=\[\]\)"):
        await run(step, a=1, b=2)


@pytest.mark.parametrize("wiped", [{"delete": ["answer"]}, {"keep": ["log"]}, {}])
async def test_a_declared_key_may_be_removed_before_anything_has_written_it(wiped: dict[str, list[str]]) -> None:
    @action(reads=[], writes=["log", "answer"])
    async def begin(state: State, prompt: str) -> State:
        return state.wipe(**wiped).append(log=prompt)

    for fields in ({"log": []}, {"log": [], "answer": "of the last turn"}):
        assert await run(begin, {"prompt": "Hi"}, **fields) == {"log": ["Hi"]}


async def test_writing_back_what_was_there_is_no_write() -> None:
    @action(reads=["a"], writes=["b"])
    async def step(state: State) -> State:
        return state.merge(state.update(b=1))

    assert await run(step, a=[1]) == {"a": [1], "b": 1}


async def test_not_writing_a_declared_key_names_action_and_key() -> None:
    @action(reads=[], writes=["a", "b"])
    async def step(state: State) -> State:
        return state.update(a=1)

    with pytest.raises(MisuseError, match=r"action 'step' declares .* did not write 'b'; it wrote: a"):
        await run(step)
    assert await run(step, b=2) == {"a": 1, "b": 2}  # the State has it all the same


async def test_an_action_may_return_a_state_of_its_own() -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> State:
        return State({"n": 1})

    assert await run(step, other=2) == {"n": 1, "other": 2}
