"""Which subtask is which: loops, nesting, keys, settings of actions; what is written, and how much."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from arun import (
    Application,
    ApplicationBuilder,
    GraphBuilder,
    MapActions,
    MapStates,
    MemoryStore,
    MisuseError,
    Policy,
    RunnableGraph,
    Runtime,
    SQLiteStore,
    State,
    SubGraphTask,
    SubtaskFinished,
    TaskBasedParallelAction,
    action,
    when,
)

pytestmark = pytest.mark.anyio
Open = Callable[[], Any]


class Crash(Exception):
    pass


class Tasks(TaskBasedParallelAction):
    """Runs the given subtasks, skips those that fail, and crashes at the end if it is told to."""

    reads, writes = [], ["outs"]
    policy = Policy(on_error="skip", limit=10)

    def __init__(self, make: Callable[[State], Any], *, crash: bool = False) -> None:
        self.make = make
        self.crash = crash

    def tasks(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        return self.make(state)

    async def reduce(self, state: State, states: Any) -> State:
        outs = [done["out"] async for done in states]
        if self.crash:
            raise Crash
        return state.update(outs=outs)


def app_of(store: Any, what: Any, **state: Any) -> Application:
    builder = ApplicationBuilder().with_actions(what=what).with_identifiers(app_id="a")
    return builder.with_store(store).with_state(**state).build()


async def crash(store: Any, make: Callable[[State], Any], **resources: Any) -> None:
    with pytest.raises(Crash):
        await app_with(store, Tasks(make, crash=True), **resources).arun()


def app_with(store: Any, what: Any, **resources: Any) -> Application:
    builder = ApplicationBuilder().with_actions(what=what).with_identifiers(app_id="a").with_store(store)
    return builder.with_resources(**resources).build()


async def outs(store: Any, make: Callable[[State], Any], **resources: Any) -> Any:
    return (await app_with(store, Tasks(make), **resources).arun()).state["outs"]


def worker(ran: list[Any], fail: Any = frozenset()) -> Any:
    fail = set(fail)

    @action(reads=["item"], writes=["out"])
    async def work(state: State) -> State:
        ran.append(state["item"])
        if state["item"] in fail:
            raise RuntimeError("failed")
        return state.update(out=state["item"])

    return work


async def test_a_loop_runs_its_fan_out_anew_each_time(open_store: Open) -> None:
    ran: list[Any] = []

    class Map(MapStates):
        reads, writes = ["items", "round"], ["round", "outs"]

        def __init__(self, crash_in: int) -> None:
            self.crash_in = crash_in

        def action(self, state: State, inputs: dict[str, Any]) -> Any:
            return worker(ran)

        def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            return [state.update(item=item) for item in state["items"]]

        async def reduce(self, state: State, states: Any) -> State:
            outs = [done["out"] async for done in states]
            if state["round"] == self.crash_in:
                raise Crash
            return state.update(round=state["round"] + 1, outs=outs)

    def build(store: Any, crash_in: int) -> Application:
        builder = (
            ApplicationBuilder().with_actions(map=Map(crash_in)).with_transitions(("map", "map", when(round__lt=3)))
        )
        return builder.with_store(store).with_identifiers(app_id="a").with_state(items=[1, 2], round=0).build()

    async with open_store() as store:
        with pytest.raises(Crash):
            await build(store, 1).arun()
        assert sorted(ran) == [1, 1, 2, 2]
        assert (await build(store, -1).arun()).state["round"] == 3
        assert sorted(ran) == [1, 1, 1, 2, 2, 2]


async def test_nested_fan_outs_run_only_the_leaves_that_did_not_finish(open_store: Open) -> None:
    def program(ran: list[Any], fail: Any) -> Callable[[State], Any]:
        leaf = worker(ran, fail)

        class Inner(MapStates):
            reads, writes = ["group"], ["out"]
            policy = Policy(on_error="skip")

            def action(self, state: State, inputs: dict[str, Any]) -> Any:
                return leaf

            def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
                return [state.update(item=(state["group"], n)) for n in range(3)]

            async def reduce(self, state: State, states: Any) -> State:
                done = sorted([done["out"] async for done in states])
                if len(done) < 3:
                    raise RuntimeError("incomplete")
                return state.update(out=done)

        return lambda state: [SubGraphTask(Inner(), state.update(group=group)) for group in order]

    async with open_store() as store:
        ran: list[Any] = []
        order = ["x", "y", "x"]  # x twice: the second one is another subtask
        await crash(store, program(ran, {("y", 1)}))
        assert Counter(ran) == {("x", 0): 2, ("x", 1): 2, ("x", 2): 2, ("y", 0): 1, ("y", 1): 1, ("y", 2): 1}
        ran, order = [], ["y", "z", "x", "x"]
        got = await outs(store, program(ran, set()))
        assert sorted(ran) == [("y", 1), ("z", 0), ("z", 1), ("z", 2)]
        assert sorted(group[0][0] for group in got) == ["x", "x", "y", "z"]


async def test_a_sub_graph_goes_on_at_its_next_step(open_store: Open) -> None:
    def program(ran: list[Any], fail: Any) -> Callable[[State], Any]:
        def step(name: str, reads: str) -> Any:
            @action(reads=[reads], writes=[name])
            async def one(state: State) -> State:
                ran.append((name, state[reads]))
                if (name, state[reads]) in fail:
                    raise RuntimeError("failed")
                return state.update(**{name: state[reads] + 1})

            return one

        builder = GraphBuilder().with_actions(a=step("a", "item"), b=step("b", "a"), out=step("out", "b"))
        graph = builder.with_transitions(("a", "b"), ("b", "b", when(b__lt=12)), ("b", "out")).build()
        sub = RunnableGraph(graph, "a", ["out"])
        return lambda state: [SubGraphTask(sub, state.update(item=item)) for item in (10, 20)]

    async with open_store() as store:
        ran: list[Any] = []
        await crash(store, program(ran, {("out", 12)}))
        assert sorted(ran) == [("a", 10), ("a", 20), ("b", 11), ("b", 21), ("out", 12), ("out", 22)]
        ran = []
        assert sorted(await outs(store, program(ran, set()))) == [13, 23]
        assert ran == [("out", 12)]


async def test_failed_and_cancelled_subtasks_are_not_recorded(open_store: Open) -> None:
    ran: list[Any] = []
    stuck = anyio.Event()

    @action(reads=["item"], writes=["out"])
    async def work(state: State) -> State:
        ran.append(state["item"])
        if state["item"] == 0 and len(ran) <= 3:
            raise RuntimeError("failed")
        if state["item"] == 2 and len(ran) <= 3:
            stuck.set()
            await anyio.sleep_forever()
        return state.update(out=state["item"])

    def make(state: State) -> Any:
        return [SubGraphTask(work, state.update(item=item)) for item in range(3)]

    async with open_store() as store:
        async with anyio.create_task_group() as group:
            group.start_soon(app_with(store, Tasks(make)).arun)
            await stuck.wait()
            opened = 0
            while opened < 1:  # until item 1 is recorded
                await anyio.sleep(0.001)
                opened = await recorded(store)
            group.cancel_scope.cancel()
        assert sorted(await outs(store, make)) == [0, 1, 2]
        assert sorted(ran) == [0, 0, 1, 2, 2]


async def recorded(store: Any) -> int:
    if isinstance(store, MemoryStore):
        return sum(len(rows) for app in store._apps.values() for rows in app.ledger.values())
    with sqlite3.connect(store.path) as db:
        (count,) = db.execute("SELECT count(*) FROM ledger").fetchone()
    db.close()
    return int(count)


async def test_a_given_key_stands_for_the_content(open_store: Open) -> None:
    async with open_store() as store:
        ran: list[Any] = []
        await crash(store, lambda s: [SubGraphTask(worker(ran), s.update(item=n), key=f"k{n}") for n in (1, 2)])
        got = await outs(
            store, lambda s: [SubGraphTask(worker(ran), s.update(item=n), key=f"k{n - 1}") for n in (2, 9)]
        )
        assert (sorted(got), ran) == ([1, 9], [1, 2, 9])


async def test_another_version_takes_nothing_from_the_store(open_store: Open) -> None:
    ran: list[Any] = []

    def work(version: int) -> Any:
        @action(reads=[], writes=["out"], version=version)
        async def compute(state: State) -> State:
            ran.append(version)
            return state.update(out=version)

        return compute

    async with open_store() as store:
        await crash(store, lambda s: [SubGraphTask(work(1), s), SubGraphTask(work(1), s, key="k")])
        assert await outs(store, lambda s: [SubGraphTask(work(2), s), SubGraphTask(work(2), s, key="k")]) == [2, 2]
        assert ran == [1, 1, 2, 2]


async def test_bound_arguments_inputs_closures_and_settings_tell_actions_apart(open_store: Open) -> None:
    @action(reads=[], writes=["out"])
    async def ask(state: State, model: str = "none", by: int = 0) -> State:
        return state.update(out=(model, by))

    def made(model: str) -> Any:
        @action(reads=[], writes=["out"])
        async def made_ask(state: State) -> State:
            return state.update(out=("made", model))

        return made_ask

    class Ask(MapActions):
        reads, writes = [], ["out"]

        def __init__(self, model: str) -> None:
            self.model = model

        def actions(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            return [ask.bind(model=self.model)]

        async def reduce(self, state: State, states: Any) -> State:
            (out,) = [("class", done["out"][0]) async for done in states]
            return state.update(out=out)

    def make(names: str) -> Callable[[State], Any]:
        return lambda state: [
            task
            for name in names
            for task in (
                SubGraphTask(ask.bind(model=name), state),
                SubGraphTask(ask, state, {"by": ord(name)}),
                SubGraphTask(made(name), state),
                SubGraphTask(Ask(name), state),
            )
        ]

    Tasks.policy = Policy(on_error="skip", limit=10, order="submitted")
    async with open_store() as store:
        await crash(store, make("abc"))
        got = await outs(store, make("cab"))
    expected = [[(name, 0), ("none", ord(name)), ("made", name), ("class", name)] for name in "cab"]
    assert got == [out for four in expected for out in four]


async def test_actions_that_can_not_be_told_apart_are_refused(open_store: Open) -> None:
    class Client: ...

    def made(client: Client) -> Any:
        @action(reads=[], writes=["out"])
        async def ask(state: State) -> State:
            return state.update(out=str(client))

        return ask

    @dataclass
    class Row:
        n: int

    @action(reads=[], writes=["out"])
    async def take(state: State, client: Any = None) -> State:
        return state.update(out=1)

    one, two = Client(), Client()
    async with open_store() as store:
        with pytest.raises(MisuseError, match=r"run 'ask' on the same values.*Client.*\.with_name"):
            await outs(store, lambda s: [SubGraphTask(made(one), s), SubGraphTask(made(two), s)])
        with pytest.raises(MisuseError, match=r"reads state\['item'\] of type .*Row.*arun\.register\(Row\)"):
            await outs(store, lambda s: [SubGraphTask(worker([]), s.update(item=Row(1)))])
        with pytest.raises(MisuseError, match=r"the argument 'client' of 'take' is of type .*Client"):
            await outs(store, lambda s: [SubGraphTask(take.bind(client=one), s)])
        got = await outs(
            store,
            lambda s: [
                SubGraphTask(made(one), s),
                SubGraphTask(made(one), s),
                SubGraphTask(made(two).with_name("other"), s),
                SubGraphTask(take.bind(client=two), s),
                SubGraphTask(take, s),
                SubGraphTask(worker([]), s.update(item=(1,)), key="given"),
            ],
            client=two,
        )
        assert len(got) == 6


async def test_a_counter_in_an_action_does_not_make_it_another_one(open_store: Open) -> None:
    count = 0

    @action(reads=["item"], writes=["out"])
    async def work(state: State) -> State:
        nonlocal count
        count += 1
        return state.update(out=count)

    class Counting(MapActions):
        reads, writes = [], ["out"]
        calls = 0

        def actions(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            self.calls += 1
            return [work]

        def state(self, state: State, inputs: dict[str, Any]) -> State:
            return state.update(item=0)

        async def reduce(self, state: State, states: Any) -> State:
            return state.update(out=[done["out"] async for done in states])

    counting = Counting()

    def make(state: State) -> Any:
        yield from (SubGraphTask(work, state.update(item=n)) for n in range(3))
        yield SubGraphTask(counting, state)

    async with open_store() as store:
        await crash(store, make)
        await outs(store, make)
    assert (count, counting.calls) == (4, 1)


async def test_events_say_what_was_restored(open_store: Open) -> None:
    def make(state: State) -> Any:
        return [SubGraphTask(worker([]), state.update(item=n)) for n in items]

    async with open_store() as store:
        items = [1, 2]
        await crash(store, make)
        items = [1, 2, 3]
        app = app_with(store, Tasks(make))
        async with Runtime():
            events = [event async for event in app.astream()]
    ended = {event.label: event.restored for event in events if isinstance(event, SubtaskFinished)}
    assert ended == {"work(item=1)": True, "work(item=2)": True, "work(item=3)": False}


@pytest.mark.parametrize("limit", [1, 100])
async def test_a_store_grows_with_the_number_of_subtasks_however_large_the_parents_state(
    tmp_path: Path, limit: int
) -> None:
    @action(reads=["item"], writes=["out"])
    async def work(state: State) -> State:
        return state.update(out=state["item"][:20])

    class Map(MapStates):
        reads, writes = ["items"], ["outs"]
        policy = Policy(limit=limit)

        def action(self, state: State, inputs: dict[str, Any]) -> Any:
            return work

        def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            return [state.update(item=item) for item in state["items"]]

        async def reduce(self, state: State, states: Any) -> State:
            async for _ in states:
                pass
            raise Crash

    sizes = []
    for n in (100, 200, 400):
        async with SQLiteStore(tmp_path / f"{n}.db") as store:
            with pytest.raises(Crash):
                await app_of(store, Map(), items=[f"{i:0200}" for i in range(n)]).arun()
        with sqlite3.connect(tmp_path / f"{n}.db") as db:
            rows, size = db.execute("SELECT count(*), sum(length(delta) + 40) FROM ledger").fetchone()
        db.close()
        assert rows == n
        sizes.append(size)
        assert (tmp_path / f"{n}.db").stat().st_size < 60_000 + n * 600
    assert sizes[1] == 2 * sizes[0]
    assert sizes[2] == 4 * sizes[0]


async def test_a_committed_step_leaves_nothing_in_the_ledger(tmp_path: Path) -> None:
    async with SQLiteStore(tmp_path / "s.db") as store:
        await outs(store, lambda s: [SubGraphTask(worker([]), s.update(item=n)) for n in range(50)])
        assert await recorded(store) == 0
