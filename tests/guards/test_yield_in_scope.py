"""Row 1: ``yield`` inside a task group, cancel scope or timeout, and ``hosted=True``, which makes it work."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint

from arun import MapStates, MisuseError, Runtime, SingleStepAction, State, SubGraphTask, TaskBasedParallelAction, action
from tests.guards.programs import app_of, place, raised_at

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def pool() -> AsyncIterator[int]:
    async with anyio.create_task_group():
        yield 1


@contextlib.contextmanager
def limited() -> Any:
    with anyio.fail_after(5):
        yield


async def in_task_group(state: State) -> AsyncIterator[Any]:
    async with anyio.create_task_group():
        yield 1  # here
    yield state


async def in_scope(state: State) -> AsyncIterator[Any]:
    with anyio.CancelScope() as _:
        if state is not None:
            yield 1  # here


async def in_move_on_after(state: State) -> AsyncIterator[Any]:
    with open(__file__, encoding="utf-8"), anyio.move_on_after(1):  # noqa: ASYNC230 - a test
        yield state  # here


async def in_fail_after(state: State) -> AsyncIterator[Any]:
    with anyio.fail_after(1):
        yield state  # here


async def in_asyncio_group(state: State) -> AsyncIterator[Any]:
    async with asyncio.TaskGroup():
        yield state  # here


async def in_asyncio_timeout(state: State) -> AsyncIterator[Any]:
    async with asyncio.timeout(1):
        yield state  # here


async def in_nursery(state: State) -> AsyncIterator[Any]:
    async with trio.open_nursery():
        yield state  # here


async def in_trio_scope(state: State) -> AsyncIterator[Any]:
    with trio.move_on_after(1):
        yield state  # here


async def in_users_manager(state: State) -> AsyncIterator[Any]:
    async with pool():
        yield state  # here


async def in_users_plain_manager(state: State) -> AsyncIterator[Any]:
    with limited():
        yield state  # here


SCOPES: list[Callable[..., Any]] = [
    in_task_group,
    in_scope,
    in_move_on_after,
    in_fail_after,
    in_asyncio_group,
    in_asyncio_timeout,
    in_nursery,
    in_trio_scope,
    in_users_manager,
    in_users_plain_manager,
]


@pytest.mark.parametrize("function", SCOPES)
def test_yield_inside_a_scope_is_refused_where_it_is_declared(function: Callable[..., Any]) -> None:
    with pytest.raises(MisuseError, match=f"{function.__name__} yields at .* inside .*hosted=True") as caught:
        action(reads=[], writes=[])(function)
    assert place(function) in str(caught.value)


def test_a_method_that_yields_inside_a_scope_is_refused_in_the_class_body() -> None:
    with pytest.raises(MisuseError, match=r"in_task_group yields at .* inside anyio.create_task_group\(\)"):
        type("Reducing", (TaskBasedParallelAction,), {"reduce": in_task_group})
    with pytest.raises(MisuseError, match="in_scope yields at"):
        type("Yielding", (MapStates,), {"states": in_scope})
    with pytest.raises(MisuseError, match="in_scope yields at"):
        type("Stepping", (SingleStepAction,), {"run_and_update": in_scope})
    # The reducer of a hosted one may; its sources may not.
    type("Hosted", (TaskBasedParallelAction,), {"reduce": in_task_group, "hosted": True})
    with pytest.raises(MisuseError, match="in_scope yields at"):
        type("Hosted", (MapStates,), {"states": in_scope, "hosted": True})


def test_only_an_async_generator_can_be_hosted() -> None:
    async def step(state: State) -> State:
        return state

    with pytest.raises(MisuseError, match=r"hosted=True\) on .*step at .*which is a coroutine"):
        action(reads=[], writes=[], hosted=True)(step)


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without a source, so that only its frame can tell."""
    copy = types.FunctionType(
        function.__code__.replace(co_firstlineno=1, co_filename="/nowhere.py"), function.__globals__, function.__name__
    )
    copy.__dict__.update(function.__dict__)
    return copy


