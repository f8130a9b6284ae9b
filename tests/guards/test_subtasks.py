"""Rows 4, 8, 11, 12, 13, 15, 20 and 22: results, handles and subtasks used in ways that can't work."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from arun import (
    ApplicationBuilder,
    ApplicationBusyError,
    Capacity,
    FanOut,
    MisuseError,
    MisuseWarning,
    Policy,
    Runtime,
    State,
    SubGraphTask,
    SubtaskFailed,
    TaskBasedParallelAction,
    action,
    fan_out,
)
from arun.channel import memory_pair
from tests.guards.programs import app_of, place, raised_at

pytestmark = pytest.mark.anyio


@action(reads=["i"], writes=["y"])
async def one(state: State) -> State:
    await checkpoint()
    return state.update(y=state["i"])


def parallel(
    tasks: Callable[..., Any] | None = None, reduce: Callable[..., Any] | None = None, **policy: Any
) -> TaskBasedParallelAction:
    """A parallel action of two functions: ``tasks(state)`` and ``reduce(states)``, which gives what ``y`` becomes."""

    async def two(state: State) -> AsyncIterator[Any]:
        for i in range(2):
            yield SubGraphTask(one, state.update(i=i))

    async def total(states: AsyncIterator[Any]) -> Any:
        return sum([done["y"] async for done in states])

    class Parallel(TaskBasedParallelAction):
        writes = ("y",)

        def tasks(self, state: State, context: Any, inputs: Any) -> Any:
            return (tasks or two)(state)

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
            return state.update(y=await (reduce or total)(states))

    made = Parallel()
    made.policy = Policy(**policy)
    return made


async def test_results_read_by_two_tasks() -> None:
    async def split(states: AsyncIterator[Any]) -> None:
        async def read() -> None:
            async for _ in states:
                pass

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            group.start_soon(read)

    with pytest.raises(ExceptionGroup) as caught:
        await app_of(parallel(reduce=split)).arun()
    assert caught.group_contains(MisuseError, match="two tasks read the same results")


async def test_results_read_twice() -> None:
    async def again(states: AsyncIterator[Any]) -> int:
        first = [done async for done in states]
        return len(first) - len([done async for done in states])  # here

    with pytest.raises(MisuseError, match=r"read to their end already.*keep what you need") as caught:
        await app_of(parallel(reduce=again)).arun()
    assert raised_at(caught.value) == place(test_results_read_twice)


async def test_a_fan_out_read_twice() -> None:
    async with Runtime():
        outcomes = fan_out([number, number])
        assert len([one async for one in outcomes]) == 2
        with pytest.raises(MisuseError, match=r"read to their end already.*keep what you need") as caught:
            [one async for one in outcomes]  # here
        assert raised_at(caught.value) == place(test_a_fan_out_read_twice)
        closed = fan_out([number])
        await closed.aclose()
        assert not [one async for one in closed]


async def test_a_plain_loop_over_results() -> None:
    async def plain(states: AsyncIterator[Any]) -> int:
        return sum(1 for _ in states)  # type: ignore[attr-defined]  # here

    with pytest.raises(MisuseError, match=r"the results of Parallel .*write `async for done in ...`") as caught:
        await app_of(parallel(reduce=plain)).arun()
    assert raised_at(caught.value) == place(test_a_plain_loop_over_results)
    with pytest.raises(MisuseError, match=r"the results of fan_out\(\) .*write `async for done in ...`"):
        list(fan_out([number]))


@pytest.mark.parametrize("error", [StopAsyncIteration, StopIteration])
async def test_a_subtask_that_raises_stop_async_iteration(error: type[Exception]) -> None:
    async def stop() -> None:
        raise error("from a bare next()")

    async with Runtime():
        outcomes = fan_out([stop], Policy(on_error="collect"))
        (outcome,) = [one async for one in outcomes]
    assert isinstance(outcome.error, RuntimeError)
    assert error.__name__ in str(outcome.error)


async def test_a_subtask_that_is_made_and_never_yielded() -> None:
    async def forgetful(state: State) -> AsyncIterator[Any]:
        yield SubGraphTask(one, state.update(i=1))
        SubGraphTask(one, state.update(i=2))  # here

    with pytest.warns(MisuseWarning, match="SubGraphTask made in .*forgetful at .* was never yielded") as caught:
        await app_of(parallel(forgetful)).arun()
    (warning,) = caught
    assert f"{warning.filename}:{warning.lineno}" == place(test_a_subtask_that_is_made_and_never_yielded)


async def test_subtasks_made_before_they_are_yielded_or_left_by_an_early_exit_are_fine() -> None:
    async def listed(state: State) -> AsyncIterator[Any]:
        for task in [SubGraphTask(one, state.update(i=i)) for i in range(200)]:
            yield task

    async def first(states: AsyncIterator[Any]) -> Any:
        async for done in states:
            return done["y"]

    assert (await app_of(parallel(listed)).arun()).state["y"] == sum(range(200))
    await app_of(parallel(listed, first, limit=5)).arun()

    async def failing(state: State) -> AsyncIterator[Any]:
        task = SubGraphTask(one, state.update(i=1))
        raise LookupError(task)
        yield task

    with pytest.raises(LookupError):
        await app_of(parallel(failing)).arun()


async def test_a_task_that_is_awaited_instead_of_yielded() -> None:
    async def awaiting(state: State) -> AsyncIterator[Any]:
        await SubGraphTask(one, state.update(i=1))  # here
        yield

    with pytest.raises(MisuseError, match=r"one\(i=1\) was awaited, but it has not been started; yield it") as caught:
        await app_of(parallel(awaiting)).arun()
    assert place(test_a_task_that_is_awaited_instead_of_yielded) in _frames(caught.value)


async def test_yield_await_subtask() -> None:
    async def serial(state: State) -> AsyncIterator[Any]:
        handle = yield SubGraphTask(one, state.update(i=1))
        yield await handle  # here

    with pytest.raises(MisuseError, match="yield the task itself") as caught:
        await app_of(parallel(serial)).arun()
    assert raised_at(caught.value) == place(test_yield_await_subtask)


async def test_two_subtasks_that_await_each_other() -> None:
    handles: dict[int, Any] = {}
    ready = anyio.Event()

    @action(reads=["i"], writes=["y"])
    async def waiting(state: State) -> State:
        await ready.wait()
        await handles[1 - state["i"]]
        return state.update(y=1)

    async def both(state: State) -> AsyncIterator[Any]:
        handles[0] = yield SubGraphTask(waiting, state.update(i=0))
        handles[1] = yield SubGraphTask(waiting, state.update(i=1))
        ready.set()

    with anyio.fail_after(5), pytest.raises((MisuseError, ExceptionGroup), match="deadlock") as caught:
        await app_of(parallel(both)).arun()
    assert "waiting(i=0)" in str(caught.value)
    assert "waiting(i=1)" in str(caught.value)


async def test_a_subtask_that_awaits_itself_or_its_parent() -> None:
    handles: list[Any] = []

    @action(reads=["i"], writes=["y"])
    async def selfish(state: State) -> State:
        await checkpoint()
        await handles[0]
        return state

    async def itself(state: State) -> AsyncIterator[Any]:
        handles.append((yield SubGraphTask(selfish, state.update(i=0))))

    async def nested(state: State) -> AsyncIterator[Any]:
        yield SubGraphTask(selfish, state.update(i=0))

    async def above(state: State) -> AsyncIterator[Any]:
        handles.append((yield SubGraphTask(parallel(nested).with_name("nested"), state)))

    for tasks in (itself, above):
        handles.clear()
        with anyio.fail_after(5), pytest.raises(MisuseError, match=r"deadlock: .* awaits "):
            await app_of(parallel(tasks)).arun()


async def test_a_capacity_that_a_caller_already_holds() -> None:
    capacity = Capacity(1)

    @action(reads=[], writes=["y"])
    async def calling(state: State) -> State:
        inner = app_of(parallel(lambda state: [SubGraphTask(one, state.update(i=1))], capacity=capacity))
        return state.update(y=(await inner.arun()).state["y"])

    async def tasks(state: State) -> AsyncIterator[Any]:
        yield SubGraphTask(calling, state)

    with anyio.fail_after(5), pytest.raises(MisuseError, match="deadlock: action 'one' waits for a share"):
        await app_of(parallel(tasks, capacity=capacity)).arun()


async def test_a_reducer_that_never_reads() -> None:
    class Idle(type(parallel())):  # type: ignore[misc]  # made by a function
        async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:  # here
            return state.update(y=0)

    with pytest.raises(MisuseError, match=r"Idle\.reduce at .* ended without reading its results") as caught:
        await app_of(Idle()).arun()
    assert place(test_a_reducer_that_never_reads) in str(caught.value)


async def test_awaiting_a_failed_subtask_tells_its_error() -> None:
    @action(reads=[], writes=["y"])
    async def bad(state: State) -> State:
        raise ValueError("bad")

    async def tasks(state: State) -> AsyncIterator[Any]:
        handle = yield SubGraphTask(bad, state)
        with pytest.raises(SubtaskFailed, match="bad"):
            await handle
        raise LookupError("told")

    with pytest.raises((ValueError, LookupError, ExceptionGroup)):
        await app_of(parallel(tasks)).arun()


# -- another event loop -----------------------------------------------------------------------------------------


async def forever() -> int:
    await anyio.sleep_forever()
    return 1


async def number() -> int:
    return 1


def elsewhere(function: Callable[[], Any]) -> BaseException:
    """What a coroutine function raises on an event loop of another thread."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(asyncio.wait_for(function(), 5))
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0]


