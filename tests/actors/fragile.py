"""Actor classes that die, hang and start slowly, for the tests of supervision and health."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.actor import actor, method

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@actor(concurrency=4, mailbox=1)
class Fragile:
    """Counts its starts in a folder that outlives it.

    :param folder: has a file "starts" with a line for each start. A start waits while there is a file "hold", and fails
        while there is a file "refuse".
    """

    def __init__(self, folder: str, title: str = "fragile") -> None:
        self._folder = Path(folder)
        self._title = title
        self._value = 0

    async def on_start(self) -> None:
        if self._has("refuse"):
            raise ValueError("not today")
        while self._has("hold"):  # noqa: ASYNC110 - a file is what the test can reach it by
            await asyncio.sleep(0.005)
        self._write("starts", self._title)

    async def on_stop(self) -> None:
        self._write("stops", self._title)

    async def incr(self) -> int:
        self._value += 1
        return self._value

    async def pid(self) -> int:
        return os.getpid()

    async def exit(self, code: int) -> None:
        os._exit(code)

    async def hang(self) -> None:
        self._write("hanging", "")
        try:
            await asyncio.Event().wait()
        finally:
            self._write("cancelled", "")

    @method(idempotent=True)
    async def hang_once(self) -> int:
        """Hang in the first generation, tell the pid in the next."""
        if self._has("hung"):
            return os.getpid()
        self._write("hung", "")
        await asyncio.Event().wait()
        raise AssertionError

    @method(idempotent=True)
    async def count_once(self, *, first: int) -> AsyncIterator[int]:
        """Give so many items, then hang; in the next generation end instead."""
        for i in range(first):
            yield i
        if self._has("hung"):
            yield 100
            return
        self._write("hung", "")
        await asyncio.Event().wait()

    @method(timeout=0.05)
    async def hang_with_limit(self) -> None:
        await self.hang()

    @method(timeout=0.05)
    async def stream_with_limit(self) -> AsyncIterator[int]:
        yield 1
        await self.hang()

    async def count(self, to: int) -> AsyncIterator[int]:
        for i in range(to):
            yield i

    async def block(self) -> str:
        """Stall the event loop until there is a file "go"."""
        self._write("blocking", "")
        while not (self._folder / "go").exists():  # in this frame, so that any look at it finds it here
            time.sleep(0.005)  # noqa: ASYNC251 - to stall the loop is the point
        return "went on"

    def _has(self, name: str) -> bool:
        return (self._folder / name).exists()

    def _write(self, name: str, line: str) -> None:
        with (self._folder / name).open("a") as file:
            file.write(f"{line}\n")


@actor(concurrency=4, hung_after=0.3)
class Impatient(Fragile):
    """Counts as hung soon."""


@actor(mailbox=1)
class Narrow(Fragile):
    """One message at a time, and one that waits."""


class Caller:
    """Calls another actor, or itself."""

    def __init__(self, others: list[Any]) -> None:
        self._others = others  # in this process, so that the test can fill it later

    @property
    def _other(self) -> Any:
        return self._others[0]

    async def ask(self, depth: int) -> int:
        return 0 if depth == 0 else 1 + await self._other.ask(depth - 1)

    async def each(self, depth: int) -> AsyncIterator[int]:
        yield await self._other.ask(depth)

    async def later(self) -> str:
        """Ask in the background, after this message."""
        self._task = asyncio.create_task(self._ask_later())
        return "asked"

    async def _ask_later(self) -> int:
        return 1 + await self._other.ask(1)

    async def result(self) -> int:
        return self._task.result() if self._task.done() else -1
