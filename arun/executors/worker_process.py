"""A worker process of a ProcessExecutor, as its parent sees it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import anyio

from arun.channel import Connection, Stream
from arun.channel.halves import Allowed
from arun.channel.sockets import socket_wire
from arun.errors import ChannelLost, WorkerDied
from arun.executors.messages import LIMITS, PREPARE, RUN, WINDOW, Answer, Order, Preparation
from arun.executors.references import main_source
from arun.logs import get_logger
from arun.runtime import Runtime

__all__ = ("WorkerProcess",)

log = get_logger("arun.executors")

#: Seconds by which a worker's own deadline, after its parent's death, comes after the one that the parent keeps.
_MARGIN: Final = 1.0


class WorkerProcess:
    """One worker process. It leads a session of its own, so that Ctrl-C does not reach it, and all that it starts in
    that session is killed when it ends. It ends when its socket does.

    :ivar pid: of the process.
    """

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int, connection: Connection) -> None:
        self.pid = process.pid
        self._process = process
        self._pidfd = pidfd
        self._connection = connection

    @classmethod
    async def start(cls, grace: float) -> WorkerProcess:
        """Start a process; returns when it is ready for its first subtask.

        :raises WorkerDied: it ended before that.
        """
        runtime = Runtime.current()  # refused here, before there is a process
        ours, theirs = socket.socketpair()
        try:
            wire = await socket_wire(ours)
            process = _spawn(theirs, grace)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        connection = Connection(
            wire,
            runtime=runtime,
            peer=f"worker process {process.pid}",
            handler=None,
            limits=LIMITS,
            allowed=Allowed(LIMITS.streams, LIMITS.message_bytes),
        )
        worker = cls(process, os.pidfd_open(process.pid), connection)
        try:
            await worker._prepare()
        except ChannelLost as exc:
            raise await worker.death("while it started; see its stderr", grace) from exc
        except BaseException:
            worker.kill()
            with anyio.CancelScope(shield=True):
                await worker.wait_ended(None)
            raise
        log.debug("worker.started", pid=worker.pid)
        return worker

    @property
    def usable(self) -> bool:
        """Whether the process lives and its connection is open."""
        return self._process.returncode is None and not self._connection.closed and not _readable(self._pidfd)

    def open(self, order: Order) -> Stream[Any]:
        """Start a subtask."""
        return self._connection.open(RUN, order, item_type=Answer, window=WINDOW)

    async def death(self, when: str, grace: float) -> WorkerDied:
        """The error for a process whose connection was lost; it is ended, if it lives yet.

        :param when: what it was doing.
        """
        if not await self.wait_ended(grace):
            self.kill()
            await self.wait_ended(None)
        code = self._process.returncode
        how, number = f"exited by itself with code {code}", None
        if code < 0:
            number = -code
            how = f"was killed by signal {number} ({signal.Signals(number).name})"
            if number == signal.SIGKILL:
                how += "; if you did not send it, the kernel's out-of-memory killer did"
        return WorkerDied(f"worker process {self.pid} {how}, {when}", pid=self.pid, signal=number)

    async def settle(self, stream: Stream[Any], deadline: float) -> None:
        """End a subtask: cancel it and wait for its clean-up, or, after the deadline, kill the process."""
        with anyio.CancelScope(deadline=deadline):
            await stream.aclose()
            if self._connection.closed:  # it has taken the process with it
                await self.wait_ended(None)
            return
        self.kill()
        await self.wait_ended(None)

    async def wait_ended(self, seconds: float | None) -> bool:
        """Wait for the process's end, at most so many seconds; then nothing of it is left. Tells whether it ended."""
        if self._process.returncode is None:
            pidfd = os.dup(self._pidfd)  # a file descriptor has one waiter
            try:
                with anyio.move_on_after(seconds):
                    await anyio.wait_readable(pidfd)
                if not _readable(pidfd):
                    return False
            finally:
                os.close(pidfd)
            self._reap()
        return True

    def kill(self) -> None:
        """Kill the process and all that it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, grace: float) -> None:
        """Let it clean up and exit, or, after the grace, kill it."""
        self._connection.close_soon()
        if not await self.wait_ended(grace):
            log.warning("worker.killed", pid=self.pid, grace=grace)
            self.kill()
            await self.wait_ended(None)

    async def _prepare(self) -> None:
        main, is_module = main_source()
        sys_path = [str(entry) or os.getcwd() for entry in sys.path]
        preparation = Preparation(sys_path, os.environ.get("PYTHONPATH"), main, is_module)
        await self._connection.call(PREPARE, preparation, result_type=int)

    def _reap(self) -> None:
        if self._process.returncode is None:
            # The zombie keeps the id from being given away, so this hits only what the worker left behind.
            self.kill()
            self._process.wait()
            os.close(self._pidfd)


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _spawn(end: socket.socket, grace: float) -> subprocess.Popen[bytes]:
    backend = "asyncio" if hasattr(anyio.lowlevel.current_token().native_token, "call_soon_threadsafe") else "trio"
    ours = str(Path(__file__).parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "arun.executors.worker",
            str(end.fileno()),
            str(os.getpid()),
            str(grace + _MARGIN),
            backend,
        ],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": f"{ours}{os.pathsep}{inherited}" if inherited else ours},
        pass_fds=(end.fileno(),),
        start_new_session=True,
    )