async def test_a_fan_out_read_on_another_event_loop() -> None:
    async with Runtime():
        for awaitables in ([number, number], [number, forever]):
            outcomes: FanOut[int] = fan_out(awaitables)
            await anext(outcomes)
            with anyio.CancelScope():
                error = elsewhere(outcomes.__anext__)
            assert isinstance(error, MisuseError)
            assert "another event loop or thread" in str(error)
            await outcomes.aclose()


async def test_a_stream_read_on_another_event_loop() -> None:
    async with Runtime():
        stream = app_of(parallel()).astream()
        await anext(stream)
        error = elsewhere(stream.__anext__)
        assert isinstance(error, MisuseError)
        assert "started on another event loop" in str(error)
        assert [event async for event in stream]  # still usable where it belongs


async def test_a_handle_awaited_on_another_event_loop() -> None:
    errors: list[BaseException] = []

    @action(reads=[], writes=["y"])
    async def slow(state: State) -> State:
        await anyio.sleep(0.05)
        return state.update(y=1)

    async def tasks(state: State) -> AsyncIterator[Any]:
        handle = yield SubGraphTask(slow, state)
        errors.append(elsewhere(handle.outcome))

    await app_of(parallel(tasks)).arun()
    assert "was started on another event loop" in str(errors[0])


