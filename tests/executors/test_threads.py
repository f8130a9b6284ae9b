"""ThreadExecutor: what is its own, and what becomes of threads that will not end (also without it)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import executor_subjects as subjects
import pytest
from executor_fan import Fan, app_of, outs_of

from arun import AbandonedWork, MisuseError, Policy, RunnableGraph, State, SubGraphTask, ThreadExecutor

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _runtime(runtime: Any) -> None:
    """Every test here runs in the module's event loop."""


async def test_a_generator_stays_on_one_thread_that_is_not_the_loops() -> None:
    (out,) = await outs_of(ThreadExecutor(), SubGraphTask(subjects.tell_place, State()))
    assert out == {"pid": os.getpid(), "threads": 1, "main": False}


async def test_functions_declared_as_not_blocking_run_in_threads_too() -> None:
    task = SubGraphTask(subjects.tell_place_inline, State())
    assert await outs_of(None, task) == [{"main": True}]
    assert await outs_of(ThreadExecutor(), task) == [{"main": False}]


@pytest.mark.parametrize("kind", ["coroutine", "async generator"])
async def test_async_actions_are_refused_by_name_with_what_to_do(kind: str) -> None:
    echo = subjects.ECHO[kind]
    with pytest.raises(
        MisuseError, match=rf"'{echo.name}' is async \({kind}, .*executor_subjects.py:\d+\).*executor=None"
    ):
        await outs_of(ThreadExecutor(), SubGraphTask(echo, State({"value": 1})))
    with pytest.raises(MisuseError, match=echo.name):
        ThreadExecutor().check(RunnableGraph.create(echo))


async def test_it_bounds_the_number_of_threads() -> None:
    subjects.reset_count()
    tasks = [SubGraphTask(subjects.count_at_once, State({"value": n})) for n in range(50)]
    outs = await outs_of(ThreadExecutor(3), *tasks)
    assert 1 < max(most for _, most in outs) <= 3


async def test_without_a_bound_the_policys_limit_is_the_number_of_threads() -> None:
    """Also beyond anyio's 40."""
    subjects.reset_count()
    tasks = [SubGraphTask(subjects.count_at_once, State({"value": n})) for n in range(300)]
    outs = await outs_of(ThreadExecutor(), *tasks, policy=Policy(limit=60))
    assert 1 < max(most for _, most in outs) <= 60


def test_no_threads_at_all_are_refused() -> None:
    with pytest.raises(MisuseError, match="at least 1"):
        ThreadExecutor(0)


async def test_a_blocking_function_does_not_stall_the_loop(folder: Path, begun: Callable[[], Any]) -> None:
    outs: list[Any] = []

    async def run() -> None:
        outs.extend(
            await outs_of(ThreadExecutor(), SubGraphTask(subjects.hold_function, State({"folder": str(folder)})))
        )

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await begun()
        for _ in range(100):  # the loop turns while the function blocks its thread
            await anyio.lowlevel.checkpoint()
        assert outs == []
        (folder / "enough").touch()
    assert outs == [1]


@pytest.mark.parametrize("chosen", [ThreadExecutor(), None], ids=["thread", "none"])
async def test_a_cancelled_run_waits_for_a_function_that_ends_in_time(
    chosen: Any, folder: Path, begun: Callable[[], Any]
) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(outs_of, chosen, SubGraphTask(subjects.hold_function, State({"folder": str(folder)})))
        await begun()
        (folder / "enough").touch()
        group.cancel_scope.cancel()
    assert (folder / "cleaned").exists()


async def test_a_thread_that_does_not_end_is_reported_with_its_line_and_the_run_goes_on(
    folder: Path, begun: Callable[[], Any]
) -> None:
    hold = SubGraphTask(subjects.hold_function, State({"folder": str(folder)}), key="stuck")
    quick = SubGraphTask(subjects.tell_n_plainly, State({"n": 7}))
    with pytest.warns(AbandonedWork) as caught:
        outs = await outs_of(ThreadExecutor(grace=0.05), hold, quick, policy=Policy(), take=1, begun=begun)
    assert outs == [7]
    assert not (folder / "cleaned").exists()
    (warning,) = [w.message for w in caught if isinstance(w.message, AbandonedWork)]
    assert warning.label == "'hold_function' in fan/stuck"
    assert warning.line.startswith("hold_function at ")
    assert "executor_subjects.py:" in warning.line
    assert "still runs after 0.05 s" in str(warning)
    (folder / "enough").touch()


async def test_a_generator_that_waits_for_its_consumer_ends_with_the_run(
    folder: Path, begun: Callable[[], Any]
) -> None:
    """It stands in a full mailbox, not in code of its own: that must not count as a thread that does not end."""
    app = app_of(ThreadExecutor(), Fan(SubGraphTask(subjects.HOLD["generator"], State({"folder": str(folder)}))))
    async with app.astream() as events:
        async with anyio.create_task_group() as group:
            group.start_soon(begun)
            await anext(aiter(events))
        await anyio.wait_all_tasks_blocked()
    assert (folder / "cleaned").exists()


async def test_asyncios_own_cancellation_waits_for_the_thread_too(
    anyio_backend: str, folder: Path, begun: Callable[[], Any]
) -> None:
    if anyio_backend == "trio":
        pytest.skip("asyncio's own cancellation")
    task = asyncio.create_task(
        outs_of(ThreadExecutor(), SubGraphTask(subjects.hold_function, State({"folder": str(folder)})))
    )
    await begun()
    task.cancel()
    await anyio.lowlevel.checkpoint()
    task.cancel()
    (folder / "enough").touch()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (folder / "cleaned").exists()
