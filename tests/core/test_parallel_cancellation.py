"""Parallel actions that are left early or cancelled, and what their subtasks keep to themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from arun import MisuseError, SubGraphTask
from tests.core.parallel_programs import Each, app_of, run, same

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
setting: ContextVar[str] = ContextVar("setting", default="unset")


# -- early exit ------------------------------------------------------------------------------------


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

    with pytest.raises(MisuseError, match=r"Each\.reduce at .* ended without reading its results, so the"):
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


# -- cancellation from outside ---------------------------------------------------------------------


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
        if calls == 3:
            begun.set()
        if calls <= 3:
            await anyio.sleep_forever()
        return i

    begun = anyio.Event()
    app = app_of(Each(work))
    async with anyio.create_task_group() as group:
        group.start_soon(app.arun)
        await begun.wait()
        group.cancel_scope.cancel()
    assert (await app.arun()).state["ys"] == [0, 1, 2]


# -- isolation -------------------------------------------------------------------------------------


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