# Which scopes can be opened where.
ON = {
    "asyncio": [one for one in SCOPES if "trio" not in one.__name__ and "nursery" not in one.__name__],
    "trio": [one for one in SCOPES if "asyncio" not in one.__name__],
}


async def test_yield_inside_a_scope_is_refused_when_it_runs(anyio_backend_name: str) -> None:
    for function in ON[anyio_backend_name]:
        step = action(reads=[], writes=[])(unseen(function))
        with pytest.raises(MisuseError, match=rf"{function.__name__} yielded at /nowhere.py:\d+ inside a") as caught:
            await app_of(step, n=1).arun()
        assert "hosted" in str(caught.value)
    async with anyio.create_task_group():  # nothing is broken: scopes still nest
        with anyio.move_on_after(1):
            await checkpoint()


async def test_the_refusal_is_raised_at_the_users_own_line() -> None:
    make = anyio.create_task_group  # a name that is not known before it runs

    @action(reads=[], writes=[])
    async def crawl(state: State) -> AsyncIterator[Any]:
        yield 0
        manager = make()
        async with manager:
            yield 1  # here

    with pytest.raises(MisuseError, match=r"crawl yielded at .* inside a TaskGroup") as caught:
        await app_of(crawl).arun()
    assert raised_at(caught.value) == place(test_the_refusal_is_raised_at_the_users_own_line)
    assert raised_at(caught.value) in str(caught.value)


async def test_a_scope_of_an_inner_generator_or_an_exit_stack_is_found() -> None:
    make = anyio.move_on_after

    async def inner() -> AsyncIterator[int]:
        scope = make(1)
        with scope:
            yield 1

    @action(reads=[], writes=[])
    async def outer(state: State) -> AsyncIterator[Any]:
        async for one in inner():
            yield one

    @action(reads=[], writes=[])
    async def stacked(state: State) -> AsyncIterator[Any]:
        async with contextlib.AsyncExitStack() as stack:
            yield 0
            await stack.enter_async_context(pool())
            yield 1

    for step, message in (
        (outer, r"inner yielded at .* inside a CancelScope,"),
        (stacked, "TaskGroup that pool holds"),
    ):
        with pytest.raises(MisuseError, match=message):
            await app_of(step).arun()


async def test_a_source_or_a_reducer_that_yields_inside_a_scope_is_refused_at_its_line() -> None:
    make = anyio.CancelScope

    @action(reads=[], writes=["y"])
    async def one(state: State) -> State:
        return state.update(y=1)

    class Each(MapStates):
        writes = ("y",)

        def action(self, state: State, inputs: Any) -> Any:
            return one

        async def states(self, state: State, context: Any, inputs: Any) -> AsyncIterator[State]:
            scope = make()
            with scope:
                yield state  # here

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(y=len([done async for done in states]))

    class Tasks(TaskBasedParallelAction):
        writes = ("y",)

        async def tasks(self, state: State, context: Any, inputs: Any) -> AsyncIterator[Any]:
            yield SubGraphTask(one, state)

        async def reduce(self, state: State, states: AsyncIterator[State]) -> AsyncIterator[State]:
            async for _ in states:
                scope = make()
                with scope:
                    yield state.update(y=1)  # here

    for parallel, method in ((Each(), Each.states), (Tasks(), Tasks.reduce)):
        with pytest.raises(MisuseError, match=r"yielded at .* inside a CancelScope") as caught:
            await app_of(parallel).arun()
        assert raised_at(caught.value) == place(method)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_what_only_looks_like_a_scope_is_let_through(tmp_path: Path) -> None:
    lock, threads = anyio.Lock(), threading.Lock()

    class Client:
        async def __aenter__(self) -> Client:
            async with anyio.create_task_group():
                pass
            return self

        async def __aexit__(self, *exc_info: object) -> None:
            return None

    @contextlib.asynccontextmanager
    async def connection() -> AsyncIterator[int]:
        with anyio.fail_after(1):
            await checkpoint()
        yield 1

    def create_task_group() -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    @action(reads=[], writes=["n"])
    async def step(state: State) -> AsyncIterator[Any]:
        with (tmp_path / "file").open("w") as file, contextlib.suppress(ValueError), threads:
            file.write("x")
            yield 1
        async with lock, Client(), connection(), contextlib.AsyncExitStack() as stack:
            stack.callback(print)
            await stack.enter_async_context(connection())
            yield 2
        with create_task_group():
            yield 3
        with anyio.fail_after(1):
            got = [one async for one in inner()]
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)

            async def below() -> AsyncIterator[int]:  # another function's yield
                yield 1

        yield state.update(n=len(got))

    async def inner() -> AsyncIterator[int]:
        yield 1

    assert (await app_of(step).arun()).state["n"] == 1


