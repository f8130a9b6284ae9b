"""RayExecutor: what is its own. That subtasks run as anywhere is in test_conformance.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import executor_subjects as subjects
import msgspec
import pytest
import pytest_asyncio
from executor_fan import Fan, app_of, outs_of, pid_of
from executor_gone import Gone

from actors import EnginePool, EngineSpec, RayCluster, RayExecutor
from arun import (
    GraphBuilder,
    Item,
    MisuseError,
    Partial,
    Policy,
    Retry,
    RunnableGraph,
    SingleStepAction,
    State,
    SubGraphTask,
    WorkerDied,
    action,
)
from arun.channel import TLSConfig
from arun.errors import PlacementError
from arun.registry import register
from tests.actors.samples import Counter
from tests.faults.nemesis import cut

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.ray,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("ray_session"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(ray_session: None) -> AsyncIterator[RayCluster]:
    async with RayCluster.connect() as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(cluster: RayCluster) -> AsyncIterator[RayExecutor]:
    async with RayExecutor(cluster, workers=1, grace=0.3) as executor:
        yield executor


def table() -> list[bytes]:
    """The keys in Ray's table of functions that look like ours."""
    from ray.experimental.internal_kv import _internal_kv_list

    return [key for key in _internal_kv_list(b"RemoteFunction:", namespace=b"fun") if len(key.split(b":")[-1]) == 64]


# -- code that no module has ---------------------------------------------------------------------------------------


async def test_a_closure_runs_in_a_worker_with_what_it_closes_over(workers: RayExecutor) -> None:
    added = 5

    @action(reads=["value"], writes=["out"])
    async def add(state: State) -> AsyncIterator[Any]:
        yield "item"
        yield state.update(out=(state["value"] + added, os.getpid()))

    tasks = [SubGraphTask(add, State({"value": n})) for n in range(3)]
    outs = await outs_of(workers, *tasks)
    assert outs == [(n + 5, workers.pids[0]) for n in range(3)]
    added = 7  # as in a local run, what counts is what it is when the subtask starts
    assert [out for out, _ in await outs_of(workers, tasks[0])] == [7]


async def test_a_graph_of_local_actions_classes_and_conditions_runs_as_a_whole(workers: RayExecutor) -> None:
    class Step(SingleStepAction):
        reads, writes = ["n"], ["n"]

        def __init__(self, by: int) -> None:
            self.by = by

        def run_and_update(self, state: State, **inputs: Any) -> State:
            return state.update(n=state["n"] + self.by)

    @action(reads=["n"], writes=["out"])
    def tell(state: State) -> State:
        return state.update(out=state["n"])

    graph = (
        GraphBuilder()
        .with_actions(step=Step(3), tell=tell)
        .with_transitions(("step", "step", lambda state: state["n"] < 10), ("step", "tell"))
        .build()
    )
    task = SubGraphTask(RunnableGraph(graph, "step", ["tell"]), State({"n": 0}))
    assert await outs_of(workers, task) == [12]


async def test_code_is_sent_once_and_removed_with_the_executor(cluster: RayCluster) -> None:
    @action(reads=["value"], writes=["out"])
    def local(state: State, suffix: Any = None) -> State:
        return state.update(out=(state["value"], suffix, os.getpid()))

    before = set(table())
    async with RayExecutor(cluster, workers=2, cpus=0.5) as executor:
        tasks = [SubGraphTask(local.bind(suffix=n).with_name(f"n{n}"), State({"value": n})) for n in range(20)]
        outs = await outs_of(executor, *tasks)
        assert [out[:2] for out in outs] == [(n, n) for n in range(20)]
        assert len({pid for _, _, pid in outs}) == 2
        first = set(table()) - before
        await outs_of(executor, *tasks)
        assert set(table()) - before == first
    assert set(table()) == before


