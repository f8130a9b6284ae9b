"""HostProcess: an actor in a process of its own on this machine, as the owner sees it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING

import anyio

from actors.hosts.host_main import HEALTH_SUFFIX, HostOrder
from actors.members.body import End
from actors.on_ray import pickling
from arun.channel import connect_unix
from arun.errors import ChannelLost
from arun.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actors.interface import ActorSpec
    from arun.channel import Connection

__all__ = ("HostProcess",)

_KILL_MARGIN = 1.0
"""Seconds by which a host's own deadline comes after its owner's, so that a living owner sees what it did."""

_FOLDER_PATH_BYTES = 107 - len("/actor") - len(HEALTH_SUFFIX)
"""What the kernel takes for a socket's path leaves to its folder."""


class HostProcess:
    """A process that runs :func:`actors.hosts.host_main.main`, started at once.

    It leads a session of its own, so Ctrl-C does not reach it, and everything it started in that session is killed when
    it ends. Its stdout goes to this process's stderr: stdout belongs to the program.

    :param env: environment variables on top of this process's own.
    :param grace: seconds from the owner's death to the actor's.
    :raises MisuseError: class or arguments can't be sent.
    """

    def __init__(self, spec: ActorSpec, *, env: Mapping[str, str], grace: float) -> None:
        blob = pickling.dumps(spec)
        child_env = {**os.environ, **env}
        self._name = spec.name
        self._token = secrets.token_bytes(32)
        with contextlib.ExitStack() as undo:  # where there are no file descriptors left, for example
            self._folder = _make_folder()
            undo.callback(self._folder.rmdir)  # it is empty, and rmtree() needs file descriptors
            self._path = self._folder / "actor"
            self._status, status_fd = os.pipe()
            undo.callback(os.close, self._status)
            try:
                order = HostOrder(
                    blob=blob,
                    token=self._token,
                    path=str(self._path),
                    status_fd=status_fd,
                    owner_pid=os.getpid(),
                    grace=grace + _KILL_MARGIN,
                    sys_path=[str(entry) for entry in sys.path],
                    pythonpath=child_env.get("PYTHONPATH"),
                )
                self._order = memoryview(order.write())
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", "from actors.hosts.host_main import main; main()", str(self._folder)],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=2,
                    env=child_env | {"PYTHONPATH": _with_our_packages(child_env.get("PYTHONPATH"))},
                    pass_fds=(status_fd,),
                    start_new_session=True,
                )
            finally:
                os.close(status_fd)
            undo.push(self._process)
            undo.callback(self._process.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            undo.pop_all()
        assert self._process.stdin is not None  # it is a pipe, see Popen
        self._stdin = self._process.stdin
        # Of the actor's socket and the one for its health, once it listens.
        self._doors: list[int] = []
        # If nobody stops it, the process is left to itself at the end of this program: it runs on_stop and exits.
        self._last_resort = weakref.finalize(self, _let_go, self._stdin, self._folder, self._pidfd, self._doors)
        self._end = Runtime.current().start(self._watch_end, name=f"process of actor {spec.name}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def address(self) -> str:
        return f"unix:{self._path}"

    async def connect(self) -> Connection:
        await self._send_order()
        await self._listening()
        # From here on the sockets need no names, so none are left if this process and the actor's are killed at once.
        try:
            for suffix in ("", HEALTH_SUFFIX):
                self._doors.append(os.open(f"{self._path}{suffix}", os.O_PATH))
        except OSError as exc:
            raise ChannelLost(f"the socket of actor {self._name!r} can't be opened: {exc}") from exc
        shutil.rmtree(self._folder, ignore_errors=True)
        return await self.reconnect()

    async def reconnect(self) -> Connection:
        return await self._connect(0)

    async def connect_health(self) -> Connection:
        return await self._connect(1)

    async def wait_ended(self) -> End:
        return await self._end.wait()

    def kill(self) -> None:
        if not self._end.done:
            self._kill_group()

    async def stop(self, grace: float) -> None:
        self._stdin.close()
        with anyio.move_on_after(grace):
            await self._end.wait()
        if not self._end.done:
            self._kill_group()
            await self._end.wait()

    async def _connect(self, door: int) -> Connection:
        if not self._doors:
            raise ChannelLost(f"the process of actor {self._name!r} has ended")
        return await connect_unix(f"/proc/self/fd/{self._doors[door]}", token=self._token)

    async def _send_order(self) -> None:
        stdin = self._stdin
        os.set_blocking(stdin.fileno(), False)
        # A process that is gone already is told from one that listens by its status.
        with contextlib.suppress(BrokenPipeError):
            while self._order:
                await anyio.wait_writable(stdin.fileno())
                self._order = self._order[os.write(stdin.fileno(), self._order) :]

    async def _listening(self) -> None:
        try:
            await anyio.wait_readable(self._status)
            if not os.read(self._status, 64):
                raise ChannelLost(f"the process of actor {self._name!r} ended before it listened; see its stderr")
        finally:
            os.close(self._status)

    async def _watch_end(self) -> End:
        await anyio.wait_readable(self._pidfd)
        # The zombie keeps the id from being given away, so this hits only what the actor left behind.
        self._kill_group()
        self._last_resort()
        returncode = self._process.wait()
        return End(_phrase(returncode), abnormal=returncode != 0)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _let_go(stdin: IO[bytes], folder: Path, pidfd: int, doors: list[int]) -> None:
    stdin.close()
    os.close(pidfd)
    while doors:
        os.close(doors.pop())
    shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> Path:
    """A folder that only this user can enter, with a path that leaves room for a socket's."""
    path = Path(tempfile.mkdtemp(prefix="arun-"))
    if len(os.fsencode(path)) <= _FOLDER_PATH_BYTES:
        return path
    path.rmdir()
    return Path(tempfile.mkdtemp(prefix="arun-", dir="/tmp"))


def _with_our_packages(pythonpath: str | None) -> str:
    """PYTHONPATH by which the host finds arun and actors, wherever this process has them from."""
    ours = str(Path(__file__).parents[2])
    return ours if not pythonpath else f"{ours}{os.pathsep}{pythonpath}"


def _phrase(returncode: int) -> str:
    """How a process ended, continuing "the actor"."""
    if returncode >= 0:
        return f"exited by itself with code {returncode}; see its stderr"
    name = signal.Signals(-returncode).name
    hint = "; if you did not send it, the kernel's out-of-memory killer did" if name == "SIGKILL" else ""
    return f"was killed by signal {-returncode} ({name}){hint}"
