"""Hooks: who is told of what, when, and what becomes of a hook that fails."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog

from arun import (
    ActionFinished,
    ActionStarted,
    Application,
    ApplicationBuilder,
    Event,
    Hook,
    Item,
    MapStates,
    MemoryStore,
    MisuseError,
    Partial,
    ProcessExecutor,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunStarted,
    State,
    SubtaskFinished,
    action,
    hook,
    when,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]


@action(reads=["n"], writes=["n"])
async def add(state: State) -> AsyncIterator[Any]:
    yield "item"
    yield state.increment(n=1)


@action(reads=[], writes=[])
async def fails(state: State) -> State:
    raise ValueError("broken")


@action(reads=["i"], writes=["square"])
async def square(state: State) -> State:
    await anyio.lowlevel.checkpoint()
    return state.update(square=state["i"] ** 2)


class Squares(MapStates):
    reads = ("n",)
    writes = ("total",)

    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        return square

    async def states(self, state: State, context: Any, inputs: dict[str, Any]) -> AsyncIterator[State]:
        for i in range(10):
            yield state.update(i=i)

    async def reduce(self, state: State, states: AsyncIterator[State]) -> AsyncIterator[State]:
        total = 0
        async for done in states:
            total += done["square"]
            yield state.update(total=total)


def app_of(what: Any, *hooks: Hook) -> Application:
    return ApplicationBuilder().with_actions(what).with_state(n=0).with_hooks(*hooks).build()


def counting_to(n: int, *hooks: Hook) -> Application:
    return (
        ApplicationBuilder()
        .with_actions(add)
        .with_transitions(("add", "add", when(n__lt=n)))
        .with_state(n=0)
        .with_entrypoint("add")
        .with_hooks(*hooks)
        .build()
    )


class Told:
    """Keeps what a hook was told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def hook(self, *kinds: Any, **options: Any) -> Hook:
        @hook(*kinds, **options)
        def keep(event: Event) -> None:
            self.events.append(event)

        return keep

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


async def test_a_hook_is_told_of_the_kinds_that_it_names_and_of_no_other() -> None:
    some, every = Told(), Told()
    await app_of(add, some.hook(ActionFinished, RunStarted), every.hook(Event)).arun()
    assert some.names == ["RunStarted", "ActionFinished"]
    assert every.names == ["RunStarted", "ActionStarted", "Item", "Partial", "ActionFinished", "RunFinished"]
    assert [event.seq for event in every.events] == [1, 2, 3, 4, 5, 6]


async def test_hooks_are_awaited_in_order_of_registration_and_before_the_event_is_delivered() -> None:
    seen: list[str] = []

    @hook(ActionFinished)
    async def first(event: ActionFinished) -> None:
        await anyio.wait_all_tasks_blocked()
        seen.append("first")

    @hook(ActionFinished)
    def second(event: ActionFinished) -> None:
        seen.append(f"second {event.written}")

    async for event in app_of(add, first, second).astream():
        seen.extend(["stream"] * isinstance(event, ActionFinished))
    assert seen == ["first", "second {'n': 1}", "stream"]


async def test_a_single_step_is_told_as_well() -> None:
    told = Told()
    await app_of(add, told.hook(Event)).astep()
    assert told.names == ["RunStarted", "ActionStarted", "Item", "Partial", "ActionFinished", "RunFinished"]


async def test_the_steps_of_an_iteration_are_one_run_to_hooks() -> None:
    told = Told()
    app = counting_to(3, told.hook(RunStarted, ActionFinished, RunFinished))
    assert [state["n"] async for _, _, state in app.aiterate()] == [1, 2, 3]
    assert told.names == ["RunStarted", *["ActionFinished"] * 3, "RunFinished"]
    assert [event.seq for event in told.events] == [1, 2, 3, 4, 5]
    assert len({event.run_id for event in told.events}) == 1
    assert told.events[-1].state["n"] == 3


async def test_an_iteration_that_is_left_or_fails_tells_hooks_so() -> None:
    told = Told()
    iteration = counting_to(3, told.hook(RunStarted, RunFinished, RunFailed, RunCancelled)).aiterate()
    await anext(iteration)
    await iteration.aclose()
    assert told.names == ["RunStarted", "RunCancelled"]

    told = Told()
    app = app_of(fails, told.hook(RunStarted, RunFinished, RunFailed, RunCancelled))
    with pytest.raises(ValueError, match="broken"):
        await anext(app.aiterate())
    with pytest.raises(ValueError, match="broken"):
        await app.astep()
    assert told.names == ["RunStarted", "RunFailed"] * 2


async def test_hooks_cascade_to_subtasks_and_are_told_one_event_at_a_time_in_the_order_of_the_stream() -> None:
    told: list[int] = []
    telling = 0

    @hook(Event)
    async def slow(event: Any) -> None:
        nonlocal telling
        telling += 1
        assert telling == 1
        await anyio.lowlevel.checkpoint()
        telling -= 1
        told.append(event.seq)

    streamed = [event async for event in app_of(Squares(), slow).astream()]
    assert told == [event.seq for event in streamed] == list(range(1, len(streamed) + 1))
    assert sum(isinstance(event, SubtaskFinished) for event in streamed) == 10


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_hooks_run_in_the_process_of_the_run_wherever_its_subtasks_do() -> None:
    where: set[tuple[int, str]] = set()

    @hook(SubtaskFinished, ActionFinished)
    def note(event: Any) -> None:
        where.add((os.getpid(), type(event).__name__))

    async with ProcessExecutor(1) as executor:
        builder = ApplicationBuilder().with_actions(Squares()).with_state(n=0).with_hooks(note)
        _, _, state = await builder.with_executor(executor).build().arun()
    assert state["total"] == 285
    assert where == {(os.getpid(), "SubtaskFinished"), (os.getpid(), "ActionFinished")}


