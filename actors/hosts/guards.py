"""Tiny processes that end what their owner leaves behind when it is gone, however it went.

A guard waits until the pipe from its owner closes, which the kernel does for every kind of death, and then kills what
is left. It is this very file, run by its path: it imports the standard library only, and has started in milliseconds.

**Of engines.** vLLM's EngineCore outlives an owner that is killed: it keeps its memory, its GPU and the caller's
stdout. vLLM loads plug-ins in every process, but only after some 20 seconds of imports, so a watcher in there would
miss an owner that dies during the start. So the owner starts its guard first, as nobody's child: Ray's workers kill
their children when they exit, and would kill the guard before its work. It kills whatever carries the owner's mark, and
removes what that leaves behind: its sockets and temporary files (which vLLM forgets even when it ends in good order)
and its shared memory (multiprocessing's resource tracker would unlink some of it, but often is killed as well). The
mark is an environment variable. Every process that the owner starts inherits it, whoever its parent is by then, and
``/proc/PID/environ`` shows it.

**Of a Ray.** Ray's agents outlive a killed driver by a minute (Ray 2.60), in which they try to tell a server about it
that is dead, too. A worker that is just starting looks for a raylet that is dead for half a minute. So a guard holds on
to the servers, and kills those that are left, and then the workers that have not begun to work; those that have end
with their raylet.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ("EngineGuard", "RayGuard", "continue_without_parent")

_ENGINE = "engine"
_RAY = "ray"
_MARK = "ARUN_ENGINE_MARK"
_SETTLED = b"."
_LOOK_SECONDS = 0.5
_QUIET_LOOKS = 5
_QUIET_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SHARED = ("psm_", "sem.mp-", "vllm")  # of multiprocessing and of vLLM


class EngineGuard:
    """Marks the processes that this process starts from now on, and ends them on :meth:`close` or with this process.

    Linux only (it reads ``/proc``). One per process at a time: the mark is in ``os.environ``.

    :ivar folder: for the sockets and temporary files of these processes; removed with them.
    """

    def __init__(self) -> None:
        mark = uuid.uuid4().hex
        self.folder = tempfile.mkdtemp(prefix="arun-engine-")
        guard = _start(_ENGINE, str(os.getpid()), mark, self.folder)
        guard.wait()  # it goes on as a child of its own
        assert guard.stdin is not None  # both are pipes
        assert guard.stdout is not None
        self._leash, self._guarding = guard.stdin, guard.stdout
        os.environ[_MARK] = mark  # the guard itself is not marked
        os.environ["SPT_NOENV"] = "1"  # setproctitle, which vLLM uses, would overwrite /proc/PID/environ

    def settled(self) -> None:
        """All processes have started and have the shared memory that they will have; the guard may look less often."""
        self._leash.write(_SETTLED)

    def close(self) -> None:
        """Kill every marked process and return when they are gone. Idempotent; blocks for a tenth of a second."""
        os.environ.pop(_MARK, None)
        self._leash.close()
        if not self._guarding.closed:
            self._guarding.read()  # until its end, it writes nothing
            self._guarding.close()


class RayGuard:
    """Ends the servers of a Ray that this process has started, on :meth:`close` or with this process; Linux only.

    :param node: Ray's own record of the node that it has started.
    """

    def __init__(self, node: Any) -> None:
        self._process = _start(_RAY, node.raylet_socket_name, *map(str, _servers(node)))

    def close(self) -> None:
        """Kill those that are left and return when that is done; to be called behind Ray's own shutdown."""
        assert self._process.stdin is not None  # both are pipes
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def continue_without_parent() -> None:
    """Have the kernel send SIGCONT when the parent is gone: a stopped process could not see that, and so not end.

    It does nothing to a process that runs.
    """
    import ctypes  # not for the guard, which has nothing to do with it

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))


def _start(kind: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -I -S: no site, no user code, nothing to import but the standard library.
        [sys.executable, "-I", "-S", __file__, kind, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd="/",
        env={},
        start_new_session=True,  # a signal to the owner's process group must not reach it
    )


def _servers(node: Any) -> Iterator[int]:
    """The processes that the driver has started, and those that they have, such as the raylet's agents."""
    for processes in node.all_processes.values():
        for info in processes:
            yield info.process.pid
            with contextlib.suppress(OSError):
                for children in Path(f"/proc/{info.process.pid}/task").glob("*/children"):
                    yield from map(int, children.read_text().split())


def _guard_engine(owner: int, mark: str, folder: str) -> None:
    entry = f"{_MARK}={mark}".encode()
    owners_own = _shared_memory(owner)
    if os.fork():
        os._exit(0)
    shared: set[int] = set()
    settled = False
    while True:
        word = _read(None if settled else _LOOK_SECONDS)
        # Noted while the processes live: whoever kills them may be faster than the guard.
        for pid in _with("environ", entry):
            shared |= _shared_memory(pid)
        if not settled:
            shared |= _shared_memory(owner) - owners_own
        if word == b"":
            break
        settled = settled or word == _SETTLED
    _kill_all(lambda: _with("environ", entry))
    _unlink(shared)
    shutil.rmtree(folder, ignore_errors=True)


def _guard_ray(raylet: str, pids: list[int]) -> None:
    servers: list[int] = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            servers.append(os.pidfd_open(pid))  # the id may be somebody else's by the end
    _read(None)
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(server, signal.SIGKILL)
    # Workers that are starting still have the arguments that their raylet gave them: later Ray writes their task there.
    argument = f"--raylet-name={raylet}".encode()
    _kill_all(lambda: _with("cmdline", argument))


def _kill_all(find: Callable[[], list[int]]) -> None:
    """Kill what is found until nothing is, for a while: what has just been forked does not show yet what it is."""
    quiet = 0
    while quiet < _QUIET_LOOKS:
        pids = find()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if pids else quiet + 1
        time.sleep(_QUIET_SECONDS)  # the kernel tells nobody of the processes of others


def _read(timeout: float | None) -> bytes | None:
    """The owner's next word; None when there was none in time, nothing when there will be none any more."""
    ready, _, _ = select.select([0], [], [], timeout)
    return os.read(0, 1) if ready else None


def _with(name: str, line: bytes) -> list[int]:
    """Processes with a line of their ``environ`` or ``cmdline``, both as they were started with; zombies show none."""
    return [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and line in _lines(pid, name, b"\0")]


def _shared_memory(pid: int) -> set[int]:
    """Inodes of the shared memory that a process has mapped; by name one would miss semaphores, which are renamed."""
    return {int(line.split()[4]) for line in _lines(str(pid), "maps", b"\n") if b" /dev/shm/" in line}


def _unlink(inodes: set[int]) -> None:
    with contextlib.suppress(OSError), os.scandir("/dev/shm") as entries:
        for entry in entries:
            if entry.inode() in inodes and entry.name.startswith(_SHARED):
                os.unlink(entry.path)


def _lines(pid: str, name: str, separator: bytes) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read().split(separator)
    except OSError:  # it has ended, or belongs to somebody else
        return []


if __name__ == "__main__":
    if sys.argv[1] == _ENGINE:
        _guard_engine(int(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        _guard_ray(sys.argv[2], [int(pid) for pid in sys.argv[3:]])
