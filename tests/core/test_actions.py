"""Every kind of callable as an action, and what an action is held to."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import anyio
import anyio.from_thread
import pytest
from anyio.lowlevel import checkpoint

from arun import (
    Action,
    Application,
    ApplicationBuilder,
    ApplicationContext,
    Input,
    Item,
    MisuseError,
    Partial,
    Result,
    Runtime,
    SingleStepAction,
    State,
    action,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
setting: ContextVar[str] = ContextVar("setting", default="unset")


def app_of(what: Action, **fields: Any) -> Application:
    return ApplicationBuilder().with_actions(what).with_state(**fields).build()


async def run(what: Action, inputs: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return (await app_of(what, **fields).arun(inputs=inputs)).state.get_all()


async def items_of(what: Action, **fields: Any) -> list[Any]:
    return [v async for e in app_of(what, **fields).astream() if isinstance(e, Item) for v in e.values]


# -- kinds ------------------------------------------------------------------------------------------


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


def test_a_function_without_a_state_and_a_name_for_a_list_are_refused() -> None:
    with pytest.raises(MisuseError, match="first parameter is the State"):
        action(reads=[], writes=[])(lambda: None)
    with pytest.raises(MisuseError, match=r"reads=\['prompt'\]"):
        action(reads="prompt", writes=[])


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


# -- class actions ----------------------------------------------------------------------------------


class Add(Action):
    @property
    def reads(self) -> list[str]:  # type: ignore[override]
        return ["n"]

    @property
    def writes(self) -> list[str]:  # type: ignore[override]
        return ["n"]

    def update(self, result: Any, state: State) -> State:
        return state.update(**result)


class AddCoroutine(Add):
    async def run(self, state: State, by: int = 1) -> dict[str, int]:  # type: ignore[override]
        return {"n": state["n"] + by}


class AddFunction(Add):
    threads: ClassVar[list[int]] = []

    def run(self, state: State, by: int = 1) -> dict[str, int]:  # type: ignore[override]
        self.threads.append(threading.get_ident())
        return {"n": state["n"] + by}


class AddStreaming(Add):
    async def run(self, state: State, by: int = 1) -> AsyncIterator[dict[str, int]]:  # type: ignore[override]
        yield {"n": 0}
        yield {"n": state["n"] + by}


class AddStepped(Add):
    def run(self, state: State, by: int = 1) -> Iterator[dict[str, int]]:  # type: ignore[override]
        yield {"n": 0}
        yield {"n": state["n"] + by}


class AddAsBurrWritesIt(Add):
    """Inputs named in a property, taken in **run_kwargs."""

    @property
    def inputs(self) -> list[str]:
        return ["by"]

    async def run(self, state: State, **run_kwargs: Any) -> dict[str, int]:
        return {"n": state["n"] + run_kwargs["by"]}


class AddWithAsyncUpdate(AddCoroutine):
    async def update(self, result: Any, state: State) -> State:  # type: ignore[override]
        await checkpoint()
        return state.update(**result)


class AddInOneStep(SingleStepAction):
    reads, writes = ["n"], ["n"]

    async def run_and_update(self, state: State, by: int = 1) -> tuple[dict[str, int], State]:  # type: ignore[override]
        return {"n": state["n"] + by}, state.increment(n=by)


class AddInOneStepOpen(SingleStepAction):
    reads, writes = ["n"], ["n"]

    @property
    def inputs(self) -> tuple[Sequence[str], Sequence[str]]:
        return [], ["by"]

    def run_and_update(self, state: State, **inputs: Any) -> State:
        return state.increment(n=inputs["by"])


ADDERS = [
    AddCoroutine, AddFunction, AddStreaming, AddStepped, AddAsBurrWritesIt, AddWithAsyncUpdate, AddInOneStep,
    AddInOneStepOpen,
]  # fmt: skip


@pytest.mark.parametrize("kind", ADDERS)
async def test_class_actions_of_every_kind_run_and_update(kind: type[Action]) -> None:
    assert await run(kind().with_name("add"), inputs={"by": 4}, n=1) == {"n": 5}
    assert await run(kind().bind(by=3), n=1) == {"n": 4}


async def test_a_class_actions_items_are_streamed_and_the_last_is_its_result(runtime: Runtime) -> None:
    assert await items_of(AddStreaming(), n=1) == [{"n": 0}, {"n": 2}]
    assert await items_of(AddStepped(), n=1) == [{"n": 0}, {"n": 2}]
    assert (await app_of(AddStreaming(), n=1).arun()).result == {"n": 2}


async def test_a_class_actions_function_runs_in_a_thread() -> None:
    await run(AddFunction(), n=1)
    assert AddFunction.threads[-1] != threading.get_ident()


async def test_an_incomplete_class_action_says_what_is_missing() -> None:
    with pytest.raises(MisuseError, match=r"defines neither run\(\) nor"):
        await run(Action())

    class NoState(AddCoroutine):
        def update(self, result: Any, state: State) -> Any:
            return result

    with pytest.raises(MisuseError, match=r"update\(\) returned dict"):
        await run(NoState(), n=1)


async def test_input_and_result_are_actions() -> None:
    app = (
        ApplicationBuilder()
        .with_actions(Input("prompt", "n"), Result("prompt"))
        .with_transitions(("input", "result"))
        .with_entrypoint("input")
        .build()
    )
    what, result, state = await app.arun(inputs={"prompt": "Hi", "n": 1})
    assert (what.name, result, state["n"]) == ("result", {"prompt": "Hi"}, 1)  # type: ignore[union-attr]


# -- bind and with_name -----------------------------------------------------------------------------


@action(reads=[], writes=["n"])
async def scaled(state: State, by: int, scale: int = 1) -> State:
    return state.update(n=by * scale)


@pytest.mark.parametrize("base", [scaled, AddCoroutine()])
async def test_bind_and_with_name_chain_in_any_order_and_never_mutate(base: Action) -> None:
    before = dict(vars(base))
    for made in (base.bind(by=3).with_name("x"), base.with_name("x").bind(by=3), base.with_name("y").with_name("x")):
        assert made.name == "x"
        assert made.display_name == made.scope.action == "x"
    rebound = base.bind(by=1).bind(by=4)
    assert (await run(rebound, n=0))["n"] == 4
    assert {k: v for k, v in vars(base).items() if k in before} == before
    assert base.bound == {}


async def test_a_bound_input_is_no_input_any_more() -> None:
    assert scaled.inputs == (["by"], ["scale"])
    assert scaled.bind(by=1).inputs == ([], ["scale"])
    with pytest.raises(MisuseError, match="no action takes it"):
        await run(scaled.bind(by=1), inputs={"by": 2})


@pytest.mark.parametrize("base", [scaled, AddCoroutine(), AddAsBurrWritesIt()])
def test_binding_a_name_that_is_not_taken_names_the_nearest(base: Action) -> None:
    with pytest.raises(MisuseError, match=r"takes no input 'byy' \(did you mean 'by'\?\)"):
        base.bind(byy=1)


async def test_calling_an_action_calls_its_function() -> None:
    assert (await scaled(State(), by=2))["n"] == 2
    assert (await scaled.bind(by=2, scale=3)(State()))["n"] == 6
    assert "async" not in repr(scaled)
    assert repr(scaled).startswith("<Action scaled (coroutine scaled at ")


# -- inputs -----------------------------------------------------------------------------------------


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


# -- reads and writes -------------------------------------------------------------------------------


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


async def test_deleting_an_undeclared_key_is_writing_it() -> None:
    @action(reads=["a"], writes=[])
    async def step(state: State) -> State:
        return state.wipe(delete=["a"])

    with pytest.raises(MisuseError, match="wrote 'a'"):
        await run(step, a=1)


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


# -- what happens around an action ------------------------------------------------------------------


async def test_what_an_action_sets_in_its_context_does_not_leak() -> None:
    def setter(kind: str) -> Any:
        async def coroutine(state: State) -> State:
            seen.append(setting.get())
            setting.set("inside")
            await checkpoint()
            assert setting.get() == "inside"
            return state

        async def generator(state: State) -> AsyncIterator[State]:
            seen.append(setting.get())
            setting.set("inside")
            await checkpoint()
            yield state
            assert setting.get() == "inside"

        def function(state: State) -> State:
            seen.append(setting.get())
            setting.set("inside")
            return state

        return {"coroutine": coroutine, "generator": generator, "function": function}[kind]

    seen: list[str] = []
    setting.set("caller")
    for kind in ("coroutine", "generator", "function"):
        await run(action(reads=[], writes=[])(setter(kind)))
    assert seen == ["caller"] * 3
    assert setting.get() == "caller"


async def test_scopes_and_groups_inside_an_action_work() -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> State:
        done: list[int] = []

        async def child(i: int) -> None:
            await checkpoint()
            done.append(i)

        async with anyio.create_task_group() as group:
            for i in range(3):
                group.start_soon(child, i)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()
        with anyio.move_on_after(0):
            await anyio.sleep_forever()
        return state.update(n=len(done))

    assert await run(step) == {"n": 3}


@pytest.mark.usefixtures("asyncio_only")
async def test_asyncio_timeouts_and_groups_inside_an_action_work() -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> State:
        try:
            async with asyncio.timeout(0):
                await anyio.sleep_forever()
        except TimeoutError:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(asyncio.sleep(0, result=7))
            return state.update(n=task.result())
        return state

    assert await run(step) == {"n": 7}


async def test_an_action_may_catch_its_own_timeout() -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> AsyncIterator[State]:
        try:
            with anyio.fail_after(0):
                await anyio.sleep_forever()
        except TimeoutError:
            await checkpoint()
            yield state.update(n="late")

    assert await run(step) == {"n": "late"}


async def test_an_actions_own_error_comes_out_as_it_is_with_a_note() -> None:
    error = ExceptionGroup("mine", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])

    @action(reads=[], writes=[])
    async def step(state: State) -> State:
        raise error

    app = app_of(step)
    with pytest.raises(ExceptionGroup) as caught:
        await app.arun()
    assert caught.value is error
    assert error.__notes__ == [f"in action 'step' of application {app.uid!r}, step 0"]


# -- cancellation -----------------------------------------------------------------------------------


async def test_a_cancelled_generator_is_closed_and_its_clean_up_awaited() -> None:
    ready, cleaned = anyio.Event(), []

    @action(reads=[], writes=[])
    async def step(state: State) -> AsyncIterator[Any]:
        try:
            yield 1
            ready.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            cleaned.append(True)

    async with anyio.create_task_group() as group:
        group.start_soon(run, step)
        await ready.wait()
        group.cancel_scope.cancel()
    assert cleaned == [True]


@pytest.mark.parametrize("how", ["scope", "timeout", "task"])
async def test_a_cancelled_run_waits_for_the_thread_that_it_started(how: str, anyio_backend: str) -> None:
    if how != "scope" and anyio_backend != "asyncio":
        pytest.skip("asyncio's own cancellation")
    entered, leave, ended = threading.Event(), threading.Event(), threading.Event()

    @action(reads=[], writes=[])
    def step(state: State) -> State:
        anyio.from_thread.run_sync(in_thread.set)
        entered.set()
        assert leave.wait(30)
        ended.set()
        return state

    in_thread = anyio.Event()

    async def cancelled() -> None:
        if how == "scope":
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await run(step)
        elif how == "timeout":
            with pytest.raises(TimeoutError):  # noqa: PT012 - the timeout is what raises
                async with asyncio.timeout(None) as timeout:
                    scopes.append(timeout)
                    await run(step)
        else:
            task = asyncio.create_task(run(step))
            scopes.append(task)
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ended.is_set()

    scopes: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(cancelled)
        await in_thread.wait()
        match how:
            case "timeout":
                scopes[0].reschedule(0)
                await asyncio.sleep(0)
            case _:
                scopes[0].cancel()
        await anyio.wait_all_tasks_blocked()
        leave.set()


@pytest.mark.parametrize("how", ["scope", "task"])
@pytest.mark.parametrize("listening", [False, True])
async def test_an_endless_plain_generator_ends_when_its_run_is_cancelled(
    how: str, listening: bool, anyio_backend: str, runtime: Runtime
) -> None:
    if how == "task" and anyio_backend != "asyncio":
        pytest.skip("asyncio's own cancellation")
    stepping, closed = anyio.Event(), threading.Event()

    @action(reads=[], writes=[])
    def endless(state: State) -> Iterator[int]:
        try:
            while True:
                anyio.from_thread.run_sync(stepping.set)
                yield 1
        finally:
            closed.set()

    async def consume() -> None:
        if not listening:
            await run(endless)
        async with app_of(endless).astream() as stream:
            async for _ in stream:
                await anyio.sleep_forever()  # a consumer that never takes a second event

    if how == "task":
        task = asyncio.create_task(consume())
        await stepping.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            if listening:
                await anyio.wait_all_tasks_blocked()
            else:
                await stepping.wait()
            group.cancel_scope.cancel()
    if not listening:
        assert closed.is_set()


async def test_an_error_of_a_plain_generators_clean_up_is_raised() -> None:
    @action(reads=[], writes=[])
    def step(state: State) -> Iterator[Any]:
        try:
            yield state
        finally:
            raise OSError("clean-up")

    with pytest.raises(OSError, match="clean-up"):
        await run(step)


@pytest.mark.parametrize("error", [StopIteration(), StopAsyncIteration(), ValueError("x")])
async def test_what_a_function_raises_arrives(error: Exception) -> None:
    @action(reads=[], writes=[], blocking=False)
    def step(state: State) -> State:
        raise error

    with pytest.raises((type(error), RuntimeError)):
        await run(step)
