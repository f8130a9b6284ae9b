"""Parallel actions: subtasks as they come, bounded, reduced as they end; and what may go wrong on the way."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from arun import (
    Action,
    Application,
    ApplicationBuilder,
    Failed,
    GraphBuilder,
    Item,
    MapActions,
    MapActionsAndStates,
    MapStates,
    MisuseError,
    Ok,
    Partial,
    Policy,
    RunnableGraph,
    Runtime,
    State,
    SubGraphTask,
    SubtaskFailed,
    SubtaskFinished,
    SubtaskSkipped,
    SubtaskStarted,
    TaskBasedParallelAction,
    action,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
setting: ContextVar[str] = ContextVar("setting", default="unset")


def app_of(what: Action, **fields: Any) -> Application:
    return ApplicationBuilder().with_actions(what).with_state(**fields).build()


async def run(what: Action, inputs: dict[str, Any] | None = None, **fields: Any) -> State:
    return (await app_of(what, **fields).arun(inputs=inputs)).state


@action(reads=["x"], writes=["y"])
async def square(state: State, plus: int = 0) -> State:
    await checkpoint()
    return state.update(y=state["x"] ** 2 + plus)


@action(reads=["x"], writes=["y"])
async def double(state: State) -> State:
    return state.update(y=state["x"] * 2)


class Squares(MapStates):
    reads, writes = ["xs"], ["ys"]

    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        return square

    async def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        for x in state["xs"]:
            yield state.update(x=x)

    async def reduce(self, state: State, states: AsyncIterator[State]) -> Any:
        return state.update(ys=sorted([done["y"] async for done in states]))


class Each(TaskBasedParallelAction):
    """Runs a function of each number; what it gives is put into ``ys`` as it comes."""

    reads = ()
    writes = ("ys",)

    def __init__(
        self,
        work: Callable[[int], Awaitable[Any]],
        count: int = 3,
        *,
        reducer: Callable[[AsyncIterator[Any]], Awaitable[Any]] | None = None,
        source: Callable[[Callable[..., SubGraphTask]], Any] | None = None,
        **policy: Any,
    ) -> None:
        self.work, self.count, self.policy = work, count, Policy(**policy)
        self.reducer, self.source = reducer, source

    def task(self, state: State, i: int, **options: Any) -> SubGraphTask:
        @action(reads=["i"], writes=["y"])
        async def work(state: State) -> State:
            return state.update(y=await self.work(state["i"]))

        return SubGraphTask(work, state.update(i=i), **options)

    def tasks(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        if self.source is not None:
            return self.source(lambda i, **options: self.task(state, i, **options))
        return (self.task(state, i) for i in range(self.count))

    async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
        if self.reducer is not None:
            return state.update(ys=await self.reducer(states))
        return state.update(ys=[done["y"] async for done in states])


async def same(i: int) -> int:
    return i


# -- sources of all shapes --------------------------------------------------------------------------


class Counting:
    """An async iterator that is no generator."""

    def __init__(self, state: State) -> None:
        self.left = list(state["xs"])
        self.state = state
        self.closed = False

    def __aiter__(self) -> Counting:
        return self

    async def __anext__(self) -> State:
        await checkpoint()
        if not self.left:
            raise StopAsyncIteration
        return self.state.update(x=self.left.pop(0))

    async def aclose(self) -> None:
        self.closed = True


def as_list(self: Any, state: State, context: Any, inputs: Any) -> list[State]:
    return [state.update(x=x) for x in state["xs"]]


def as_generator(self: Any, state: State, context: Any, inputs: Any) -> Iterator[State]:
    for x in state["xs"]:
        yield state.update(x=x)


async def as_coroutine(self: Any, state: State, context: Any, inputs: Any) -> Any:
    await checkpoint()
    return (state.update(x=x) for x in state["xs"])


async def as_coroutine_of_generator(self: Any, state: State, context: Any, inputs: Any) -> Any:
    return Squares.states(self, state, context, inputs)


def as_iterator_object(self: Any, state: State, context: Any, inputs: Any) -> Counting:
    return Counting(state)


SHAPES = [Squares.states, as_list, as_generator, as_coroutine, as_coroutine_of_generator, as_iterator_object]


@pytest.mark.parametrize("states", SHAPES)
async def test_states_may_be_any_iterable(states: Any) -> None:
    shaped = type("Shaped", (Squares,), {"states": states})
    assert (await run(shaped(), xs=[1, 2, 3]))["ys"] == [1, 4, 9]
    assert (await run(shaped(), xs=[]))["ys"] == []


@pytest.mark.parametrize("shape", ["async generator", "generator", "list", "coroutine"])
async def test_actions_may_be_any_iterable(shape: str) -> None:
    class Both(MapActions):
        reads, writes = ["x"], ["ys"]

        def actions(self, state: State, context: Any, inputs: Any) -> Any:
            chosen = [square, double.with_name("twice")]

            async def generator() -> AsyncIterator[Any]:
                for one in chosen:
                    yield one

            async def coroutine() -> Any:
                return chosen

            return {
                "async generator": generator, "generator": lambda: (one for one in chosen), "list": lambda: chosen,
                "coroutine": coroutine,
            }[shape]()  # fmt: skip

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(ys={done.action: done["y"] async for done in states})

    assert (await run(Both(), x=3))["ys"] == {"square": 9, "twice": 6}


async def test_every_action_runs_over_every_state() -> None:
    class Product(MapActionsAndStates):
        reads, writes = ["xs"], ["ys"]
        policy = Policy(order="submitted")

        def actions(self, state: State, context: Any, inputs: Any) -> Any:
            return [square, double]

        states = Squares.states

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(ys=[(done.action, done["x"], done["y"]) async for done in states])

    found = (await run(Product(), xs=[2, 3]))["ys"]
    assert found == [("square", 2, 4), ("square", 3, 9), ("double", 2, 4), ("double", 3, 6)]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (lambda *_: None, "states gave None, which is no iterable"),
        (lambda *_: [1], "states gave an int, 1; it gives States"),
        (lambda *_: "text", "which is no iterable of states"),
    ],
)
async def test_a_wrong_source_is_refused_by_name(states: Any, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        await run(type("Wrong", (Squares,), {"states": states})(), xs=[])


async def test_what_tasks_yields_must_be_a_task() -> None:
    class Wrong(Each):
        def tasks(self, state: State, context: Any, inputs: Any) -> Any:
            return [square]

    with pytest.raises(MisuseError, match=r"tasks yielded a FunctionAction.*yield SubGraphTask\(graph="):
        await run(Wrong(same, on_error="collect"))
    with pytest.raises(MisuseError, match="takes a State, not a dict"):
        SubGraphTask(square, {})  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="decorate the function"):
        SubGraphTask(lambda s: s, State())


def test_a_plain_reduce_is_refused_in_the_class_body() -> None:
    with pytest.raises(MisuseError, match="reduce is a plain function"):
        type("Plain", (Squares,), {"reduce": lambda self, state, states: state})


async def test_a_reducer_that_returns_no_state_is_refused() -> None:
    async def nothing(self: Any, state: State, states: AsyncIterator[Any]) -> None:
        async for _ in states:
            pass

    with pytest.raises(MisuseError, match="reduce returned None"):
        await run(type("Nothing", (Squares,), {"reduce": nothing})(), xs=[1])


# -- inputs, reads, writes --------------------------------------------------------------------------


async def test_inputs_bound_names_and_resources_reach_the_subtasks() -> None:
    assert (await run(Squares(), inputs={"plus": 1}, xs=[1, 2]))["ys"] == [2, 5]
    assert (await run(Squares().bind(plus=2), xs=[1, 2]))["ys"] == [3, 6]
    app = ApplicationBuilder().with_actions(Squares()).with_resources(plus=3).with_state(xs=[1]).build()
    assert (await app.arun()).state["ys"] == [4]


async def test_burrs_way_to_declare_inputs_works() -> None:
    class Declares(Squares):
        @property
        def inputs(self) -> Any:
            return super().inputs + ["plus"]  # noqa: RUF005 - as in Burr's own examples

    assert (await run(Declares(), inputs={"plus": 1}, xs=[1]))["ys"] == [2]


async def test_a_child_is_held_to_its_own_reads_and_writes_and_scratch_stays_in_the_branch() -> None:
    assert set(await run(Squares(), xs=[1])) == {"xs", "ys"}

    @action(reads=["x"], writes=[])
    async def nosy(state: State) -> State:
        return state.update(y=state["xs"])

    class Nosy(Squares):
        def action(self, state: State, inputs: Any) -> Any:
            return nosy

    with pytest.raises(MisuseError, match=r"action 'nosy' reads state\['xs'\]"):
        await run(Nosy(), xs=[1])


async def test_a_reducer_may_merge_a_branch_whose_other_fields_are_as_they_were() -> None:
    class First(Squares):
        writes = ("x", "y")

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            async for done in states:
                state = state.merge(done)
            return state

    assert await run(First(), xs=[3]) == {"xs": [3], "x": 3, "y": 9}


async def test_a_reducer_is_held_to_the_parents_writes() -> None:
    class Leaks(Squares):
        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            async for done in states:
                state = state.merge(done)
            return state.update(ys=[])

    with pytest.raises(MisuseError, match="action 'Leaks' wrote 'x', 'y'"):
        await run(Leaks(), xs=[3])


# -- order and limit --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["completed", "submitted"])
async def test_results_come_as_they_end_or_as_they_were_yielded(order: str) -> None:
    gates = [anyio.Event() for _ in range(3)]

    async def gated(i: int) -> int:
        if i == 2:
            gates[0].set()
        await gates[2 - i].wait()
        if i:
            gates[3 - i].set()
        return i

    ys = (await run(Each(gated, order=order)))["ys"]
    assert ys == ([2, 1, 0] if order == "completed" else [0, 1, 2])


@pytest.mark.parametrize("order", ["completed", "submitted"])
@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_the_limit_is_never_exceeded(limit: int, order: str) -> None:
    running = yielded = taken = most_running = most_in_flight = 0

    async def work(i: int) -> int:
        nonlocal running, most_running
        running += 1
        most_running = max(running, most_running)
        for _ in range(i % 4):
            await checkpoint()
        running -= 1
        return i

    def source(task: Callable[[int], SubGraphTask]) -> Iterator[SubGraphTask]:
        nonlocal yielded, most_in_flight
        for i in range(300):
            yielded += 1
            most_in_flight = max(most_in_flight, yielded - taken)
            yield task(i)

    async def reducer(states: AsyncIterator[Any]) -> int:
        nonlocal taken
        async for _ in states:
            taken += 1
            if taken % 7 == 0:
                await checkpoint()
        return taken

    assert (await run(Each(work, source=source, reducer=reducer, limit=limit, order=order)))["ys"] == 300
    assert most_running <= limit
    assert most_in_flight <= limit


@pytest.mark.parametrize("options", [{"limit": 0}, {"order": "random"}, {"on_error": "ignore"}])
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Policy"):
        Policy(**options)


# -- early exit -------------------------------------------------------------------------------------


async def test_an_endless_source_starts_at_once_and_early_exit_cleans_up_everything() -> None:
    log: list[str] = []

    async def work(i: int) -> int:
        log.append(f"started {i}")
        if i == 2:
            return i
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            log.append(f"cleaned {i}")
        return i

    async def source(task: Callable[[int], SubGraphTask]) -> AsyncIterator[SubGraphTask]:
        i = 0
        try:
            while True:
                yield task(i)
                i += 1
        finally:
            await checkpoint()
            log.append("source closed")

    async def first(states: AsyncIterator[Any]) -> Any:
        async for done in states:
            return done["y"]

    assert (await run(Each(work, source=source, reducer=first, limit=5)))["ys"] == 2
    assert log[:3] == ["started 0", "started 1", "started 2"]
    started = {entry.removeprefix("started ") for entry in log if entry.startswith("started")}
    assert len(started) <= 6  # five in flight, and one more when the reducer had taken its result
    assert {entry.removeprefix("cleaned ") for entry in log if entry.startswith("cleaned")} == started - {"2"}
    assert "source closed" in log


async def test_an_endless_source_that_never_awaits_can_be_left() -> None:
    async def first(states: AsyncIterator[Any]) -> Any:
        async for done in states:
            return done["y"]

    def source(task: Callable[[int], SubGraphTask]) -> Iterator[SubGraphTask]:
        while True:
            yield task(1)

    for limit in (1, 100):
        assert (await run(Each(same, source=source, reducer=first, limit=limit)))["ys"] == 1


async def test_a_reducer_that_reads_nothing_is_refused_and_ends_the_work() -> None:
    async def nothing(states: AsyncIterator[Any]) -> str:
        return "nothing"

    async def forever(i: int) -> None:
        await anyio.sleep_forever()

    with pytest.raises(MisuseError, match="the reducer of 'Each' ended without reading its results"):
        await run(Each(forever, count=1000, reducer=nothing))


async def test_an_error_of_the_sources_clean_up_is_not_wrapped_in_groups() -> None:
    async def source(task: Callable[[int], SubGraphTask]) -> AsyncIterator[SubGraphTask]:
        try:
            yield task(1)
            yield task(2)
        finally:
            raise OSError("clean-up")

    with pytest.raises(OSError, match="clean-up"):
        await run(Each(same, source=source))

    async def first(states: AsyncIterator[Any]) -> Any:
        async for done in states:
            return done["y"]

    assert (await run(Each(same, source=source, reducer=first, limit=1)))["ys"] == 1


# -- reducers ---------------------------------------------------------------------------------------


class Running(Squares):
    policy = Policy(order="submitted")

    async def reduce(self, state: State, states: AsyncIterator[State]) -> Any:
        ys: list[int] = []
        async for done in states:
            ys.append(done["y"])
            yield state.update(ys=list(ys))
        yield "an item"
        yield state.update(ys=ys, total=sum(ys))

    writes = ("ys", "total")


async def test_partial_states_of_a_reducer_are_events_and_the_last_is_the_result(runtime: Runtime) -> None:
    assert (await run(Running(), xs=[1, 2]))["total"] == 5
    events = [event async for event in app_of(Running(), xs=[1, 2]).astream()]
    partials = [event.changed for event in events if isinstance(event, Partial)]
    assert partials == [{"ys": [1]}, {"ys": [1, 4]}, {"ys": [1, 4], "total": 5}]
    assert [event.values for event in events if isinstance(event, Item)] == [["an item"]]
    assert all(event.path == () for event in events if isinstance(event, Partial))


@pytest.mark.parametrize("kind", ["coroutine", "generator"])
async def test_an_error_of_the_reducer_cancels_the_subtasks_and_comes_out_bare(kind: str) -> None:
    cleaned = []

    async def work(i: int) -> int:
        if i:
            try:
                await anyio.sleep_forever()
            finally:
                cleaned.append(i)
        return i

    class Broken(Each):
        if kind == "coroutine":

            async def reduce(self, state: State, states: AsyncIterator[Any]) -> Any:
                async for _ in states:
                    raise LookupError("mine")

        else:

            async def reduce(self, state: State, states: AsyncIterator[Any]) -> Any:
                async for _ in states:
                    yield state.update(ys=[])
                    raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await run(Broken(work, limit=3))
    assert sorted(cleaned) == [1, 2]


async def test_a_reducer_may_catch_a_failure_and_keep_what_it_has() -> None:
    async def work(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    async def tolerant(states: AsyncIterator[Any]) -> list[int]:
        got = []
        try:
            async for done in states:
                got.append(done["y"])  # noqa: PERF401 - kept when the loop raises
        except ValueError:
            got.append(-1)
        with pytest.raises(MisuseError, match="read to their end already"):
            async for _ in states:
                pass
        return got

    assert (await run(Each(work, count=5, reducer=tolerant, limit=1)))["ys"] == [0, 1, -1]


# -- errors -----------------------------------------------------------------------------------------


async def test_one_failure_cancels_the_rest_and_is_raised_bare_with_the_subtasks_name() -> None:
    cleaned = []

    async def work(i: int) -> int:
        if i == 1:
            raise ValueError("one")
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.append(i)
        return i

    with pytest.raises(ValueError, match="one") as caught:
        await run(Each(work))
    assert caught.value.__notes__[0] == "in work(i=1)"
    assert {*cleaned} <= {0, 2}


async def test_several_failures_are_a_group_of_those_only() -> None:
    failing = anyio.Event()

    async def work(i: int) -> int:
        try:
            if i == 0:
                await anyio.wait_all_tasks_blocked()
                raise ValueError("zero")
            await anyio.sleep_forever()
        finally:
            if i == 1:
                raise KeyError("one")
        return i

    with pytest.raises(ExceptionGroup) as caught:
        await run(Each(work))
    assert sorted(map(repr, caught.value.exceptions)) == ["KeyError('one')", "ValueError('zero')"]
    assert not failing.is_set()


async def test_failed_subtasks_are_left_out_or_collected() -> None:
    async def work(i: int) -> int:
        if i % 2:
            raise ValueError(i)
        return i

    assert (await run(Each(work, count=5, on_error="skip")))["ys"] == [0, 2, 4]

    async def outcomes(states: AsyncIterator[Any]) -> list[Any]:
        return [outcome async for outcome in states]

    for order in ("completed", "submitted"):
        got = (await run(Each(work, count=4, on_error="collect", order=order, reducer=outcomes)))["ys"]
        assert [type(outcome) for outcome in got] == [Ok, Failed, Ok, Failed]
        assert got[2].value["y"] == 2
        assert repr(got[3].error) == "ValueError(3)"


async def test_misuse_is_never_skipped() -> None:
    @action(reads=[], writes=[])
    async def wrong(state: State) -> Any:
        return None

    class Wrong(Squares):
        policy = Policy(on_error="skip")

        def action(self, state: State, inputs: Any) -> Any:
            return wrong

    with pytest.raises(MisuseError, match="'wrong' returned None"):
        await run(Wrong(), xs=[1])


@pytest.mark.parametrize("error", [StopAsyncIteration("x"), StopIteration("x")])
async def test_a_subtask_that_raises_stop_iteration_does_not_end_the_results(error: Exception) -> None:
    class Bare(Action):
        writes = ("y",)

        def execute(self, state: State, inputs: Any, context: Any) -> Any:
            class Awaitable:
                def __await__(self) -> Iterator[Any]:
                    yield from checkpoint().__await__()
                    raise error

            return Awaitable()

    class Stops(Squares):
        def action(self, state: State, inputs: Any) -> Any:
            return Bare()

    with pytest.raises(RuntimeError):
        await run(Stops(), xs=[1, 2])


async def test_a_source_that_raises_cancels_the_subtasks() -> None:
    cleaned = []

    async def work(i: int) -> int:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.append(i)
        return i

    async def source(task: Callable[[int], SubGraphTask]) -> AsyncIterator[SubGraphTask]:
        yield task(1)
        await anyio.wait_all_tasks_blocked()
        raise OSError("source")

    with pytest.raises(OSError, match="source"):
        await run(Each(work, source=source))
    assert cleaned == [1]


async def test_a_users_group_passes_through_a_subtask_unchanged() -> None:
    error = ExceptionGroup("mine", [ValueError(1)])

    async def work(i: int) -> int:
        raise error

    with pytest.raises(ExceptionGroup) as caught:
        await run(Each(work, count=1))
    assert caught.value is error


async def test_two_subtasks_of_one_key_are_refused() -> None:
    with pytest.raises(MisuseError, match="the key 'k'; keys are unique"):
        await run(Each(same, source=lambda task: [task(1, key="k"), task(2, application_id="k")]))


async def test_a_cancelled_error_that_nobody_asked_for_is_a_failure() -> None:
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        pytest.skip("trio's can't be made by hand")

    async def work(i: int) -> int:
        if i == 1:
            raise asyncio.CancelledError
        return i

    with pytest.raises(RuntimeError, match=r"work\(i=1\) raised CancelledError though nobody had cancelled it"):
        await run(Each(work))


# -- handles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_a_handle_can_be_awaited_before_the_next_subtask(limit: int) -> None:
    async def source(task: Callable[..., SubGraphTask]) -> Any:
        first = yield task(1)
        second = yield task((await first)["y"] + 1)
        assert (await first)["y"] == 1
        outcome = await second.outcome()
        assert isinstance(outcome, Ok)
        yield task(outcome.value["y"] + 1)

    async def work(i: int) -> int:
        await checkpoint()
        return i

    assert (await run(Each(work, source=source, limit=limit)))["ys"] == [1, 2, 3]


@pytest.mark.parametrize("handled", [True, False])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
async def test_awaiting_the_handle_of_a_failed_subtask_raises_but_one_failure_stays_one(
    on_error: str, handled: bool
) -> None:
    async def work(i: int) -> int:
        await checkpoint()
        raise ValueError(i)

    async def source(task: Callable[..., SubGraphTask]) -> Any:
        handle = yield task(1)
        if handled:
            with pytest.raises(SubtaskFailed, match=r"work\(i=1\) failed: ValueError\(1\)") as caught:
                await handle
            assert isinstance(caught.value.__cause__, ValueError)
            assert isinstance(await handle.outcome(), Failed)
        else:
            await handle

    if handled and on_error == "skip":
        assert (await run(Each(work, source=source, on_error=on_error)))["ys"] == []
    else:
        expected = ValueError if on_error == "fail" else SubtaskFailed
        with pytest.raises(expected):
            await run(Each(work, source=source, on_error=on_error))


async def test_the_handle_of_a_cancelled_subtask_says_so() -> None:
    handles: list[Any] = []

    async def source(task: Callable[..., SubGraphTask]) -> Any:
        handles.append((yield task(0)))
        handles.append((yield task(1)))
        await anyio.sleep_forever()

    async def work(i: int) -> int:
        if i:
            await anyio.sleep_forever()
        return i

    async def first(states: AsyncIterator[Any]) -> Any:
        async for done in states:
            await anyio.wait_all_tasks_blocked()
            return done["y"]

    assert (await run(Each(work, source=source, reducer=first)))["ys"] == 0
    with pytest.raises(SubtaskSkipped, match="did not finish: cancelled"):
        await handles[1]
    assert (await handles[0])["y"] == 0


async def test_a_plain_generator_gets_no_handle() -> None:
    def source(task: Callable[..., SubGraphTask]) -> Any:
        assert (yield task(1)) is None

    assert (await run(Each(same, source=source)))["ys"] == [1]


# -- events of subtasks -----------------------------------------------------------------------------


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


# -- cancellation from outside ----------------------------------------------------------------------


class Hangs:
    """A parallel action that hangs with three subtasks, each of which notes its clean-up."""

    def __init__(self) -> None:
        self.cleaned: list[Any] = []
        self.started = anyio.Event()
        self.app = app_of(Each(self.work, source=self.source, limit=3))

    async def work(self, i: int) -> int:
        try:
            if i == 2:
                self.started.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            self.cleaned.append(i)
        return i

    async def source(self, task: Callable[[int], SubGraphTask]) -> AsyncIterator[SubGraphTask]:
        try:
            for i in range(100):
                yield task(i)
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            self.cleaned.append("source")

    def check(self) -> None:
        assert {*self.cleaned} == {0, 1, 2, "source"}
        assert not self.app._busy


@pytest.mark.parametrize("how", ["timeout", "wait_for", "cancel", "TaskGroup", "gather"])
@pytest.mark.usefixtures("asyncio_only")
async def test_asyncios_cancellations_leave_nothing(how: str) -> None:
    hangs = Hangs()

    async def fail() -> None:
        await hangs.started.wait()
        raise ValueError("sibling")

    match how:
        case "timeout":
            with pytest.raises(TimeoutError):  # noqa: PT012 - the timeout is what raises
                async with asyncio.timeout(None) as timeout:
                    task = asyncio.create_task(hangs.started.wait())
                    task.add_done_callback(lambda _: timeout.reschedule(0))
                    await hangs.app.arun()
        case "wait_for":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(hangs.app.arun(), 0.05)
        case "cancel":
            task = asyncio.create_task(hangs.app.arun())  # type: ignore[arg-type]
            await hangs.started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        case "TaskGroup":
            with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the group is what raises
                async with asyncio.TaskGroup() as group:
                    group.create_task(hangs.app.arun())
                    group.create_task(fail())
            assert repr(caught.value.exceptions) == "(ValueError('sibling'),)"
        case _:
            gathered = asyncio.gather(hangs.app.arun())
            await hangs.started.wait()
            gathered.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gathered
    hangs.check()


@pytest.mark.parametrize("how", ["scope", "fail_after", "task group"])
async def test_anyios_cancellations_leave_nothing(how: str) -> None:
    hangs = Hangs()

    async def fail() -> None:
        await hangs.started.wait()
        raise ValueError("sibling")

    match how:
        case "scope":
            async with anyio.create_task_group() as group:
                group.start_soon(hangs.app.arun)
                await hangs.started.wait()
                group.cancel_scope.cancel()
        case "fail_after":
            with pytest.raises(TimeoutError):
                with anyio.fail_after(0.05):
                    await hangs.app.arun()
        case _:
            with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the group is what raises
                async with anyio.create_task_group() as group:
                    group.start_soon(hangs.app.arun)
                    group.start_soon(fail)
            assert repr(caught.value.exceptions) == "(ValueError('sibling'),)"
    hangs.check()


async def test_a_run_that_was_cancelled_can_be_run_again() -> None:
    calls = 0

    async def work(i: int) -> int:
        nonlocal calls
        calls += 1
        if calls <= 3:
            await anyio.sleep_forever()
        return i

    app = app_of(Each(work))
    with anyio.move_on_after(0.01):
        await app.arun()
    assert (await app.arun()).state["ys"] == [0, 1, 2]


# -- isolation --------------------------------------------------------------------------------------


async def test_each_subtask_source_and_reducer_has_contextvars_of_its_own() -> None:
    async def work(i: int) -> str:
        seen.append(setting.get())
        setting.set(f"task {i}")
        await checkpoint()
        return setting.get()

    async def source(task: Callable[[int], SubGraphTask]) -> AsyncIterator[SubGraphTask]:
        seen.append(setting.get())
        for i in range(50):
            setting.set(f"source {i}")
            yield task(i)
            assert setting.get() == f"source {i}"

    async def reducer(states: AsyncIterator[Any]) -> list[str]:
        got = []
        async for done in states:
            setting.set("reducer")
            got.append(done["y"])
        return got

    seen: list[str] = []
    setting.set("caller")
    ys = (await run(Each(work, source=source, reducer=reducer, limit=4)))["ys"]
    assert sorted(ys) == sorted(f"task {i}" for i in range(50))
    assert {*seen} == {"caller"}
    assert setting.get() == "caller"


async def test_scopes_and_groups_inside_a_subtask_work() -> None:
    async def work(i: int) -> int:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(checkpoint)
        with anyio.move_on_after(0) as scope:
            await anyio.sleep_forever()
        try:
            with anyio.fail_after(0):
                await anyio.sleep_forever()
        except TimeoutError:
            await checkpoint()
        return i + int(scope.cancelled_caught)

    assert (await run(Each(work, count=20, limit=3, order="submitted")))["ys"] == list(range(1, 21))


@pytest.mark.usefixtures("asyncio_only")
async def test_asyncio_timeouts_inside_a_subtask_work() -> None:
    async def work(i: int) -> int:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(3600)
        except TimeoutError:
            await asyncio.sleep(0)
            return i
        return -1

    assert (await run(Each(work, count=20, limit=3, order="submitted")))["ys"] == list(range(20))


async def test_exceptions_thrown_in_while_a_subtask_is_suspended_reach_it() -> None:
    caught: list[int] = []

    async def work(i: int) -> int:
        for _ in range(2):
            with anyio.CancelScope() as scope:
                try:
                    scope.cancel()
                    await anyio.sleep_forever()
                except anyio.get_cancelled_exc_class():
                    caught.append(i)
                    raise
        return i

    assert (await run(Each(work, limit=2, order="submitted")))["ys"] == [0, 1, 2]
    assert sorted(caught) == [0, 0, 1, 1, 2, 2]


# -- nesting and size -------------------------------------------------------------------------------


async def test_parallel_actions_nest_deeply_at_any_limit() -> None:
    def nested(depth: int) -> Action:
        if depth == 0:
            return action(reads=[], writes=["y"])(leaf)

        class Level(MapStates):
            reads = ()
            writes = ("y",)
            policy = Policy(limit=1)

            def action(self, state: State, inputs: Any) -> Any:
                graph = GraphBuilder().with_actions(nested(depth - 1).with_name("below")).build()
                return RunnableGraph(graph, "below")

            def states(self, state: State, context: Any, inputs: Any) -> Any:
                return [state.update(i=i) for i in range(2)]

            async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
                return state.update(y=sum([done["y"] async for done in states]))

        return Level()

    async def leaf(state: State) -> State:
        await checkpoint()
        return state.update(y=1)

    assert (await run(nested(6)))["y"] == 2**6


@pytest.mark.parametrize("order", ["completed", "submitted"])
async def test_ten_thousand_subtasks_need_no_more_memory_than_the_limit(order: str) -> None:
    count = 10_000
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Load:
        pass

    async def work(load: Any) -> int:
        assert isinstance(load, Load)
        return 1

    template = Each(work).task(State(), 0).action

    async def source(task: Callable[[int], SubGraphTask]) -> Any:
        nonlocal most
        for _ in range(count):
            load = Load()
            alive.add(load)
            yield SubGraphTask(template, State({"i": load}))
            del load
            most = max(most, len(alive))

    async def total(states: AsyncIterator[Any]) -> int:
        summed = 0
        async for done in states:
            summed += done["y"]
        return summed

    assert (await run(Each(work, source=source, reducer=total, limit=50, order=order)))["ys"] == count
    assert most <= 60


# -- against a model --------------------------------------------------------------------------------


PLAN = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["ok", "ok", "ok", "fail", "item"])), max_size=25)


@pytest.mark.parametrize("on_error", ["fail", "skip", "collect"])
@given(plan=PLAN, limit=st.integers(1, 8), order=st.sampled_from(["completed", "submitted"]), leave=st.integers(0, 30))
async def test_random_fan_outs_agree_with_running_one_after_the_other(
    on_error: str, plan: list[tuple[int, str]], limit: int, order: str, leave: int
) -> None:
    running = most = 0
    ended: list[int] = []

    async def work(i: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            for _ in range(plan[i][0]):
                await checkpoint()
            if plan[i][1] == "fail":
                raise ValueError(i)
            return i
        finally:
            running -= 1
            ended.append(i)

    async def reducer(states: AsyncIterator[Any]) -> list[Any]:
        got: list[Any] = []
        async for done in states:
            got.append(done)
            if len(got) > leave:
                break
        return got

    failing = {i for i, (_, how) in enumerate(plan) if how == "fail"}
    good = [i for i in range(len(plan)) if i not in failing]
    each = Each(work, count=len(plan), limit=limit, order=order, on_error=on_error, reducer=reducer)
    try:
        got = (await run(each))["ys"]
    except ValueError as error:
        raised: list[Any] = [error]
    except ExceptionGroup as group:
        raised = list(group.exceptions)
    else:
        raised = []
    if raised:
        assert on_error == "fail"
        assert {error.args[0] for error in raised} <= failing
        assert all(error.__notes__[0] == f"in work(i={error.args[0]})" for error in raised)
    else:
        if on_error == "collect":
            ran = [o.value["y"] if isinstance(o, Ok) else o.error.args[0] for o in got]
            assert all(isinstance(o, Ok) == (i not in failing) for o, i in zip(got, ran, strict=True))
            possible = list(range(len(plan)))
        else:
            ran, possible = [state["y"] for state in got], good
        assert len(ran) == min(len(possible), leave + 1) or (on_error == "fail" and failing)
        assert len({*ran}) == len(ran)
        assert {*ran} <= {*possible}
        if order == "submitted":
            assert ran == possible[: len(ran)]
    assert running == 0
    assert most <= limit
    assert len({*ended}) == len(ended)
