"""Actor classes that the tests start; in a module of their own, so that other processes can import them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import anyio
import msgspec

from actors.actor import actor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Point(msgspec.Struct):
    x: int
    y: int = 0


class Unheard(Exception):
    """An error that the channel does not know."""


class Counter:
    """The actor of the design page, with a few ways to look inside."""

    def __init__(self, start: int = 0) -> None:
        self._value = start
        self._changed = asyncio.Event()
        self._running = 0
        self._most_running = 0
        self.log: list[str] = []

    async def incr(self, by: int = 1) -> int:
        self._value += by
        self._changed.set()
        self._changed = asyncio.Event()
        return self._value

    async def watch(self) -> AsyncIterator[int]:
        """The value now and after each change that is seen; a step returns at once, so it never holds the actor."""
        try:
            while True:
                yield self._value
        finally:
            await asyncio.sleep(0)
            self.log.append("watch closed")

    async def count_to(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    async def busy(self, ticks: int) -> int:
        """Give way to other tasks a few times; tells how many messages ran at once so far."""
        self._running += 1
        self._most_running = max(self._most_running, self._running)
        for _ in range(ticks):
            await asyncio.sleep(0)
        self._running -= 1
        return self._most_running

    async def note(self, text: str) -> None:
        await asyncio.sleep(0)
        self.log.append(text)

    async def notes(self) -> list[str]:
        return self.log

    async def fail_slowly(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i
        raise ValueError("the stream broke")

    async def raise_value_error(self) -> None:
        raise ValueError("no such luck")

    async def raise_unheard(self) -> None:
        raise Unheard("what is this?")

    async def mirror(self, point: Point) -> Point:
        assert isinstance(point, Point)
        return Point(point.y, point.x)

    async def total(self, *points: Point, **named: Annotated[int, msgspec.Meta(ge=0)]) -> int:
        return sum(point.x + point.y for point in points) + sum(named.values())

    async def pid(self) -> int:
        return os.getpid()

    async def environ(self, name: str) -> str | None:
        return os.environ.get(name)

    async def print_noise(self) -> None:
        print("noise on stdout", flush=True)


@actor(concurrency=3)
class Wide(Counter):
    """Takes three messages at a time."""

    async def await_cancelled(self) -> None:
        task = asyncio.create_task(asyncio.sleep(3600))
        task.cancel()
        await task

    async def leave(self) -> NoReturn:
        """End the process, as an interpreter ends."""
        raise SystemExit(4)

    async def hang(self) -> None:
        """Wait until cancelled, and write that down."""
        self.log.append("hanging")
        try:
            await asyncio.Event().wait()
        finally:
            self.log.append("hang cancelled")


class Diary:
    """Writes its life into a file, so that it can be read after its death."""

    def __init__(self, path: str, title: str = "diary") -> None:
        self._path = Path(path)
        self._title = title

    async def on_start(self) -> None:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()  # on_stop leaves it: both run in one task
        self._write("started")

    async def on_stop(self) -> None:
        await self._tasks.__aexit__(None, None, None)
        await asyncio.sleep(0.01)
        self._write("stopped")

    async def ping(self) -> str:
        return "pong"

    def _write(self, what: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{self._title} {what}\n")


class Stubborn:
    """Does not stop when asked to."""

    async def on_stop(self) -> None:
        await asyncio.sleep(3600)

    async def ping(self) -> str:
        return "pong"


class FailsToStart:
    def __init__(self, where: str) -> None:
        self._where = where
        if where == "init":
            raise ValueError("refused in __init__")

    async def on_start(self) -> None:
        if self._where == "exit":
            os._exit(3)
        raise Unheard("refused in on_start")

    async def ping(self) -> None: ...


class HangsAtStart:
    def __init__(self, path: str) -> None:
        self._path = Path(path)

    async def on_start(self) -> None:
        self._path.write_text(str(os.getpid()))
        await asyncio.Event().wait()

    async def ping(self) -> None: ...


class Deaf(Counter):
    async def deafen(self) -> None:
        """Close the sockets that this process listens on."""
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    os.close(int(name))


class Parent:
    """Starts a process of its own and does not care for it."""

    async def start_child(self) -> int:
        child = await asyncio.create_subprocess_exec("sleep", "3600")
        return child.pid


class Sees:
    async def devices(self) -> str | None:
        """What CUDA is told to see."""
        return os.environ.get("CUDA_VISIBLE_DEVICES")