async def test_executors_of_one_job_do_not_remove_each_others_code(cluster: RayCluster, workers: RayExecutor) -> None:
    @action(reads=["value"], writes=["out"])
    def local(state: State) -> State:
        return state.update(out=state["value"])

    task = SubGraphTask(local, State({"value": 1}))
    async with RayExecutor(cluster, workers=1) as first:
        async with RayExecutor(cluster, workers=1) as second:
            assert await outs_of(second, task) == [1]
            assert await outs_of(workers, task) == [1]  # the same code is there for two executors
        assert await outs_of(first, task) == [1]
    with pytest.raises(WorkerDied):
        await outs_of(workers, SubGraphTask(subjects.die, State({"how": "kill"})))
    assert await outs_of(workers, task) == [1]  # by a worker that has fetched nothing yet


async def test_code_that_is_new_each_time_does_not_fill_the_table(workers: RayExecutor) -> None:
    def closing_over(number: int) -> Any:
        @action(reads=[], writes=["out"])
        def local(state: State) -> State:
            return state.update(out=number)

        return local

    outs = await outs_of(workers, *(SubGraphTask(closing_over(n), State()) for n in range(400)))
    assert outs == list(range(400))
    assert len(table()) < 300


async def test_registered_classes_that_no_module_has_cross_both_ways(workers: RayExecutor) -> None:
    import dataclasses
    import enum

    @register
    class Mood(enum.Enum):
        GOOD = 1

    @register
    @dataclasses.dataclass
    class Note:
        mood: Mood
        text: str = "none"

    class Opaque:
        def __init__(self, inner: int) -> None:
            self.inner = inner

    register(Opaque, encode=lambda value: value.inner, decode=Opaque)

    @action(reads=["value"], writes=["out"])
    def answer(state: State) -> State:
        note, opaque = state["value"]
        assert type(note) is Note
        assert note.mood is Mood.GOOD
        return state.update(out=[Note(Mood.GOOD, note.text + "!"), Opaque(opaque.inner + 1)])

    ((note, opaque),) = await outs_of(workers, SubGraphTask(answer, State({"value": [Note(Mood.GOOD), Opaque(1)]})))
    assert note == Note(Mood.GOOD, "none!")
    assert opaque.inner == 2


async def test_a_struct_that_no_module_has_is_refused_by_name(workers: RayExecutor) -> None:
    @register
    class Shape(msgspec.Struct):
        name: str

    @action(reads=["value"], writes=["out"])
    def names_it(state: State) -> State:
        return state.update(out=Shape("s"))

    said = (
        r"Shape is a msgspec\.Struct that other processes can't import.*move it into a module, or make it a dataclass"
    )
    with pytest.raises(MisuseError, match=rf"action 'names_it' can't be sent to a worker: .*{said}"):
        workers.check(names_it)
    with pytest.raises(MisuseError, match=said):
        await outs_of(workers, SubGraphTask(names_it, State({"value": 1})))
    with pytest.raises(Exception, match=said):  # the worker can't read it
        await outs_of(workers, SubGraphTask(subjects.echo_function, State({"value": Shape("s")})))
    assert await outs_of(workers, SubGraphTask(subjects.echo_function, State({"value": 1}))) == [(1, None)]


async def test_what_can_not_be_pickled_is_named(workers: RayExecutor) -> None:
    file = sys.stdout

    @action(reads=[], writes=["out"])
    def prints(state: State) -> State:
        return state.update(out=file.write("x"))

    with pytest.raises(MisuseError, match=r"action 'prints' can't be sent to a worker: .*cannot pickle.*closes over"):
        workers.check(prints)


async def test_what_is_too_large_to_travel_as_code_is_refused_with_the_numbers(workers: RayExecutor) -> None:
    large = os.urandom(65 * 2**20)

    @action(reads=[], writes=["out"])
    def weigh(state: State) -> State:
        return state.update(out=len(large))

    with pytest.raises(MisuseError, match=r"action 'weigh' takes \d+ bytes.*at most 67108864 are sent"):
        workers.check(weigh)


