"""Ends the servers of a Ray that this process has started when it is gone, however it went.

Ray's agents outlive a killed driver by a minute (Ray 2.60), in which they try to tell a server about it that is dead,
too. A worker that is just starting looks for a raylet that is dead for half a minute. So a tiny process holds on to the
servers, waits until the pipe from its owner closes, which the kernel does for every kind of death, and kills those that
are left, and then the workers that have not begun to work; those that have end with their raylet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ("ServersGuard",)

_QUIET_LOOKS = 5
_QUIET_SECONDS = 0.02


class ServersGuard:
    """Ends them on :meth:`close` or with this process; Linux only.

    :param node: Ray's own record of the node that it has started.
    """

    def __init__(self, node: Any) -> None:
        self._process = subprocess.Popen(
            # -I -S: no site, no user code, nothing to import but the standard library.
            [sys.executable, "-I", "-S", __file__, node.raylet_socket_name, *map(str, _servers(node))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={},
            start_new_session=True,  # a signal to the owner's process group must not reach it
        )

    def close(self) -> None:
        """Kill those that are left and return when that is done; to be called behind Ray's own shutdown."""
        assert self._process.stdin is not None  # it is a pipe
        self._process.stdin.close()
        self._process.wait()


def _servers(node: Any) -> Iterator[int]:
    """The processes that the driver has started, and those that they have, such as the raylet's agents."""
    for processes in node.all_processes.values():
        for info in processes:
            yield info.process.pid
            with contextlib.suppress(OSError):
                for children in Path(f"/proc/{info.process.pid}/task").glob("*/children"):
                    yield from map(int, children.read_text().split())


def _guard(raylet: str, pids: list[int]) -> None:
    servers: list[int] = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            servers.append(os.pidfd_open(pid))  # the id may be somebody else's by the end
    os.read(0, 1)
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(server, signal.SIGKILL)
    quiet = 0
    while quiet < _QUIET_LOOKS:  # one may have been forked just now, and is no worker yet
        workers = _starting_workers(raylet)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        quiet = 0 if workers else quiet + 1
        time.sleep(_QUIET_SECONDS)  # the kernel tells nobody of the processes of others


def _starting_workers(raylet: str) -> list[int]:
    """The workers of a raylet that still have the arguments that it gave them: later Ray writes their task there."""
    argument = f"--raylet-name={raylet}".encode()
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and argument in _arguments(name)]


def _arguments(pid: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return []


if __name__ == "__main__":
    _guard(sys.argv[1], [int(pid) for pid in sys.argv[2:]])
