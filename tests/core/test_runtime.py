"""The Runtime owns work that outlives the frame that started it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from contextvars import ContextVar, copy_context

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from arun import MisuseError, Runtime

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
setting: ContextVar[str] = ContextVar("setting", default="unset")


class Work:
    """Hangs until it is cancelled, and then cleans up."""

    def __init__(self) -> None:
        self.started, self.cleaned = anyio.Event(), False

    async def __call__(self) -> None:
        self.started.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            self.cleaned = True


async def double(n: int) -> int:
    await checkpoint()
    return 2 * n


async def fail() -> None:
    raise ValueError("no")


async def test_work_goes_on_without_its_starter(runtime: Runtime) -> None:
    work = runtime.start(double, 4, name="double")
    assert not work.done
    assert await work.wait() == 8
    assert work.done
    assert work.result() == 8
    assert Runtime.current() is runtime


async def test_an_error_is_kept_for_every_waiter_and_harms_nobody_else(runtime: Runtime) -> None:
    other = runtime.start(double, 1, name="double")
    work = runtime.start(fail, name="fail")
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            await work.wait()
    await work.ended()
    assert await other.wait() == 2


async def test_cancelled_work_cleans_up_and_gives_none(runtime: Runtime) -> None:
    work = Work()
    background = runtime.start(work, name="work")
    await work.started.wait()
    background.cancel()
    assert background.cancelling
    assert await background.wait() is None
    assert work.cleaned


async def test_work_can_be_cancelled_before_its_first_step(runtime: Runtime) -> None:
    work = Work()
    background = runtime.start(work, name="work")
    background.cancel()
    await background.ended()
    assert background.done


async def test_work_can_be_cancelled_from_another_thread(runtime: Runtime) -> None:
    work = Work()
    background = runtime.start(work, name="work")
    await work.started.wait()
    await anyio.to_thread.run_sync(background.cancel_soon)
    await background.ended()
    assert work.cleaned


async def test_a_cancelled_waiter_leaves_the_work_alone(runtime: Runtime) -> None:
    background = runtime.start(double, 3, name="double")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await background.wait()
    assert await background.wait() == 6


async def test_closing_it_cancels_all_work_and_waits_for_its_clean_up() -> None:
    works = [Work() for _ in range(3)]
    with anyio.CancelScope() as scope:
        async with Runtime() as runtime:
            for work in works:
                runtime.start(work, name="work")
            await works[-1].started.wait()
            scope.cancel()
    assert all(work.cleaned for work in works)
    with pytest.raises(MisuseError, match="work cannot start: this Runtime is closed"):
        runtime.start(Work(), name="work")


async def test_a_second_runtime_on_one_loop_is_refused(runtime: Runtime) -> None:
    with pytest.raises(MisuseError, match="already open"):
        async with Runtime():
            pass
    assert Runtime.current() is runtime


async def test_an_explicit_runtime_ends_with_its_block(anyio_backend: str) -> None:
    async with Runtime() as runtime:
        assert Runtime.current() is runtime
    if anyio_backend == "trio":
        with pytest.raises(MisuseError, match=r"async with arun.Runtime\(\)"):
            Runtime.current()
    else:
        assert Runtime.current() is Runtime.current() is not runtime


async def test_it_works_in_an_exit_stack_that_another_task_closes() -> None:
    stack, work = AsyncExitStack(), Work()
    runtime = await stack.enter_async_context(Runtime())
    runtime.start(work, name="work")
    await work.started.wait()
    async with anyio.create_task_group() as group:
        group.start_soon(stack.aclose)
    assert work.cleaned


async def test_work_runs_in_the_context_that_it_is_given(runtime: Runtime) -> None:
    async def look() -> str:
        return setting.get()

    setting.set("caller")
    assert await runtime.start(look, name="look").wait() == "caller"
    context = copy_context()
    context.run(setting.set, "other")
    assert await runtime.start(look, name="look", context=context).wait() == "other"
