"""The process of one actor: what LocalCluster starts, with the folder for its sockets as the argument.

It reads a :class:`HostOrder` from stdin, listens on a Unix socket and writes one line to the status pipe when it does.
From then on stdin says one thing only: at its end the actor is to stop, because its owner let go of it or died. A
second socket answers from a thread of its own how the actor fares.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from actors.hosts.guards import continue_without_parent
from actors.hosts.health import Health, HealthThread
from actors.hosts.host import Host
from actors.on_ray import pickling
from arun.channel import serve_unix
from arun.logs import get_logger
from arun.telemetry import configure_logging_as_parent

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("HEALTH_SUFFIX", "HostOrder", "main")

HEALTH_SUFFIX = ".health"
"""What the path of the health socket has on top of the actor's."""

log = get_logger("actors.host")


class HostOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a host process is told on stdin, once.

    :ivar blob: the pickled :class:`~actors.interface.ActorSpec`.
    :ivar token: what callers must know.
    :ivar path: of the Unix socket to listen on, in a folder of its own.
    :ivar status_fd: where to write one line when it listens.
    :ivar grace: seconds from the end of stdin to being killed.
    :ivar sys_path: the owner's, so that the actor finds the modules that the owner finds.
    :ivar pythonpath: PYTHONPATH as the actor's own child processes shall see it.
    """

    blob: bytes
    token: bytes
    path: str
    status_fd: int
    owner_pid: int
    grace: float
    sys_path: list[str]
    pythonpath: str | None

    def __repr__(self) -> str:
        return f"<HostOrder for {self.path}>"  # tracebacks may show local variables, and the token is a secret

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("path", self.path)]  # rich, and so structlog's tracebacks, would take all fields of a Struct instead

    def write(self) -> bytes:
        """The order as it goes into the pipe: its length in 8 bytes, then msgpack."""
        body = msgspec.msgpack.encode(self)
        return len(body).to_bytes(8, "big") + body

    @classmethod
    def read(cls, fd: int) -> HostOrder:
        """Read one order.

        :raises EOFError: the writer went away first.
        """
        length = int.from_bytes(_read_exactly(fd, 8), "big")
        return msgspec.msgpack.decode(_read_exactly(fd, length), type=cls)


def main() -> None:
    """Live as the process of one actor."""
    configure_logging_as_parent()
    try:
        order = HostOrder.read(sys.stdin.fileno())
    except EOFError:  # the owner died, or gave up, before it said what to do
        shutil.rmtree(sys.argv[1], ignore_errors=True)
        sys.exit(1)
    leash = _take_over_stdin()
    continue_without_parent()
    os.set_inheritable(order.status_fd, False)
    sys.path[:] = [*order.sys_path, *(entry for entry in sys.path if entry not in order.sys_path)]
    _set_or_unset("PYTHONPATH", order.pythonpath)
    try:
        asyncio.run(_serve(order, leash))
    finally:
        _kill_what_the_actor_started()
        _remove_folder(order.path)


async def _serve(order: HostOrder, leash: int) -> None:
    host = Host(lambda: pickling.loads(order.blob))
    loop = asyncio.get_running_loop()
    threading.Thread(
        target=_watch_owner,
        args=(leash, order, lambda: loop.call_soon_threadsafe(host.stop)),
        name="actors.host.leash",
        daemon=True,
    ).start()
    health = HealthThread(
        lambda handler: serve_unix(handler, path=order.path + HEALTH_SUFFIX, token=order.token), Health(host.load)
    )
    server = await serve_unix(host.handle, path=order.path, token=order.token)
    health.wait_listening()
    try:
        os.write(order.status_fd, b"listening\n")
    except BrokenPipeError:  # the owner has given up meanwhile
        sys.exit(1)
    os.close(order.status_fd)
    host.begin(server.aclose)
    try:
        await host.wait_ended()
    except Exception:
        log.exception("actor.stop_failed")
        sys.exit(1)


def _watch_owner(leash: int, order: HostOrder, stop: Callable[[], object]) -> None:
    """Wait for the end of stdin or of the owner, ask for a stop, and kill after the grace.

    In a thread, because a busy actor blocks its event loop. The owner is watched as well as stdin, because children
    that it forked hold copies of stdin's other end.
    """
    poll = select.poll()
    poll.register(leash, select.POLLIN | select.POLLHUP)
    try:
        poll.register(os.pidfd_open(order.owner_pid), select.POLLIN)
        gone = os.getppid() != order.owner_pid  # it died before that, and the id may be somebody else's by now
    except ProcessLookupError:
        gone = True
    if not gone:
        poll.poll()
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending already
        stop()
    time.sleep(order.grace)
    _remove_folder(order.path)
    _kill_process_group()


def _take_over_stdin() -> int:
    """Keep stdin's pipe for ourselves and leave /dev/null to the actor's code."""
    leash = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return leash


def _kill_what_the_actor_started() -> None:
    """End the others of this process's group. The owner does so too when it sees this end, if it lives."""
    group = os.getpgid(0)
    if group != os.getpid():  # started by hand: the group is somebody's shell
        return
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != group:
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry)) == group:
                    os.kill(int(entry), signal.SIGKILL)


def _kill_process_group() -> None:
    """End this process and everything it started. A host leads a session of its own, unless it was started by hand."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _remove_folder(path: str) -> None:
    """Remove the folder of the sockets. The owner does so too, but it may have been killed."""
    shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def _read_exactly(fd: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(fd, min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _set_or_unset(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
