"""Ends the processes of an engine when their owner is gone, however it went.

vLLM's EngineCore outlives an owner that is killed: it keeps its memory, its GPU and the caller's stdout. vLLM
loads plug-ins in every process, but only after some 20 seconds of imports, so a watcher in there would miss an owner
that dies during the start. So the owner starts one tiny guard process first, in a session of its own and as nobody's
child: Ray's workers kill their children when they exit, and would kill the guard before its work. The guard waits until
the pipe from its owner closes, which the kernel does for every kind of death. Then it kills whatever carries the
owner's mark, and removes what that leaves behind: its sockets and temporary files (which vLLM forgets even when it ends
in good order) and its shared memory (multiprocessing's resource tracker would unlink some of it, but often is killed as
well).

The mark is an environment variable. Every process that the owner starts inherits it, whoever its parent is by
then, and ``/proc/PID/environ`` shows it.
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

__all__ = ("ProcessGuard", "continue_without_parent")

_MARK = "ARUN_ENGINE_MARK"
_SETTLED = b"."
_LOOK_SECONDS = 0.5
_QUIET_LOOKS = 5
_QUIET_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SHARED = ("psm_", "sem.mp-", "vllm")  # of multiprocessing and of vLLM


class ProcessGuard:
    """Marks the processes that this process starts from now on, and ends them on :meth:`close` or with this process.

    Linux only (it reads ``/proc``). One per process at a time: the mark is in ``os.environ``.

    :ivar folder: for the sockets and temporary files of these processes; removed with them.
    """

    def __init__(self) -> None:
        mark = uuid.uuid4().hex
        self.folder = tempfile.mkdtemp(prefix="arun-engine-")
        guard = subprocess.Popen(
            # -I -S: no site, no user code, nothing to import but the standard library. The guard itself is not marked.
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark, self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={},
            start_new_session=True,  # a signal to the owner's process group must not reach it
        )
        guard.wait()  # it goes on as a child of its own
        assert guard.stdin is not None  # both are pipes
        assert guard.stdout is not None
        self._leash, self._guarding = guard.stdin, guard.stdout
        os.environ[_MARK] = mark
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


def continue_without_parent() -> None:
    """Have the kernel send SIGCONT when the parent is gone: a stopped process could not see that, and so not end.

    It does nothing to a process that runs.
    """
    import ctypes  # not for the guard, which has nothing to do with it

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))


def _guard(owner: int, entry: bytes, folder: str) -> None:
    owners_own = _shared_memory(owner)
    if os.fork():
        os._exit(0)
    shared: set[int] = set()
    settled = False
    while True:
        word = _read(None if settled else _LOOK_SECONDS)
        # Noted while the processes live: whoever kills them may be faster than the guard.
        for pid in _marked(entry):
            shared |= _shared_memory(pid)
        if not settled:
            shared |= _shared_memory(owner) - owners_own
        if word == b"":
            break
        settled = settled or word == _SETTLED
    quiet = 0
    while quiet < _QUIET_LOOKS:  # one of them may just have started another, which shows no environment at first
        pids = _marked(entry)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if pids else quiet + 1
        time.sleep(_QUIET_SECONDS)
    _unlink(shared)
    shutil.rmtree(folder, ignore_errors=True)


def _read(timeout: float | None) -> bytes | None:
    """The owner's next word; None when there was none in time, nothing when there will be none any more."""
    ready, _, _ = select.select([0], [], [], timeout)
    return os.read(0, 1) if ready else None


def _marked(entry: bytes) -> list[int]:
    """Processes with ``entry`` in the environment they were started with; zombies show none."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and entry in _lines(name, "environ", b"\0")]


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
    _guard(int(sys.argv[1]), f"{_MARK}={sys.argv[2]}".encode(), sys.argv[3])