@pytest.mark.parametrize("same", [True, False])
async def test_a_step_is_in_the_store_before_the_hooks_are_told_of_its_end(same: bool) -> None:
    @hook(ActionFinished, required=True)
    async def refuse(event: ActionFinished) -> None:
        raise ValueError("too late")

    def build(*hooks: Hook) -> Application:
        builder = ApplicationBuilder().with_actions(add, then=add).with_transitions(("add", "then")).with_state(n=0)
        return builder.with_entrypoint("add").with_identifiers("a").with_store(store).with_hooks(*hooks).build()

    store = MemoryStore()
    app = build(refuse)
    with pytest.raises(ValueError, match=r"too late"):
        await app.arun(halt_after=["add"])
    again = app if same else build()
    await again.load()
    assert (again.state["n"], again.sequence_id) == (1, 1)


async def test_a_failing_hook_is_logged_and_counted_and_the_run_goes_on() -> None:
    told = Told()

    @hook(ActionStarted, ActionFinished)
    async def broken(event: Any) -> None:
        raise ValueError("no")

    with structlog.testing.capture_logs() as logs:
        _, _, state = await app_of(add, broken, told.hook(ActionFinished)).arun()
    assert state["n"] == 1
    assert told.names == ["ActionFinished"]
    assert broken.failures == 2
    assert [(log["event"], log["on"], log["failures"]) for log in logs] == [
        ("hook.failed", "ActionStarted", 1),
        ("hook.failed", "ActionFinished", 2),
    ]
    assert "broken" in logs[0]["hook"]


async def test_a_required_hook_fails_the_run_and_what_it_refused_is_not_delivered() -> None:
    @hook(ActionFinished, RunFailed, required=True)
    async def audit(event: Any) -> None:
        raise ValueError(f"no {type(event).__name__}")

    events: list[Any] = []

    async def consume() -> None:
        async for event in app_of(add, audit).astream():
            events.append(event)  # noqa: PERF401 - what came before the error is kept

    with pytest.raises(ValueError, match=r"^no ActionFinished") as caught:
        await consume()
    assert caught.value.__notes__[0].endswith("audit, told of ActionFinished")
    assert [type(event) for event in events] == [RunStarted, ActionStarted, Item, Partial, RunFailed]
    assert [event.seq for event in events] == [1, 2, 3, 4, 5]
    assert audit.failures == 2


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_a_hook_slower_than_its_timeout_has_failed(kind: str) -> None:
    async def wait(event: Any) -> None:
        await anyio.sleep_forever()

    def block(event: Any) -> None:
        time.sleep(0.02)

    slow = hook(RunStarted, required=True, timeout=0.01)(wait if kind == "async" else block)
    with pytest.raises(TimeoutError, match=r"hook .*(wait|block) took longer than its timeout of 0\.01 s"):
        await app_of(add, slow).arun()
    assert slow.failures == 1


async def test_a_cancelled_run_cancels_the_hook_that_it_waits_for_and_tells_its_end() -> None:
    told, hanging = Told(), anyio.Event()

    @hook(ActionStarted)
    async def hang(event: ActionStarted) -> None:
        hanging.set()
        await anyio.sleep_forever()

    app = app_of(add, hang, told.hook(Event))
    async with anyio.create_task_group() as group:
        group.start_soon(app.arun)
        await hanging.wait()
        group.cancel_scope.cancel()
    assert told.names == ["RunStarted", "RunCancelled"]
    assert [event.seq for event in told.events] == [1, 2]
    assert hang.failures == 0


async def test_the_context_of_a_hook_leaks_nowhere() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="")
    seen: list[str] = []

    @hook(Item)
    async def spoil(event: Item) -> None:
        variable.set("spoiled")

    @action(reads=[], writes=["n"])
    async def look(state: State) -> AsyncIterator[Any]:
        yield "item"
        seen.append(variable.get())
        yield state.update(n=1)

    await app_of(look, spoil).arun()
    assert seen == [""]
    assert variable.get() == ""


async def test_sessions_share_the_hooks() -> None:
    told = Told()
    app = app_of(add, told.hook(RunFinished))
    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(app.session(n=n).arun)
    assert sorted(event.state["n"] for event in told.events) == [1, 2, 3]


async def _yields(event: Any) -> AsyncIterator[int]:
    yield 1


class _Methods:
    def on(self, event: Any) -> None: ...


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: hook(), r"names no type of event; @hook\(ActionFinished\) for one"),
        (lambda: hook("ActionFinished"), r"hook\('ActionFinished'\): it takes types of events: RunStarted, "),
        (lambda: hook(int), r"it takes types of events"),
        (lambda: hook(Partial, timeout=0), r"timeout=0\): it is a number of seconds above 0"),
        (lambda: hook(RunCancelled)(_Methods.on), r"called with the event alone, .*: hook\(...\)\(self.method\)"),  # type: ignore[arg-type]
        (lambda: hook(RunCancelled)(lambda: None), r"called with the event alone, and takes \(\)"),  # type: ignore[arg-type, misc]
        (lambda: hook(RunCancelled)(_yields), r"takes a function, plain or `async def`, that yields nothing"),
        (lambda: app_of(add, print), r"with_hooks\(\) was given a function .*decorate a function with @arun\.hook"),
    ],
)  # fmt: skip
async def test_what_is_no_hook_is_refused_where_it_is_written(
    wrong: Callable[[], Awaitable[Any]], message: str
) -> None:
    with pytest.raises(MisuseError, match=message):
        wrong()
