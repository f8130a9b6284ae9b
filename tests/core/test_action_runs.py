"""What happens around an action while it runs: contexts, scopes, errors, cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.from_thread
import pytest
from anyio.lowlevel import checkpoint

from arun import Runtime, State, action
from tests.core.action_programs import app_of, run

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
setting: ContextVar[str] = ContextVar("setting", default="unset")


# -- what happens around an action -----------------------------------------------------------------


async def test_what_an_action_sets_in_its_context_does_not_leak() -> None:
    def setter(kind: str) -> Any:
        async def coroutine(state: State) -> State:
            seen.append(setting.get())
            setting.set("inside")
            await checkpoint()
            assert setting.get() == "inside"
            return state

        async def generator(state: State) -> AsyncIterator[State]:
            seen.append(setting.get())
            setting.set("inside")
            await checkpoint()
            yield state
            assert setting.get() == "inside"

        def function(state: State) -> State:
            seen.append(setting.get())
            setting.set("inside")
            return state

        return {"coroutine": coroutine, "generator": generator, "function": function}[kind]

    seen: list[str] = []
    setting.set("caller")
    for kind in ("coroutine", "generator", "function"):
        await run(action(reads=[], writes=[])(setter(kind)))
    assert seen == ["caller"] * 3
    assert setting.get() == "caller"


async def test_scopes_and_groups_inside_an_action_work() -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> State:
        done: list[int] = []

        async def child(i: int) -> None:
            await checkpoint()
            done.append(i)

        async with anyio.create_task_group() as group:
            for i in range(3):
                group.start_soon(child, i)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()
        with anyio.move_on_after(0):
            await anyio.sleep_forever()
        return state.update(n=len(done))

    assert await run(step) == {"n": 3}


@pytest.mark.usefixtures("asyncio_only")
async def test_asyncio_timeouts_and_groups_inside_an_action_work() -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> State:
        try:
            async with asyncio.timeout(0):
                await anyio.sleep_forever()
        except TimeoutError:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(asyncio.sleep(0, result=7))
            return state.update(n=task.result())
        return state

    assert await run(step) == {"n": 7}


async def test_an_action_may_catch_its_own_timeout() -> None:
    @action(reads=[], writes=["n"])
    async def step(state: State) -> AsyncIterator[State]:
        try:
            with anyio.fail_after(0):
                await anyio.sleep_forever()
        except TimeoutError:
            await checkpoint()
            yield state.update(n="late")

    assert await run(step) == {"n": "late"}


async def test_an_actions_own_error_comes_out_as_it_is_with_a_note() -> None:
    error = ExceptionGroup("mine", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])

    @action(reads=[], writes=[])
    async def step(state: State) -> State:
        raise error

    app = app_of(step)
    with pytest.raises(ExceptionGroup) as caught:
        await app.arun()
    assert caught.value is error
    assert error.__notes__ == [f"in action 'step' of application {app.uid!r}, step 0"]


# -- cancellation ----------------------------------------------------------------------------------


async def test_a_cancelled_generator_is_closed_and_its_clean_up_awaited() -> None:
    ready, cleaned = anyio.Event(), []

    @action(reads=[], writes=[])
    async def step(state: State) -> AsyncIterator[Any]:
        try:
            yield 1
            ready.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            cleaned.append(True)

    async with anyio.create_task_group() as group:
        group.start_soon(run, step)
        await ready.wait()
        group.cancel_scope.cancel()
    assert cleaned == [True]


@pytest.mark.parametrize("how", ["scope", "timeout", "task"])
async def test_a_cancelled_run_waits_for_the_thread_that_it_started(how: str, anyio_backend: str) -> None:
    if how != "scope" and anyio_backend != "asyncio":
        pytest.skip("asyncio's own cancellation")
    entered, leave, ended = threading.Event(), threading.Event(), threading.Event()

    @action(reads=[], writes=[])
    def step(state: State) -> State:
        anyio.from_thread.run_sync(in_thread.set)
        entered.set()
        assert leave.wait(30)
        ended.set()
        return state

    in_thread = anyio.Event()

    async def cancelled() -> None:
        if how == "scope":
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await run(step)
        elif how == "timeout":
            with pytest.raises(TimeoutError):  # noqa: PT012 - the timeout is what raises
                async with asyncio.timeout(None) as timeout:
                    scopes.append(timeout)
                    await run(step)
        else:
            task = asyncio.create_task(run(step))
            scopes.append(task)
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ended.is_set()

    scopes: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(cancelled)
        await in_thread.wait()
        match how:
            case "timeout":
                scopes[0].reschedule(0)
                await asyncio.sleep(0)
            case _:
                scopes[0].cancel()
        await anyio.wait_all_tasks_blocked()
        leave.set()


@pytest.mark.parametrize("how", ["scope", "task"])
@pytest.mark.parametrize("listening", [False, True])
async def test_an_endless_plain_generator_ends_when_its_run_is_cancelled(
    how: str, listening: bool, anyio_backend: str, runtime: Runtime
) -> None:
    if how == "task" and anyio_backend != "asyncio":
        pytest.skip("asyncio's own cancellation")
    stepping, closed = anyio.Event(), threading.Event()

    @action(reads=[], writes=[])
    def endless(state: State) -> Iterator[int]:
        try:
            while True:
                anyio.from_thread.run_sync(stepping.set)
                yield 1
        finally:
            closed.set()

    async def consume() -> None:
        if not listening:
            await run(endless)
        async with app_of(endless).astream() as stream:
            async for _ in stream:
                await anyio.sleep_forever()  # a consumer that never takes a second event

    if how == "task":
        task = asyncio.create_task(consume())
        await stepping.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            if listening:
                await anyio.wait_all_tasks_blocked()
            else:
                await stepping.wait()
            group.cancel_scope.cancel()
    if not listening:
        assert closed.is_set()


async def test_an_error_of_a_plain_generators_clean_up_is_raised() -> None:
    @action(reads=[], writes=[])
    def step(state: State) -> Iterator[Any]:
        try:
            yield state
        finally:
            raise OSError("clean-up")

    with pytest.raises(OSError, match="clean-up"):
        await run(step)


@pytest.mark.parametrize("error", [StopIteration(), StopAsyncIteration(), ValueError("x")])
async def test_what_a_function_raises_arrives(error: Exception) -> None:
    @action(reads=[], writes=[], blocking=False)
    def step(state: State) -> State:
        raise error

    with pytest.raises((type(error), RuntimeError)):
        await run(step)
