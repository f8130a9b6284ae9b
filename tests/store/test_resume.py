"""A run that ended half way goes on: nothing that finished runs again, and each result belongs to its subtask."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun import (
    AlreadyFinishedError,
    Application,
    ApplicationBuilder,
    GraphBuilder,
    GraphChangedError,
    MapActions,
    MapStates,
    MemoryStore,
    MisuseError,
    Policy,
    Retry,
    RunConflictError,
    RunnableGraph,
    SQLiteStore,
    State,
    action,
    when,
)

Open = Callable[[], Any]


class Crash(Exception):
    """Stands for the end of the process, where a test needs it at a certain point."""


class Program:
    """What one life of the program does: which subtasks it lets finish, and which it has run."""

    def __init__(self, allowed: Iterable[Any] | None = None) -> None:
        self.allowed = Counter(allowed) if allowed is not None else None
        self.ran: list[Any] = []
        self.finished: Counter[Any] = Counter()

    def run(self, item: Any) -> None:
        self.ran.append(item)
        if self.allowed is not None:
            if not self.allowed[item]:
                raise Crash(item)
            self.allowed[item] -= 1
        self.finished[item] += 1


def doubling(program: Program, *, policy: Policy | None = None, crash: bool = False) -> MapStates:
    @action(reads=["item"], writes=["out"])
    async def double(state: State) -> State:
        program.run(state["item"])
        return state.update(out=(state["item"], state["item"] * 2))

    class Double(MapStates):
        reads, writes = ["items"], ["outs"]

        def action(self, state: State, inputs: dict[str, Any]) -> Any:
            return double

        async def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            for item in state["items"]:
                yield state.update(item=item)

        async def reduce(self, state: State, states: Any) -> State:
            outs = [done["out"] async for done in states]
            if crash:
                raise Crash
            return state.update(outs=outs)

    Double.policy = policy or Policy(limit=3)
    return Double()


def app_of(store: Any, actions: dict[str, Any], app_id: str = "a", **state: Any) -> Application:
    names = list(actions)
    builder = ApplicationBuilder().with_actions(**actions).with_entrypoint(names[0])
    builder.with_transitions(*pairwise(names))
    return builder.with_identifiers(app_id=app_id).with_store(store).with_state(**state).build()


def counting(program: Program, name: str) -> Any:
    @action(reads=[], writes=[name])
    async def step(state: State) -> State:
        program.run(name)
        return state.update(**{name: (name, {1})})

    return step


# -- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_run_continues_behind_the_last_committed_step_with_its_state(open_store: Open) -> None:
    names = ["x", "y", "z"]
    async with open_store() as store:
        first = Program(["x"])
        with pytest.raises(Crash):
            await app_of(store, {name: counting(first, name) for name in names}, given=1).arun()
    async with open_store() as store:
        second = Program()
        app = app_of(store, {name: counting(second, name) for name in names}, given=2, fresh=3)
        _, _, state = await app.arun()
    assert second.ran == ["y", "z"]
    assert state.get_all() == {"given": 1, "fresh": 3, **{name: (name, {1}) for name in names}}
    assert app.sequence_id == 3


@pytest.mark.anyio
async def test_abuild_shows_what_the_store_knows_before_anything_runs(open_store: Open) -> None:
    async with open_store() as store:
        with pytest.raises(Crash):
            await app_of(store, {name: counting(Program(["x"]), name) for name in "xy"}).arun()
        app = app_of(store, {name: counting(Program(), name) for name in "xy"})
        await app.load()
        assert (app.sequence_id, app.state["x"]) == (1, ("x", {1}))
        following = await app.next_action()
        assert following is not None
        assert following.display_name == "y"


@pytest.mark.anyio
async def test_deleted_fields_stay_deleted_and_a_replaced_state_is_kept(open_store: Open) -> None:
    @action(reads=["old"], writes=["old"])
    async def wipe(state: State) -> State:
        return state.wipe(delete=["old"])

    async with open_store() as store:
        app = app_of(store, {"x": counting(Program(), "x"), "wipe": wipe, "z": counting(Program(["z"]), "z")}, old=1)
        await app.arun(halt_after="x")
        app.update_state(app.state.update(old=2, by_hand=(1,)))
        await app.arun(halt_after="wipe")
        again = app_of(store, {"x": counting(Program(), "x"), "wipe": wipe, "z": counting(Program(), "z")}, old=5)
        await again.load()
        assert again.state.get_all() == {"x": ("x", {1}), "by_hand": (1,)}


@pytest.mark.anyio
async def test_two_processes_take_turns_on_one_application(open_store: Open) -> None:
    @action(reads=["n"], writes=["n"])
    async def turn(state: State) -> State:
        return state.increment(n=1)

    def build() -> Application:
        builder = ApplicationBuilder().with_actions(turn).with_transitions(("turn", "turn")).with_state(n=0)
        return builder.with_identifiers(app_id="chat").with_store(store).build()

    async with open_store() as store:
        one, two = build(), build()
        for expected, app in enumerate([one, two, two, one, one, two], start=1):
            assert (await app.arun(halt_after="turn")).state["n"] == expected


@pytest.mark.anyio
async def test_two_runs_of_one_app_id_at_once_are_a_conflict(open_store: Open) -> None:
    started = anyio.Event()

    @action(reads=[], writes=[])
    async def wait(state: State) -> State:
        started.set()
        await anyio.sleep_forever()
        return state

    async with open_store() as store, anyio.create_task_group() as group:
        group.start_soon(app_of(store, {"wait": wait}).arun)
        await started.wait()
        with pytest.raises(RunConflictError, match="'a' is being run already"):
            await app_of(store, {"wait": wait}).arun()
        group.cancel_scope.cancel()
    async with open_store() as store:
        assert (await app_of(store, {"wait": counting(Program(), "wait")}, app_id="b").arun()).state
        with anyio.move_on_after(0.01):
            await app_of(store, {"wait": wait}).arun()  # the cancelled run gave its lease back


@pytest.mark.anyio
async def test_a_finished_run_is_not_run_again_unless_asked(open_store: Open) -> None:
    program = Program()

    def build(on_finished: Any) -> Application:
        builder = ApplicationBuilder().with_actions(x=counting(program, "x")).with_identifiers(app_id="a")
        return builder.with_store(store, on_finished=on_finished).build()

    async with open_store() as store:
        app = build("raise")
        await app.arun()
        for again in (app, build("raise")):
            with pytest.raises(AlreadyFinishedError, match="ended already, with action 'x' at step 0") as raised:
                await again.arun()
            assert raised.value.state == {"x": ("x", {1})}
        assert program.ran == ["x"]
        await build("fresh").arun()
        assert program.ran == ["x", "x"]
        assert [step[0].name async for step in build("fresh").aiterate()] == ["x"]
        with pytest.raises(MisuseError, match="takes 'raise' or 'fresh'"):
            build("again")


@pytest.mark.anyio
async def test_another_graph_is_refused(open_store: Open) -> None:
    async with open_store() as store:
        await app_of(store, {"x": counting(Program(), "x")}).arun()
        with pytest.raises(GraphChangedError, match="'a' was begun with another graph"):
            await app_of(store, {"x": counting(Program(), "x"), "y": counting(Program(), "y")}).arun()


@pytest.mark.anyio
async def test_what_can_not_be_stored_is_refused_when_it_is_committed(open_store: Open) -> None:
    class Client: ...

    @action(reads=[], writes=["client"])
    async def connect(state: State) -> State:
        return state.update(client=[Client()])

    class Both(MapActions):
        reads, writes = [], ["n"]

        def actions(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            return [connect]

        async def reduce(self, state: State, states: Any) -> State:
            return state.update(n=len([done async for done in states]))

    async with open_store() as store:
        message = (
            r"action '(x|connect)' wrote state\['client'\]\[0\] of type .*Client, which can't be stored: .*encode="
        )
        for number, what in enumerate((connect, Both())):
            app = app_of(store, {"x": what}, app_id=str(number))
            with pytest.raises(MisuseError, match=message):
                await app.arun()
            assert app.sequence_id == 0


# -- fan-outs ----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_finished_subtasks_are_restored_and_the_others_run(open_store: Open) -> None:
    async with open_store() as store:
        first = Program([1, 3])
        skip = Policy(on_error="skip")
        with pytest.raises(Crash):
            await app_of(store, {"m": doubling(first, policy=skip, crash=True)}, items=[1, 2, 3, 4]).arun()
    async with open_store() as store:
        second = Program()
        _, _, state = await app_of(store, {"m": doubling(second)}, items=[4, 3, 2, 1, 9]).arun()
    assert sorted(second.ran) == [2, 4, 9]
    assert sorted(state["outs"]) == [(n, n * 2) for n in (1, 2, 3, 4, 9)]


@given(data=st.data(), order=st.sampled_from(["completed", "submitted"]), limit=st.integers(1, 5))
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_whatever_happens_to_the_list_each_item_is_reduced_once_and_only_unfinished_ones_run(
    backend: str, data: Any, order: Any, limit: int
) -> None:
    """Items are reordered, inserted, removed and repeated between two, three and more lives of the program."""
    items = st.lists(st.integers(0, 4), max_size=8)

    async def lives() -> None:
        store = MemoryStore()
        finished: Counter[int] = Counter()
        for _ in range(data.draw(st.integers(1, 3))):
            given = data.draw(items)
            program = Program(
                data.draw(st.lists(st.sampled_from(given), max_size=len(given)) if given else st.just([]))
            )
            policy = Policy(on_error="skip", limit=limit, order=order)
            crashing = doubling(program, policy=policy, crash=True)
            with pytest.raises(Crash):
                await app_of(store, {"m": crashing}, items=given).arun()
            assert Counter(program.ran) == Counter(given) - finished
            finished += program.finished
        given, program = data.draw(items), Program()
        policy = Policy(limit=limit, order=order)
        _, _, state = await app_of(store, {"m": doubling(program, policy=policy)}, items=given).arun()
        assert Counter(program.ran) == Counter(given) - finished
        outs = [(n, n * 2) for n in given]
        assert state["outs"] == outs if order == "submitted" else sorted(state["outs"]) == sorted(outs)

    anyio.run(lives, backend=backend)


@pytest.mark.anyio
async def test_a_subtask_that_is_tried_again_is_recorded_once_and_not_run_again(open_store: Open) -> None:
    program = Program([])
    policy = Policy(on_error="skip", retry=Retry(attempts=3, initial=0.0))
    async with open_store() as store:
        with pytest.raises(Crash):
            await app_of(store, {"m": doubling(program, policy=policy, crash=True)}, items=[1, 1]).arun()
        assert program.ran == [1] * 6
        second = Program([1])
        with pytest.raises(Crash):
            await app_of(store, {"m": doubling(second, policy=policy, crash=True)}, items=[1, 1]).arun()
        third = Program()
        assert (await app_of(store, {"m": doubling(third)}, items=[1, 1]).arun()).state["outs"] == [(1, 2)] * 2
        assert len(third.ran) == 1


class Only(MapActions):
    """Runs one action."""

    reads, writes = ["items"], ["outs"]

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def actions(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        return [self.inner]

    async def reduce(self, state: State, states: Any) -> State:
        (one,) = [done async for done in states]
        return state.update(outs=one["outs"])


def graph_of(inner: Any) -> RunnableGraph:
    return RunnableGraph(GraphBuilder().with_actions(inner=inner).build(), "inner")


@pytest.mark.anyio
@pytest.mark.parametrize("between", [(), (Only,), (graph_of,), (Only, graph_of, Only, graph_of)])
async def test_a_nested_fan_out_that_is_tried_again_finds_what_finished(open_store: Open, between: Any) -> None:
    program = Program([1, 3])  # 2 fails at first
    inner: Any = doubling(program, policy=Policy(limit=1))
    for wrap in between:
        inner = wrap(inner)

    def from_now_on_all_is_well(error: Exception) -> bool:
        program.allowed = None
        return True

    class Outer(Only):
        policy = Policy(retry=Retry(attempts=2, initial=0.0, on=from_now_on_all_is_well))

    async with open_store() as store:
        _, _, state = await app_of(store, {"m": Outer(inner)}, items=[1, 3, 2]).arun()
    assert sorted(state["outs"]) == [(1, 2), (2, 4), (3, 6)]
    assert program.finished == {1: 1, 2: 1, 3: 1}


@pytest.mark.asyncio
async def test_a_run_that_a_timeout_cancels_at_any_moment_goes_on_in_the_same_object(tmp_path: Path) -> None:
    """asyncio's own cancellation goes through shields: also while a step is being committed."""

    @action(reads=["n"], writes=["n", "seen"])
    async def count(state: State) -> State:
        ran.append(state["n"])
        return state.increment(n=1).append(seen=state["n"])

    ran: list[int] = []
    builder = ApplicationBuilder().with_actions(count).with_transitions(("count", "count", when(n__lt=40)))
    builder.with_state(n=0, seen=[]).with_identifiers(app_id="a")
    async with SQLiteStore(tmp_path / "s.db") as store:
        app = builder.with_store(store).build()
        cancelled = 0
        while True:
            task = asyncio.create_task(app.arun())
            for _ in range(cancelled % 23):
                await asyncio.sleep(0)
            await asyncio.wait([task], timeout=0.001 * (cancelled % 3) if cancelled < 400 else None)
            task.cancel()
            try:
                _, _, state = await task
                break
            except asyncio.CancelledError:  # noqa: ASYNC103 - the task's, not this test's
                cancelled += 1
            except AlreadyFinishedError as exc:  # cancelled when its last step had been committed
                state = exc.state
                break
    assert cancelled
    assert state["seen"] == list(range(40))
    assert Counter(ran).keys() == set(range(40))


def test_two_processes_on_one_application_are_a_conflict(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, anyio\n"
        "from arun import *\n"
        "@action(reads=[], writes=[])\n"
        "async def wait(state):\n"
        "    print('running', flush=True)\n"
        "    await anyio.sleep_forever()\n"
        "store = SQLiteStore(sys.argv[1])\n"
        "app = ApplicationBuilder().with_actions(wait).with_identifiers(app_id='a').with_store(store).build()\n"
        "anyio.run(app.arun)\n"
    )
    command = [sys.executable, str(program), str(tmp_path / "s.db")]
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"running\n"
        second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
        assert f"RunConflictError: application 'a' is being run already, by process {first.pid}" in second.stderr
        first.kill()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as third:
        assert third.stdout is not None
        assert third.stdout.readline() == b"running\n"
        third.kill()
