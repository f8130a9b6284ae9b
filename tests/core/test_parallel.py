"""Parallel actions: subtasks from any source, bounded, reduced as they end, nested."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from arun import (
    Action,
    ApplicationBuilder,
    GraphBuilder,
    Item,
    MapActions,
    MapActionsAndStates,
    MapStates,
    MisuseError,
    Partial,
    Policy,
    RunnableGraph,
    Runtime,
    State,
    SubGraphTask,
    action,
)
from tests.core.parallel_programs import Each, Squares, app_of, double, run, same, square

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


# -- sources of all shapes -------------------------------------------------------------------------


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


async def test_a_reducer_that_yields_only_for_subtasks_is_told_what_to_do_where_there_are_none() -> None:
    class Growing(Squares):
        async def reduce(self, state: State, states: AsyncIterator[State]) -> AsyncIterator[State]:
            async for done in states:
                yield state.append(ys=done["y"])

    assert await run(Growing(), xs=[1])
    with pytest.raises(MisuseError, match=r"Growing\.reduce at .*no subtasks.*yield one before or after it"):
        await run(Growing(), xs=[])


async def test_a_reducer_that_returns_no_state_is_refused() -> None:
    async def nothing(self: Any, state: State, states: AsyncIterator[Any]) -> None:
        async for _ in states:
            pass

    with pytest.raises(MisuseError, match="reduce returned None"):
        await run(type("Nothing", (Squares,), {"reduce": nothing})(), xs=[1])


# -- inputs, reads, writes -------------------------------------------------------------------------


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


# -- order and limit -------------------------------------------------------------------------------


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


# -- reducers --------------------------------------------------------------------------------------


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


# -- nesting and size ------------------------------------------------------------------------------


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
