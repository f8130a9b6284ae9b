"""ProcessExecutor: deaths, cancellation, what crosses and what does not, and that nothing is left of it."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import executor_subjects as subjects
import pytest
from executor_fan import Fan, app_of, outs_of, pid_of
from executor_gone import Gone

from arun import (
    MisuseError,
    Policy,
    ProcessExecutor,
    Runtime,
    State,
    SubGraphTask,
    WorkerDied,
)
from arun.context import ApplicationContext, Run
from arun.errors import RemoteError

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def processes(runtime: Runtime) -> AsyncIterator[ProcessExecutor]:
    async with ProcessExecutor(1, grace=0.3) as executor:
        yield executor


# -- processes -------------------------------------------------------------------------------------------------------


async def test_a_process_is_reused_and_is_not_this_one(processes: ProcessExecutor) -> None:
    pid = await pid_of(processes)
    assert pid != os.getpid()
    assert await pid_of(processes) == pid
    assert processes.pids == [pid]


@pytest.mark.parametrize(
    ("how", "said", "number"),
    [
        ("exit", r"exited by itself with code 3", None),
        ("kill", r"was killed by signal 9 \(SIGKILL\); if you did not send it, .*out-of-memory", 9),
        ("segfault", r"was killed by signal 11 \(SIGSEGV\)", 11),
    ],
)
async def test_a_process_that_dies_fails_its_subtask_and_is_replaced(
    processes: ProcessExecutor, how: str, said: str, number: int | None
) -> None:
    pid = await pid_of(processes)
    with pytest.raises(WorkerDied, match=rf"worker process {pid} {said}.*, while it ran 'die' in fan/deadly") as caught:
        await outs_of(processes, SubGraphTask(subjects.die, State({"how": how}), key="deadly"))
    assert (caught.value.pid, caught.value.signal) == (pid, number)
    assert await pid_of(processes) != pid


async def test_a_process_that_is_out_of_reach_counts_as_dead(processes: ProcessExecutor, gone: Gone) -> None:
    pid = await pid_of(processes)
    gone.watch(pid)
    with pytest.raises(WorkerDied, match=f"worker process {pid} (was killed by signal 9|exited)"):
        await outs_of(processes, SubGraphTask(subjects.die, State({"how": "close"})))
    assert gone.left(0) == []


async def test_the_death_of_one_process_is_an_error_of_one_subtask(processes: ProcessExecutor) -> None:
    tasks = [SubGraphTask(subjects.die, State({"how": how})) for how in ("not", "kill", "no", "exit", "nor")]
    outs = await outs_of(processes, *tasks, policy=Policy(on_error="skip"))
    assert len(outs) == 3


async def test_a_process_that_died_while_idle_is_replaced_without_an_error(
    processes: ProcessExecutor, gone: Gone
) -> None:
    pid = await pid_of(processes)
    gone.watch(pid)
    os.kill(pid, signal.SIGKILL)
    assert gone.left() == []
    assert await pid_of(processes) != pid


async def test_processes_ignore_sigint(processes: ProcessExecutor) -> None:
    pid = await pid_of(processes)
    os.kill(pid, signal.SIGINT)
    assert await pid_of(processes) == pid


# -- cancellation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [subjects.hold_function, subjects.never_cleans_up, subjects.blocks_its_loop])
async def test_what_can_not_be_stopped_is_killed_and_replaced(
    processes: ProcessExecutor, subject: Any, folder: Path, begun: Callable[[], Any], gone: Gone
) -> None:
    pid = await pid_of(processes)
    gone.watch(pid)
    async with anyio.create_task_group() as group:
        group.start_soon(outs_of, processes, SubGraphTask(subject, State({"folder": str(folder)})))
        await begun()
        group.cancel_scope.cancel()
    assert gone.left(0) == []
    assert not (folder / "cleaned").exists()
    assert await pid_of(processes) != pid


async def test_what_cleans_up_leaves_its_process_for_the_next(
    processes: ProcessExecutor, folder: Path, begun: Callable[[], Any]
) -> None:
    pid = await pid_of(processes)
    async with anyio.create_task_group() as group:
        group.start_soon(outs_of, processes, SubGraphTask(subjects.hold_coroutine, State({"folder": str(folder)})))
        await begun()
        group.cancel_scope.cancel()
    assert (folder / "cleaned").exists()
    assert await pid_of(processes) == pid


# -- what crosses ----------------------------------------------------------------------------------------------------


async def test_an_error_has_the_traceback_of_its_process_as_a_note(processes: ProcessExecutor) -> None:
    with pytest.raises(ValueError, match="bad value") as caught:
        await outs_of(processes, SubGraphTask(subjects.fail_function, State({"what": "value"})))
    (note,) = [note for note in caught.value.__notes__ if "raised in worker process" in note]
    assert f"worker process {processes.pids[0]}" in note
    assert "in _raise" in note


async def test_an_error_of_the_programs_own_arrives_as_remote_error(processes: ProcessExecutor) -> None:
    with pytest.raises(RemoteError, match=r"executor_subjects\.OfTheProgram: odd") as caught:
        await outs_of(processes, SubGraphTask(subjects.fail_function, State({"what": "own"})))
    assert "in _raise" in caught.value.remote_traceback


async def test_only_the_keys_that_an_action_may_read_cross(processes: ProcessExecutor) -> None:
    state = State({"value": 1, "unrelated": object()})
    assert await outs_of(processes, SubGraphTask(subjects.echo_function, state)) == [(1, None)]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            SubGraphTask(subjects.echo_function, State({"value": object()})),
            r"state\['value'\], which action 'echo_function' may read, can't cross to a worker process: .*type object",
        ),
        (
            SubGraphTask(subjects.echo_function, State({"value": 1}), {"suffix": object()}),
            r"the input 'suffix' of action 'echo_function' can't cross",
        ),
        (SubGraphTask(subjects.give_object, State()), r"state\['out'\], which action 'give_object' wrote, can't cross"),
    ],
)
async def test_a_value_that_can_not_cross_is_named(processes: ProcessExecutor, task: SubGraphTask, said: str) -> None:
    with pytest.raises(MisuseError, match=said):
        await outs_of(processes, task)


async def test_an_item_that_can_not_cross_is_named(processes: ProcessExecutor) -> None:
    app = app_of(processes, Fan(SubGraphTask(subjects.give_object_item, State())))
    assert (await app.session().arun()).state["outs"] == [1]  # nobody listens, so it needn't
    with pytest.raises(MisuseError, match=r"what action 'give_object_item' yielded .* can't cross"):
        async for _ in app.astream():
            pass


async def test_a_resource_stays_behind_and_says_so(processes: ProcessExecutor) -> None:
    task = SubGraphTask(subjects.use_engine, State())
    assert await outs_of(processes, task) == ["none"]
    with pytest.raises(MisuseError, match=r"the resource 'engine' stays in the program's own process.*executor=None"):
        await app_of(processes, Fan(task), engine=object()).arun()


async def test_items_wait_in_the_process_for_a_slow_consumer(processes: ProcessExecutor, tmp_path: Path) -> None:
    counter = tmp_path / "produced"
    ahead: list[int] = []
    enough = anyio.Event()

    class Slow:
        full = True

        async def room(self, kind: object) -> None:
            await anyio.sleep(0.002)

        def put(self, event: Any) -> None:
            ahead.append(int(counter.read_text() or 0) - event.values[0] if hasattr(event, "values") else 0)
            if len(ahead) == 100:
                enough.set()

    context = ApplicationContext(
        app_id="a",
        partition_key=None,
        sequence_id=0,
        action_name="pour",
        path=(),
        inputs={},
        resources={},
        run=Run(Slow()),
    )
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(processes.run, subjects.pour, State({"value": str(counter)}), {}, context)
            await enough.wait()
            scope.cancel()
    assert 5 <= max(ahead) <= 20


# -- lifetime --------------------------------------------------------------------------------------------------------


async def test_closing_ends_the_processes_and_all_that_they_started(gone: Gone, runtime: Runtime) -> None:
    async with ProcessExecutor(2) as processes:
        (child,) = await outs_of(processes, SubGraphTask(subjects.start_program, State()))
        gone.watch(child, *processes.pids)
    assert processes.pids == []
    assert gone.left() == []
    with pytest.raises(MisuseError, match="this ProcessExecutor is closed"):
        await pid_of(processes)


async def test_closing_ends_what_still_runs(
    gone: Gone, folder: Path, begun: Callable[[], Any], runtime: Runtime
) -> None:
    processes = ProcessExecutor(1, grace=0.3)
    errors: list[BaseException] = []

    async def run() -> None:
        try:
            await outs_of(processes, SubGraphTask(subjects.hold_coroutine, State({"folder": str(folder)})))
        except MisuseError as exc:
            errors.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await begun()
        gone.watch(*processes.pids)
        await processes.aclose()
        assert gone.left() == []
    assert "was closed while 'hold_coroutine' in fan/hold_coroutine[0] ran in it" in str(errors[0])
    assert (folder / "cleaned").exists()