async def test_hosted_a_timeout_means_the_generator_and_not_its_consumer() -> None:
    @action(reads=[], writes=["n", "late"], hosted=True)
    async def step(state: State) -> AsyncIterator[Any]:
        with anyio.move_on_after(0.01) as scope:
            while True:
                yield "item"
        assert scope.cancelled_caught
        yield state.update(n=1, late=scope.cancelled_caught)

    stream = app_of(step).astream()
    seen = 0
    async with Runtime():
        async for _ in stream:
            seen += 1
            await anyio.sleep(0.001)
        assert stream.result.state["n"] == 1
    assert seen > 3


async def test_hosted_a_task_group_may_stay_open_across_yields() -> None:
    closed: list[str] = []

    @action(reads=[], writes=["n"], hosted=True)
    async def step(state: State) -> AsyncIterator[Any]:
        async with anyio.create_task_group() as group:
            send, receive = anyio.create_memory_object_stream[int](0)

            async def produce() -> None:
                try:
                    for i in range(3):
                        await send.send(i)
                    send.close()
                    await anyio.sleep_forever()
                finally:
                    closed.append("producer")

            group.start_soon(produce)
            got = []
            async for i in receive:
                got.append(i)
                yield i
            receive.close()
            group.cancel_scope.cancel()
        yield state.update(n=got)

    assert (await app_of(step).arun()).state["n"] == [0, 1, 2]
    assert closed == ["producer"]


async def test_hosted_a_failing_task_of_the_group_fails_the_generator() -> None:
    @action(reads=[], writes=[], hosted=True)
    async def step(state: State) -> AsyncIterator[Any]:
        async def fail() -> None:
            raise ValueError("child")

        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            while True:
                yield 1

    with pytest.raises(ExceptionGroup) as caught:
        await app_of(step).arun()
    assert caught.group_contains(ValueError, match="child")


async def test_hosted_a_generator_that_is_left_ends_its_scopes_in_its_own_task() -> None:
    ended: list[str] = []

    async def child() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("child")

    @action(reads=[], writes=["n"], hosted=True)
    async def step(state: State) -> AsyncIterator[Any]:
        async with anyio.create_task_group() as group:
            group.start_soon(child)
            await checkpoint()
            try:
                while True:
                    yield 1
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.001)
                ended.append("generator")

    with anyio.move_on_after(0.02) as scope:
        await app_of(step).arun()
    assert scope.cancelled_caught
    assert ended == ["generator", "child"]


async def test_hosted_reduce() -> None:
    @action(reads=["i"], writes=["y"])
    async def one(state: State) -> State:
        return state.update(y=state["i"])

    class Sum(MapStates):
        writes = ("y",)
        hosted = True

        def action(self, state: State, inputs: Any) -> Any:
            return one

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return (state.update(i=i) for i in range(5))

        async def reduce(self, state: State, states: AsyncIterator[State]) -> AsyncIterator[State]:
            total = 0
            async with anyio.create_task_group():
                with anyio.fail_after(5):
                    async for done in states:
                        total += done["y"]
                        yield state.update(y=total)

    assert (await app_of(Sum()).arun()).state["y"] == 10
