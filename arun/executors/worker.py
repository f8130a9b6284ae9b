"""The worker's side of a ProcessExecutor: ``python -m arun.executors.worker SOCKET OWNER GRACE BACKEND``.

The process serves a channel on a socket that it inherits. One stream is one subtask: the Order comes in, events go out
as they happen and as fast as the parent takes them, and the last item says how it ended. A cancelled stream cancels the
subtask and waits for its clean-up; only a plain function can't be cancelled, and takes the process with it.

The process ends when the socket does, so also with its parent; a thread sees to that should the event loop be busy.
"""

from __future__ import annotations

import importlib
import io
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import anyio
import msgspec

from arun.channel.connection import Connection
from arun.channel.halves import Allowed
from arun.channel.sockets import socket_wire
from arun.errors import MisuseError
from arun.executors.execution import Execution, kill_everything
from arun.executors.messages import LIMITS, PREPARE, Order, Preparation
from arun.executors.references import MAIN, dig
from arun.runtime import Runtime

__all__ = ("main",)


class _Worker:
    """What a worker process knows: the program's modules, and how to run an Order."""

    def __init__(self) -> None:
        self._main: tuple[str | None, bool] = (None, False)

    def handle(self, method: str, payload: msgspec.Raw) -> AsyncIterator[object]:
        if method == PREPARE:
            return self._prepare(msgspec.msgpack.decode(payload, type=Preparation))
        return Execution(msgspec.msgpack.decode(payload, type=Order), self.find)

    def find(self, module: str, qualname: str) -> Any:
        return dig(self._module(module), qualname)

    def _module(self, name: str) -> ModuleType:
        """A module of the program; its main module goes by another name here, so that its guard holds."""
        if name != MAIN or MAIN in sys.modules:
            return importlib.import_module(name)
        source, is_module = self._main
        if source is None:
            raise MisuseError("the program has no main module that a worker process could import")
        found = ModuleType(MAIN)  # as multiprocessing's spawn does it
        try:
            found.__dict__.update(
                runpy.run_module(source, run_name=MAIN) if is_module else runpy.run_path(source, run_name=MAIN)
            )
        except (Exception, SystemExit) as exc:
            raise MisuseError(
                f"a worker process imports the program's main module, {source}, to find an action there; that raised "
                f'{exc!r}. Put what the program does at its start below `if __name__ == "__main__":`'
            ) from exc
        sys.modules[MAIN] = sys.modules["__main__"] = found
        return found

    async def _prepare(self, preparation: Preparation) -> AsyncIterator[int]:
        sys.path[:] = preparation.sys_path
        if preparation.pythonpath is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = preparation.pythonpath
        self._main = (preparation.main, preparation.main_is_module)
        yield os.getpid()


async def _serve(fd: int, owner: int) -> None:
    async with Runtime() as runtime:
        connection = Connection(
            await socket_wire(socket.socket(fileno=fd)),
            runtime=runtime,
            peer=f"process {owner}",
            handler=_Worker().handle,
            limits=LIMITS,
            allowed=Allowed(LIMITS.streams, LIMITS.message_bytes),
        )
        await connection.wait_closed()


def _watch_owner(owner: int, grace: float) -> None:
    """End this process when its owner has ended, also while the event loop is busy or a fork holds the socket."""
    try:
        pidfd = os.pidfd_open(owner)
    except ProcessLookupError:
        pidfd = -1
    if pidfd >= 0 and os.getppid() == owner:
        select.select([pidfd], [], [])
    time.sleep(grace)
    kill_everything()


def main() -> None:
    """Live as a worker process."""
    fd, owner, grace, backend = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    os.set_inheritable(fd, False)
    # A handler, unlike SIG_IGN, is not inherited by the programs that subtasks start.
    signal.signal(signal.SIGINT, lambda *_: None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                line_buffering=True, write_through=False
            )  # whole lines, so that those of several processes don't mix
    threading.Thread(target=_watch_owner, args=(owner, grace), name="arun owner watch", daemon=True).start()
    anyio.run(_serve, fd, owner, backend=backend)


if __name__ == "__main__":
    main()