async def test_an_importable_action_that_a_closure_names_is_imported_there(workers: RayExecutor) -> None:
    """Not copied with the locks and counters of its module, which could not be pickled."""
    counting = subjects.count_at_once

    @action(reads=["value"], writes=["out"])
    def local(state: State) -> State:
        return state.update(out=counting(state)["out"])

    ((pid, most),) = await outs_of(workers, SubGraphTask(local, State({"value": 1})))
    assert (pid, most) == (workers.pids[0], 1)


# -- resources -------------------------------------------------------------------------------------------------------


async def test_workers_attach_to_detached_pools_and_actors(cluster: RayCluster, workers: RayExecutor) -> None:
    @action(reads=["value"], writes=["out"])
    async def ask(state: State, engine: EnginePool, counter: Any) -> State:
        answer = await engine.complete(state["value"])
        return state.update(out=(answer.text, await counter.incr(), os.getpid()))

    spec = EngineSpec(model="echo", engine="echo")
    pool = cluster.engines(spec, name="shared", lifetime="detached", cpus=0.1)
    counter = await cluster.spawn(Counter, name="shared-counter", lifetime="detached")
    try:
        async with pool:
            fan = Fan(*(SubGraphTask(ask, State({"value": f"word {n}"})) for n in range(3)))
            app = app_of(workers, fan, engine=pool, counter=counter)
            outs = (await app.arun()).state["outs"]
            assert outs == [(f"word {n}", n + 1, workers.pids[0]) for n in range(3)]
            assert await counter.incr() == 4
    finally:
        await pool.close()
        await cluster.stop(counter)


async def test_workers_attach_over_tls_where_their_cluster_has_it(ray_session: None, tls: TLSConfig) -> None:
    @action(reads=["value"], writes=["out"])
    async def ask(state: State, engine: EnginePool) -> State:
        return state.update(out=(await engine.complete(state["value"])).text)

    async with RayCluster.connect(tls=tls) as cluster, RayExecutor(cluster, workers=1) as workers:
        spec = EngineSpec(model="echo", engine="echo")
        pool = cluster.engines(spec, name="secret", lifetime="detached", cpus=0.1)
        try:
            async with pool:
                app = app_of(workers, Fan(SubGraphTask(ask, State({"value": "word"}))), engine=pool)
                assert (await app.arun()).state["outs"] == ["word"]
        finally:
            await pool.close()


async def test_a_resource_of_this_process_alone_stays_behind_and_says_so(
    cluster: RayCluster, workers: RayExecutor
) -> None:
    counter = await cluster.spawn(Counter)
    with pytest.raises(MisuseError, match=r"the resource 'engine' stays in the program's own process.*attach to det"):
        await app_of(workers, Fan(SubGraphTask(subjects.use_engine, State())), engine=counter).arun()
    await cluster.stop(counter)


# -- events ----------------------------------------------------------------------------------------------------------


async def test_items_and_partials_of_a_closure_stream_while_it_runs(
    workers: RayExecutor, folder: Path, begun: Callable[[], Any]
) -> None:
    @action(reads=["folder"], writes=["out"])
    async def steps(state: State) -> AsyncIterator[Any]:
        yield "first"
        yield state.update(out="half")
        while not (Path(state["folder"]) / "enough").exists():  # noqa: ASYNC110, ASYNC240 - another process tells
            await anyio.sleep(0.005)
        yield state.update(out="whole")

    stream = app_of(workers, Fan(SubGraphTask(steps, State({"folder": str(folder)})))).astream()
    seen: list[Any] = []
    async for event in stream:
        if isinstance(event, Item):
            seen += event.values
        elif isinstance(event, Partial) and event.path:
            seen.append(event.changed)
            (folder / "enough").touch()
    assert seen == ["first", {"out": "half"}, {"out": "whole"}]
    assert stream.result.state["outs"] == ["whole"]


# -- deaths and cancellation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "exit"])
async def test_a_worker_that_dies_fails_its_subtask_and_is_replaced(workers: RayExecutor, how: str) -> None:
    pid = await pid_of(workers)
    with pytest.raises(WorkerDied, match=rf"worker process {pid} died: .*, while it ran 'die' in fan/deadly") as caught:
        await outs_of(workers, SubGraphTask(subjects.die, State({"how": how}), key="deadly"))
    assert caught.value.pid == pid
    assert await pid_of(workers) != pid


