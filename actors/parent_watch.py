"""Ends the processes of an engine when their owner is gone, however it went.

vLLM's EngineCore outlives an owner that is killed: it keeps its memory, its GPU and the caller's stdout. vLLM
loads plug-ins in every process, but only after some 20 seconds of imports, so a watcher in there would miss an owner
that dies during the start. So the owner starts one tiny guard process first. The guard does nothing but wait until the
pipe from its owner closes, which the kernel does for every kind of death. Then it kills whatever carries the owner's
mark, and removes the folder of the engine's sockets, which vLLM leaves behind even when it ends in good order.

The mark is an environment variable. Every process that the owner starts inherits it, whoever its parent is by
then, and ``/proc/PID/environ`` shows it. multiprocessing's resource tracker is spared: it ends by itself,
after it has unlinked the shared memory that the killed processes left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid

__all__ = ("ProcessGuard",)

_MARK = "ARUN_ENGINE_MARK"
_TRACKER = b"multiprocessing.resource_tracker"


class ProcessGuard:
    """Marks the processes that this process starts from now on, and ends them on :meth:`close` or with this process.

    Linux only (it reads ``/proc``). One per process at a time: the mark is in ``os.environ``.

    :ivar folder: for the sockets of these processes; removed with them.
    """

    def __init__(self) -> None:
        mark = uuid.uuid4().hex
        self.folder = tempfile.mkdtemp(prefix="arun-engine-")
        self._process = subprocess.Popen(
            # -I -S: no site, no user code, nothing to import but the standard library. The guard itself is not marked.
            [sys.executable, "-I", "-S", __file__, mark, self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,  # a signal to the owner's process group must not reach it
        )
        os.environ[_MARK] = mark
        os.environ["SPT_NOENV"] = "1"  # setproctitle, which vLLM uses, would overwrite /proc/PID/environ

    def close(self) -> None:
        """Kill every marked process and return when they are gone. Idempotent; blocks for milliseconds."""
        os.environ.pop(_MARK, None)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def _guard(mark: str, folder: str) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    entry = f"{_MARK}={mark}".encode()
    while pids := _marked(entry):  # again, because one of them may just have started another
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(entry: bytes) -> list[int]:
    """Processes with ``entry`` in the environment they were started with, zombies and resource trackers excepted."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and _is_marked(name, entry)]


def _is_marked(pid: str, entry: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            if entry not in environ.read().split(b"\0"):
                return False
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            return _TRACKER not in cmdline.read()
    except OSError:  # it has ended, or belongs to somebody else
        return False


if __name__ == "__main__":
    _guard(sys.argv[1], sys.argv[2])
