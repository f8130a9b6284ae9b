"""How the runtime drives generators and coroutines of its users."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from structlog.testing import capture_logs

from arun import hosting
from arun.hosting import as_async_iterator, drive, in_context

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
setting: ContextVar[str] = ContextVar("setting", default="unset")


class Recorder:
    def __init__(self) -> None:
        self.items: list[Any] = []

    def take(self, item: Any) -> None:
        self.items.append(item)


async def test_a_coroutine_runs_in_the_context_that_it_is_given() -> None:
    async def look() -> str:
        setting.set("inside")
        await checkpoint()
        return setting.get()

    context = copy_context()
    assert await in_context(context, look()) == "inside"
    assert context[setting] == "inside"
    assert setting.get() == "unset"


async def test_exceptions_thrown_in_during_suspension_arrive_and_may_be_handled() -> None:
    seen: list[str] = []

    async def stubborn() -> str:
        for _ in range(3):
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class() as exc:
                seen.append(type(exc).__name__)
        return "done"

    with anyio.CancelScope() as scope:
        scope.cancel()
        assert await in_context(copy_context(), stubborn()) == "done"
    assert len(seen) == 3


def test_closing_the_outside_closes_the_inside() -> None:
    seen: list[str] = []

    class Suspend:
        def __await__(self) -> Iterator[str]:
            yield "trap"

    async def inner() -> None:
        try:
            await Suspend()
        except GeneratorExit:
            seen.append("exit")
            raise
        finally:
            seen.append("finally")

    async def outer() -> None:
        await in_context(copy_context(), inner())

    coroutine = outer()
    assert coroutine.send(None) == "trap"
    coroutine.close()
    assert seen == ["exit", "finally"]


def test_values_and_errors_pass_both_ways() -> None:
    class Ask:
        def __await__(self) -> Iterator[str]:
            got = yield "question"
            return got

    async def inner() -> Any:
        try:
            await Ask()
        except KeyError:
            return await Ask()

    async def outer() -> Any:
        return await in_context(copy_context(), inner())

    coroutine = outer()
    coroutine.send(None)
    assert coroutine.throw(KeyError("thrown")) == "question"
    with pytest.raises(StopIteration) as stop:
        coroutine.send("answer")
    assert stop.value.value == "answer"


async def test_every_item_is_handed_over_and_the_generator_is_closed() -> None:
    async def numbers() -> AsyncIterator[int]:
        for i in range(200):
            yield i

    recorder = Recorder()
    await drive(numbers(), recorder.take)
    assert recorder.items == list(range(200))


async def test_a_generator_that_never_awaits_can_be_cancelled() -> None:
    closed = []

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    with anyio.move_on_after(0) as scope:
        await drive(endless(), lambda item: None)
    assert scope.cancelled_caught
    assert closed == [True]


async def test_other_tasks_run_while_a_generator_never_awaits() -> None:
    other = anyio.Event()

    async def endless() -> AsyncIterator[int]:
        while not other.is_set():
            yield 1

    async def set_it() -> None:
        other.set()

    async with anyio.create_task_group() as group:
        group.start_soon(set_it)
        await drive(endless(), lambda item: None)


async def test_an_error_of_the_receiver_closes_the_generator_with_its_clean_up_awaited() -> None:
    log: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await checkpoint()
            log.append("closed")

    def refuse(item: int) -> None:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        await drive(numbers(), refuse)
    assert log == ["closed"]


async def test_a_cancelled_receiver_closes_the_generator_with_its_clean_up_awaited() -> None:
    log: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await anyio.wait_all_tasks_blocked()
            log.append("closed")

    async def hang(item: int) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0):
        await drive(numbers(), hang)
    assert log == ["closed"]


async def test_a_clean_up_that_outlasts_its_grace_swallows_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "GRACE", 0.0)

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await anyio.sleep_forever()

    def refuse(item: int) -> None:
        raise ValueError("refused")

    with capture_logs() as logs, pytest.raises(ValueError, match="refused"):
        await drive(numbers(), refuse)
    assert [entry["event"] for entry in logs] == ["generator.cleanup_abandoned"]

    async def hang(item: int) -> None:
        await anyio.sleep_forever()

    with capture_logs(), anyio.move_on_after(0) as scope:
        await drive(numbers(), hang)
        raise AssertionError("the cancellation was swallowed")
    assert scope.cancelled_caught


async def test_what_a_generator_sets_stays_with_it_through_its_clean_up() -> None:
    seen: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        token = setting.set("generator")
        try:
            yield 1
            seen.append(setting.get())
            yield 2
        finally:
            setting.reset(token)

    await drive(numbers(), lambda item: seen.append(setting.get()))
    assert seen == ["unset", "generator", "unset"]


@pytest.mark.parametrize("text", ["text", b"bytes", 3, None])
async def test_what_has_no_items_is_no_source(text: Any) -> None:
    assert await as_async_iterator(text) is None


async def test_closing_a_wrapped_generator_closes_it() -> None:
    closed = []

    def numbers() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    iterator: Any = await as_async_iterator(numbers())
    assert await anext(iterator) == 1
    await hosting.close(iterator)
    assert closed == [True]
    await hosting.close([1])  # nothing to close