async def test_a_worker_whose_connection_is_cut_lets_its_subtask_clean_up_and_is_replaced(
    cluster: RayCluster, workers: RayExecutor, folder: Path, begun: Callable[[], Any]
) -> None:
    pid = await pid_of(workers)
    [address] = [info.address for info in cluster.list() if info.pid == pid]
    cutting = asyncio.create_task(_cut_when(begun, address))
    with pytest.raises(WorkerDied, match=rf"worker process {pid} lost its connection to this program, and was stopped"):
        await outs_of(workers, SubGraphTask(subjects.hold_coroutine, State({"folder": str(folder)})))
    await cutting
    assert (folder / "cleaned").exists()
    assert await pid_of(workers) != pid


async def _cut_when(begun: Callable[[], Any], address: str) -> None:
    await begun()
    cut(address)


async def test_a_policy_retries_the_death_of_a_worker_and_tells_it(workers: RayExecutor, folder: Path) -> None:
    task = SubGraphTask(subjects.flaky, State({"folder": str(folder), "own_process": True}))
    retry = Retry(attempts=3, on=(ConnectionError, WorkerDied), initial=0)
    stream = app_of(workers, Fan(task, policy=Policy(retry=retry))).astream()
    kinds = [type(event).__name__ async for event in stream]
    assert kinds.count("SubtaskRetried") == 2
    assert stream.result.state["outs"] == [3]


async def test_a_worker_that_is_killed_from_outside_while_idle_is_replaced_without_an_error(
    workers: RayExecutor, gone: Gone
) -> None:
    pid = await pid_of(workers)
    gone.watch(pid)
    os.kill(pid, signal.SIGKILL)
    assert gone.left() == []
    with anyio.fail_after(60):
        while await pid_of(workers) == pid:
            pass


@pytest.mark.parametrize("subject", [subjects.hold_function, subjects.never_cleans_up, subjects.blocks_its_loop])
async def test_what_can_not_be_stopped_is_killed_and_replaced(
    workers: RayExecutor, subject: Any, folder: Path, begun: Callable[[], Any], gone: Gone
) -> None:
    pid = await pid_of(workers)
    gone.watch(pid)
    async with anyio.create_task_group() as group:
        group.start_soon(outs_of, workers, SubGraphTask(subject, State({"folder": str(folder)})))
        await begun()
        group.cancel_scope.cancel()
    assert gone.left(1) == []
    assert not (folder / "cleaned").exists()
    assert await pid_of(workers) != pid


async def test_what_cleans_up_leaves_its_worker_for_the_next(
    workers: RayExecutor, folder: Path, begun: Callable[[], Any]
) -> None:
    pid = await pid_of(workers)
    async with anyio.create_task_group() as group:
        group.start_soon(outs_of, workers, SubGraphTask(subjects.hold_coroutine, State({"folder": str(folder)})))
        await begun()
        group.cancel_scope.cancel()
    assert (folder / "cleaned").exists()
    assert await pid_of(workers) == pid


# -- placement and lifetime ------------------------------------------------------------------------------------------


async def test_workers_have_the_resources_that_they_reserve(cluster: RayCluster) -> None:
    @action(reads=[], writes=["out"])
    def tell_devices(state: State) -> State:
        return state.update(out=(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["MARK"]))

    async with RayExecutor(cluster, workers=2, cpus=1, gpus=1, env={"MARK": "m"}) as executor:
        outs = await outs_of(executor, *(SubGraphTask(tell_devices, State()) for _ in range(2)))
        assert {mark for _, mark in outs} == {"m"}
        assert {devices for devices, _ in outs} <= {"0", "1"}
        assert (await cluster.resources()).gpus_free == 0
    with anyio.fail_after(20):
        while (await cluster.resources()).gpus_free < 2:  # Ray counts what is free now and then  # noqa: ASYNC110
            await anyio.sleep(0.05)


