"""What the tests of the core share: a Runtime on both event loops, and the check that nothing is left over."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from types import AsyncGeneratorType
from typing import Any

import anyio
import pytest

from arun import Runtime


@pytest.fixture
async def runtime(anyio_backend: str) -> AsyncIterator[Runtime]:
    """An open Runtime, which streams and fan_out() need on trio."""
    async with Runtime() as opened:
        yield opened


@pytest.fixture
async def nothing_left(anyio_backend: str) -> AsyncIterator[None]:
    """No task is left that the test has started, nor an async generator that is suspended."""
    before, known = set(_running()), set(map(id, _suspended()))
    yield
    assert not [name for task, name in _running().items() if task not in before]
    assert not [agen for agen in _suspended() if id(agen) not in known]


def _running() -> dict[int, str]:
    """The names of all tasks by id, less those in which anyio's plugin waits for its test runner."""
    waiting: set[int] = set()
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "") == "_call_in_runner_task":
                waiting.add(id(task))
    return {info.id: info.name for info in anyio.get_running_tasks() if info.id not in waiting}


def _suspended() -> list[AsyncGeneratorType[Any, Any]]:
    gc.collect()
    generators = [thing for thing in gc.get_objects() if type(thing) is AsyncGeneratorType]
    return [agen for agen in generators if agen.ag_frame is not None and agen.ag_code.co_filename != __file__]


@pytest.fixture
def asyncio_only(anyio_backend: str) -> None:
    """For what only asyncio has: cancellation of a task without a scope."""
    if anyio_backend != "asyncio":
        pytest.skip("asyncio's own cancellation")