async def test_a_channel_used_on_another_event_loop() -> None:
    async def two(method: str, payload: Any) -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()
        yield 2

    async with Runtime():
        client, server = memory_pair(handler_b=two)
        stream = client.open("two")
        assert await anext(stream) == 1

        async def opened() -> Any:
            return client.open("two")

        for use in (stream.__anext__, opened, functools.partial(client.call, "two")):
            error = elsewhere(use)
            assert isinstance(error, MisuseError)
            assert "the connection to memory was made on another event loop, the only one that can use it" in str(error)
        await stream.aclose()
        await client.aclose()
        await server.aclose()


# -- twice --------------------------------------------------------------------------------------------------------


async def test_two_runs_of_one_application_at_once() -> None:
    started = anyio.Event()

    @action(reads=[], writes=[])
    async def wait(state: State) -> State:
        started.set()
        await anyio.sleep_forever()
        return state

    app = app_of(wait)
    async with anyio.create_task_group() as group:
        group.start_soon(app.arun)
        await started.wait()
        with pytest.raises(ApplicationBusyError, match=r"use app.session\(\)"):
            await app.arun()
        group.cancel_scope.cancel()


async def test_two_subtasks_of_one_key() -> None:
    async def tasks(state: State) -> AsyncIterator[Any]:
        for i in range(2):
            yield SubGraphTask(one, state.update(i=i), key="same")  # here

    with pytest.raises(MisuseError, match="two subtasks of 'Parallel' have the key 'same'") as caught:
        await app_of(parallel(tasks)).arun()
    assert raised_at(caught.value) == place(test_two_subtasks_of_one_key)


def test_two_actions_of_one_name() -> None:
    with pytest.raises(MisuseError, match="two actions are named 'one'"):
        ApplicationBuilder().with_actions(one, one)


def _frames(error: BaseException) -> list[str]:
    places, traceback = [], error.__traceback__
    while traceback is not None:
        places.append(f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return places