async def test_workers_that_the_cluster_can_not_hold_are_refused_with_the_numbers(cluster: RayCluster) -> None:
    async with RayExecutor(cluster, workers=3, gpus=1) as executor:
        with pytest.raises(PlacementError, match=r"GPU"):
            await pid_of(executor)
        assert executor.pids == []


async def test_closing_ends_the_workers_and_what_runs(
    cluster: RayCluster, folder: Path, begun: Callable[[], Any], gone: Gone
) -> None:
    executor = RayExecutor(cluster, workers=1, cpus=0, grace=0.3)
    errors: list[BaseException] = []

    async def run() -> None:
        try:
            await outs_of(executor, SubGraphTask(subjects.hold_coroutine, State({"folder": str(folder)})))
        except MisuseError as exc:
            errors.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await begun()
        gone.watch(*executor.pids)
        await executor.aclose()
    assert gone.left() == []
    assert executor.pids == []
    assert "was closed while 'hold_coroutine' in fan/hold_coroutine[0] ran in it" in str(errors[0])
    assert (folder / "cleaned").exists()
    with pytest.raises(MisuseError, match="this RayExecutor is closed"):
        await pid_of(executor)


async def test_no_workers_at_all_are_refused(cluster: RayCluster) -> None:
    with pytest.raises(MisuseError, match="at least 1"):
        RayExecutor(cluster, workers=0)


PROGRAM = """
import os, sys
import asyncio, logging, structlog
from dataclasses import dataclass
from actors import RayCluster, RayExecutor
from arun import *
from arun.registry import register

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
limit = 3

@register
@dataclass
class Point:
    x: int

@action(reads=["value"], writes=["out"])
async def of_main(state):
    yield os.getpid()
    if state["value"].x > limit:
        await asyncio.sleep(1000)
    yield state.update(out=Point(state["value"].x + limit))

class Fan(MapStates):
    reads, writes = ["xs"], ["outs"]
    def action(self, state, inputs):
        return of_main
    def states(self, state, context, inputs):
        return (state.update(value=Point(x)) for x in state["xs"])
    async def reduce(self, state, states):
        return state.update(outs=[done["out"] async for done in states])

async def main(address, *xs):
    async with RayCluster.connect(address) as cluster, RayExecutor(cluster, workers=2, cpus=0.1) as executor:
        app = ApplicationBuilder().with_actions(fan=Fan()).with_executor(executor).with_state(xs=list(map(int, xs)))
        stream = app.build().astream()
        async for event in stream:
            if isinstance(event, Item):
                print(*event.values, flush=True)
        print(sorted(point.x for point in stream.result.state["outs"]))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def start(*xs: str) -> subprocess.Popen[str]:
        import ray

        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(PROGRAM))
        return subprocess.Popen(
            [sys.executable, str(path), ray.get_runtime_context().gcs_address, *xs],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


async def test_actions_and_types_of_the_main_module_run_in_workers_without_a_guard(
    program: Callable[..., subprocess.Popen[str]],
) -> None:
    out, _ = await anyio.to_thread.run_sync(program("1", "2").communicate)
    *pids, last = out.splitlines()
    assert last == "[4, 5]"
    assert len(pids) == 2


async def test_a_killed_driver_leaves_neither_workers_nor_code(
    program: Callable[..., subprocess.Popen[str]], gone: Gone
) -> None:
    before = set(table())
    process = program("10", "20")
    assert process.stdout is not None
    pids = [await anyio.to_thread.run_sync(process.stdout.readline) for _ in range(2)]
    gone.watch(*map(int, pids))
    assert set(table()) > before
    process.kill()
    await anyio.to_thread.run_sync(process.communicate)
    assert await anyio.to_thread.run_sync(gone.left) == []
    with anyio.fail_after(30):
        while set(table()) != before:  # the head node tidies up when it has seen the end of the job  # noqa: ASYNC110
            await anyio.sleep(0.05)
